"""The record of one InfoNCE call, which every implementation takes whole, and what a forward leaves for its backward.

The schema of the ops and the struct of the C++ sources are printed from :class:`Call`. Nothing is imported here but the
standard library, since the build reads it.
"""

from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from torch import Tensor

Size = NewType("Size", int)
"""A number that follows the tensors' shapes: symbolic where ``torch.compile`` traces."""


class Call(NamedTuple):
    """Everything about a call but its tensors."""

    num_views: Size
    """V."""
    batch: Size
    """B, the samples of a view, of all processes together."""
    dim: Size
    """D, the features of a row."""
    queue_rows: Size
    """K; 0: no queue."""
    first: Size
    """This process has the samples ``first .. first + count``; the loss and the gradient are theirs."""
    count: Size
    """Negative: all of them."""
    labelled: bool
    core_view: int
    """Negative: none."""
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
    """Not read where there is a tensor of it."""

    @property
    def own(self):
        """How many samples this process has."""
        return self.batch if self.count < 0 else self.count

    @property
    def columns_of_tables(self):
        """C: a column of negatives for each view (with labels one for all), and one for the queue."""
        return (1 if self.labelled else self.num_views) + (self.queue_rows > 0)

    @property
    def positives_of_tables(self):
        """P: with labels three numbers say the coefficients of all positives, else there is one for each view."""
        return 3 if self.labelled else self.num_views


SIZES = 4
"""The first fields of :class:`Call`, which follow from the shapes of the tensors."""


def sizes_of(views, stacked, queue_rows):
    """Return these fields, read from the tensors: a graph that torch.compile or torch.jit.trace made runs with other
    sizes than it was traced with."""
    return (*views[0].shape, queue_rows) if stacked else (len(views), *views[0].shape, queue_rows)


class Saved(NamedTuple):
    """What the forward leaves for the backward, in this format on every device.

    M rows: by view, ``view * B + sample``; with labels by class, ``place in order * V + view``, but by view in the
    reference. On GPUs each view's rows are padded (:mod:`selfsup_kernels.tiles.layout`). CPU and reference: float32 or
    float64 rows and float64 tables; GPUs: rows in the dtype of the views and float32 tables.
    """

    rows: "Tensor"
    """(M + K, D): the rows of the views, then of the queue; unit rows if ``normalize``."""
    inverse_norms: "Tensor"
    """(M + K,): ``1 / max(|h|, eps)``, negative where the floor ``eps`` was taken; 1 without ``normalize``."""
    log_weights: "Tensor"
    """(C, M): ``d loss_i / d S_ij = exp(log_weights[c, i] + S_ij)`` for every negative j of column c."""
    weights: "Tensor"
    """(C, M), on GPUs alone: the exponential of log_weights plus the score reference."""
    positives: "Tensor"
    """(P, M). By view: ``d loss_i / d S_ip`` of the positive p in view v. With labels (pivot, share, factor): the
    derivative by a positive's score x is ``factor exp(x - pivot) - share`` (positives ALL, numerator MEAN),
    ``-factor exp(x - pivot)`` (LOG_SUM), ``-share sigmoid(pivot - x)`` (ITSELF) or ``-share`` (NONE)."""
    scalars: "Tensor"
    """(4,): 1 / temperature; on GPUs also the largest squared norm of a row without ``normalize``, and whether a weight
    is out of the fast path's range."""
    order: "Tensor"
    """(B,) int64 where rows are sorted by class, else (0,): the samples in that order (CPU: this process's first)."""
    classes: "Tensor"
    """(2, M) int32, on GPUs with labels alone: the first row of each row's class, and the one past its last."""


SCALE, LONGEST, SLOW = 0, 1, 2
"""Places in ``Saved.scalars``."""

SCHEMA_TYPES = {Size: "SymInt", bool: "bool", int: "int", float: "float"}


def schema(record) -> str:
    """The fields of a record as arguments of an op."""
    return ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in record.__annotations__.items())


def unpack_backward(arguments):
    """(saved, labels, call, (need_temperature, dtype)) of a backward op's arguments after the gradient."""
    count, end = len(Saved._fields), len(arguments) - 2
    saved, labels, call = Saved(*arguments[:count]), arguments[count], Call(*arguments[count + 1 : end])
    return saved, labels, call, arguments[end:]
