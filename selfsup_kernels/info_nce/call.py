"""The record of one InfoNCE call, which every implementation takes, and the tensors that the forward saves.

The schema of the ops and the C++ struct are generated from :class:`Call`. This module imports only the standard
library, ``core.record`` and ``objectives``, since the build reads it.
"""

from typing import TYPE_CHECKING, NamedTuple

from selfsup_kernels.core.record import Size
from selfsup_kernels.info_nce.objectives import Columns, Ids

if TYPE_CHECKING:
    from torch import Tensor


class Call(NamedTuple):
    """Everything about a call except its tensors."""

    num_views: Size
    """V."""
    batch: Size
    """B, the number of samples per view, over all processes."""
    dim: Size
    """D, the number of features per row."""
    queue_rows: Size
    """K; 0 without a queue."""
    first: Size
    """This process has the samples ``first .. first + count``, and computes their loss and gradient."""
    count: Size
    """Negative for all samples."""
    ids: int
    """:class:`selfsup_kernels.info_nce.objectives.Ids`."""
    core_view: int
    """Negative for none."""
    columns: int
    """:class:`selfsup_kernels.info_nce.objectives.Columns`."""
    inside: int
    """Which positives are in the denominator: ``objectives.Positives``."""
    numerator: int
    normalize: bool
    reduction: int
    """A position in ``core.ops.REDUCTIONS``."""
    eps: float
    temperature: float
    """Ignored if the temperature is passed as a tensor."""

    @property
    def own(self):
        """The number of samples of this process."""
        return self.batch if self.count < 0 else self.count

    @property
    def labelled(self):
        """Whether an anchor's positives are all other rows of its class, in whatever view."""
        return self.ids == Ids.LABELS and self.columns == Columns.ALL

    @property
    def crossed(self):
        """Whether an anchor has classes of positives and a denominator of its own in each other view."""
        return self.ids == Ids.LABELS and self.columns == Columns.OTHER

    @property
    def columns_of_tables(self):
        """C: one column of negatives per view (one for all views if ``labelled``), and one for the queue."""
        return (1 if self.labelled else self.num_views) + (self.queue_rows > 0)

    @property
    def positives_of_tables(self):
        """P: one coefficient per view, if ``crossed`` one more number; if ``labelled`` three numbers."""
        return 3 if self.labelled else self.num_views + self.crossed


SIZES = 4
"""The number of leading fields of :class:`Call` that follow from the tensors' shapes."""


def sizes_of(views, stacked, queue_rows):
    """Return these fields, read from the tensors: a graph of torch.compile or torch.jit.trace may run with other sizes
    than those it was traced with."""
    return (*views[0].shape, queue_rows) if stacked else (len(views), *views[0].shape, queue_rows)


class Saved(NamedTuple):
    """The tensors that the forward saves for the backward, in the same format on every device.

    M rows: ordered by view, ``view * B + sample``; if ``labelled`` by class, ``place in order * V + view``, except in
    the reference. On GPUs each view's rows are padded (:mod:`selfsup_kernels.tiles.layout`). CPU, reference: float32 or
    float64 rows and float64 tables; GPUs: rows in the dtype of the views and float32 tables.
    """

    rows: "Tensor"
    """(M + K, D): the rows of the views, then of the queue; unit rows if ``normalize``."""
    inverse_norms: "Tensor"
    """(M + K,): ``1 / max(|h|, eps)``, negative if ``|h| < eps``; 1 without ``normalize``."""
    log_weights: "Tensor"
    """(C, M): ``d loss_i / d S_ij = exp(log_weights[c, i] + S_ij)`` for every negative j of column c."""
    weights: "Tensor"
    """(C, M), only on GPUs: the exponential of log_weights plus the score reference."""
    positives: "Tensor"
    """(P, M). By view: ``d loss_i / d S_ip`` of the positive p in view v. If ``labelled`` (pivot, share, factor): the
    derivative by a positive's score x is ``factor exp(x - pivot) - share`` (positives ALL, numerator MEAN),
    ``-factor exp(x - pivot)`` (LOG_SUM), ``-share sigmoid(pivot - x)`` (ITSELF) or ``-share`` (NONE). If ``crossed``
    the last number is the share: for an anchor with several positives in a view, where all coefficients by view are 0,
    the derivative by each of them is ``exp(log_weights[c, i] + x) - share``; else 0."""
    scalars: "Tensor"
    """(4,): 1 / temperature; on GPUs also the largest squared norm of a row without ``normalize``, and whether a weight
    is out of the fast path's range; the last one counts the programs that have added to the loss."""
    order: "Tensor"
    """(B,) int64 if rows are sorted by class, else (0,): the samples in that order (CPU: this process's first)."""
    classes: "Tensor"
    """(2, M) int32, only on GPUs if ``labelled``: the first row of each row's class, and the one past its last."""
    logq: "Tensor"
    """(M,), or (0,) without: what is subtracted from the scores of each row where it is a column. At least 0."""


SCALE, LONGEST, SLOW, FINISHED = 0, 1, 2, 3
"""Indices into ``Saved.scalars``."""


def unpack_backward(arguments):
    """Return (saved, ids, call, (need_temperature, dtype)) from a backward op's arguments after the gradient."""
    count, end = len(Saved._fields), len(arguments) - 2
    saved, ids, call = Saved(*arguments[:count]), arguments[count], Call(*arguments[count + 1 : end])
    return saved, ids, call, arguments[end:]
