"""Drop-ins for pytorch-metric-learning 2.9.0: ``losses.NTXentLoss`` and ``losses.SupConLoss``."""

import math
from typing import NamedTuple

import torch

from selfsup_kernels.compat._common import DropIn, altered, is_from, narrow, unsupported, wide_loss
from selfsup_kernels.core import validate as check
from selfsup_kernels.info_nce import one_way

__all__ = ["NTXentLoss", "SupConLoss"]

_LIBRARY = "pytorch_metric_learning"


class _PairLoss(DropIn):
    """The constructor shared by the two losses."""

    hooks = (
        "compute_loss",
        "_compute_loss",
        "mat_based_loss",
        "pair_based_loss",
        "_assert_either_pos_or_neg",
        "zero_loss",
        "zero_losses",
        "sub_loss_names",
        "_sub_loss_names",
        "all_regularization_loss_names",
        "add_embedding_regularization_to_loss_dict",
        "embedding_regularization_loss",
        "reset_stats",
    )
    constructor_hooks = ("loss_method", "set_reducer")

    def __init__(self, temperature, **kwargs):
        super().__init__()
        self.temperature = temperature
        self.distance = self._default("distance", kwargs.pop("distance", None))
        self.reducer = self._default("reducer", kwargs.pop("reducer", None))
        self.collect_stats = bool(kwargs.pop("collect_stats", None))
        self.embedding_regularizer = kwargs.pop("embedding_regularizer", None)
        self.embedding_reg_weight = kwargs.pop("embedding_reg_weight", 1)
        if kwargs:
            raise TypeError(f"{type(self).__name__}: unexpected arguments {', '.join(kwargs)}")

    def _default(self, name, value):
        """Return ``value``, or the result of a subclass's ``get_default_distance`` or ``get_default_reducer``."""
        default = getattr(self, f"get_default_{name}", None)
        return default() if value is None and default is not None else value

    def extra_repr(self):
        return f"temperature={self.temperature}"


class NTXentLoss(_PairLoss):
    r"""``pytorch_metric_learning.losses.NTXentLoss``: NT-Xent over all pairs of samples that share a label.

    The loss is the mean over all ordered positive pairs :math:`(a, p)` of :math:`-\log` of the softmax of
    :math:`S_{ap}` over that positive and the anchor's negatives: ``per_positive`` of
    :func:`selfsup_kernels.info_nce_loss`, with anchors weighted by their number of positives. Rows are normalised. The
    loss is zero if there are no positive or no negative pairs.

    Departure: the original adds the dtype's smallest normal number inside the logarithm, which caps a pair's loss at
    87.3 in float32 (9.7 in float16) and zeroes its gradient there. Ours has no cap.

    Args:
        temperature: a positive number.
        **kwargs: ``distance``: CosineSimilarity (default) or DotProductSimilarity. ``reducer``: MeanReducer (default)
            or SumReducer. Other values, ``embedding_regularizer`` and ``collect_stats`` are not supported, nor is
            ``indices_tuple`` of the forward.

    A subclass may define ``get_default_distance`` and ``get_default_reducer``.

    Raises:
        RuntimeError: a feature is not supported, or a subclass overrides another method of the original (raised when
            the subclass is defined).
        ValueError, TypeError: embeddings, references or labels do not fit.

    Example:
        >>> from selfsup_kernels.compat.pytorch_metric_learning import NTXentLoss
        >>> embeddings, labels = torch.randn(256, 128), torch.randint(10, (256,))
        >>> NTXentLoss(temperature=0.1)(embeddings, labels).shape
        torch.Size([])
    """

    original = "pytorch_metric_learning.losses.NTXentLoss"

    def __init__(self, temperature=0.07, **kwargs):
        super().__init__(temperature, **kwargs)
        _ntxent.settings(self)

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Return the loss of ``(B, D)`` embeddings with ``(B,)`` labels.

        Args:
            embeddings, labels: the anchors; without ``ref_emb`` they are contrasted with each other.
            indices_tuple: must be None. CrossBatchMemory passes one, and is not supported.
            ref_emb: ``(M, D)``, contrasted with the anchors instead, in their dtype and on their device. It may require
                grad.
            ref_labels: ``(M,)``, the labels of ``ref_emb``; without, M = B and row i has the label of embedding i. If
                it is None or the same tensor as ``labels``, row i is neither a positive nor a negative of anchor i, as
                in the original. Without ``ref_emb`` it is not read.
        """
        if not isinstance(self, NTXentLoss):
            _check_end(self, embeddings, embeddings if ref_emb is None else ref_emb)
        return _ntxent(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)


class SupConLoss(_PairLoss):
    r"""``pytorch_metric_learning.losses.SupConLoss``: SupCon's L_out (arXiv:2004.11362, eq. 2).

    An anchor's loss is :func:`selfsup_kernels.info_nce_loss` with ``supcon_out``; rows are normalised, and there is no
    factor temperature / base temperature. The default reducer is the mean over the anchors with a loss above zero:
    those that have a positive, except, as in the original, those whose loss rounds to zero. The loss is zero if there
    are no positive or no negative pairs.

    Departure: NaN in the embeddings gives NaN; the original's default reducer drops NaN losses and returns zero.

    Args:
        temperature: a positive number.
        **kwargs: ``distance``: CosineSimilarity (default) or DotProductSimilarity. ``reducer``: AvgNonZeroReducer
            (default), MeanReducer or SumReducer. Other values, ``embedding_regularizer`` and ``collect_stats`` are not
            supported, nor is ``indices_tuple`` of the forward.

    A subclass may define ``get_default_distance`` and ``get_default_reducer``.

    Raises:
        RuntimeError: a feature is not supported, or a subclass overrides another method of the original (raised when
            the subclass is defined).
        ValueError, TypeError: embeddings, references or labels do not fit.

    Example:
        >>> from selfsup_kernels.compat.pytorch_metric_learning import SupConLoss
        >>> embeddings, labels = torch.randn(256, 128), torch.randint(10, (256,))
        >>> SupConLoss(temperature=0.1)(embeddings, labels).shape
        torch.Size([])
    """

    original = "pytorch_metric_learning.losses.SupConLoss"

    def __init__(self, temperature=0.1, **kwargs):
        super().__init__(temperature, **kwargs)
        _supcon.settings(self)

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Return the loss of ``(B, D)`` embeddings with ``(B,)`` labels; the arguments are those of NTXentLoss."""
        return _supcon(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)


class _Loss(NamedTuple):
    """Computation of one of the losses, for a module with the original's attributes: ours, or the original itself."""

    original: str
    objective: str
    method: str
    """The method that the original calls with the matrix of scores."""
    reducers: dict
    """Functions ``reduce(losses, pairs)`` by the name of the supported reducer, the default one first."""

    def __call__(self, module, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        normalize, reduce = self.settings(module)
        if indices_tuple is not None:
            raise unsupported(self.original, "indices_tuple (a miner's pairs or triplets)")
        _check_rows("embeddings", "B", embeddings)
        labels = _labels("labels", "B", labels, embeddings)
        if ref_emb is None:  # the original ignores ref_labels then
            pairs, none = _pairs(labels, labels), len(embeddings) == 1
        else:
            pairs = _pairs(labels, _labels_of_references(embeddings, labels, ref_emb, ref_labels))
            none = len(embeddings) * len(ref_emb) <= 2  # the original skips one positive and one negative pair
        if none:
            return (embeddings * 0).sum()
        settings = {"temperature": module.temperature, "objective": self.objective, "normalize": normalize}
        if ref_emb is None:
            losses = wide_loss([embeddings], labels=pairs.labels, reduction="none", **settings)[0]
        else:
            losses = one_way.losses(embeddings, ref_emb, *pairs, **settings)
        return narrow(reduce(losses, pairs), embeddings)

    def settings(self, module):
        """Return whether rows are normalised and the function that reduces the losses; raise if unsupported."""
        if module.embedding_regularizer is not None:
            raise unsupported(self.original, "embedding_regularizer", "add the regularizer's loss to this one's")
        if any(getattr(x, "collect_stats", False) for x in (module, module.distance, module.reducer)):
            raise unsupported(self.original, "collect_stats=True")
        method = getattr(type(module), self.method, None)
        if method is None or torch.compiler.is_compiling():  # torch.compile cannot compare methods
            pass
        elif getattr(module.loss_method, "__func__", None) is not method:
            raise unsupported(self.original, f"another loss_method than {self.method}")
        found = self._normalize(module.distance), self.reducers[self._reducer(module.reducer)]
        for name in ("distance", "reducer"):
            part = getattr(module, name)
            if part is not None and (changes := altered(module, part, _LIBRARY)):
                raise unsupported(self.original, f"{name}={type(part).__name__} with its own {', '.join(changes)}")
        return found

    def _normalize(self, distance):
        if distance is None:
            return True
        names = ("CosineSimilarity", "DotProductSimilarity")
        if not is_from(_LIBRARY, type(distance), names) or (distance.p, distance.power) != (2, 1):
            raise unsupported(
                self.original,
                f"distance={type(distance).__name__} other than {' and '.join(names)} with p=2 and power=1",
            )
        if not getattr(distance, "is_inverted", True):
            raise unsupported(self.original, f"distance={type(distance).__name__} with is_inverted=False")
        return bool(distance.normalize_embeddings)

    def _reducer(self, reducer):
        if reducer is None:
            return next(iter(self.reducers))
        name = type(reducer).__name__
        limits = getattr(reducer, "low", 0), getattr(reducer, "high", None)
        if not is_from(_LIBRARY, type(reducer), self.reducers) or limits != (0, None):
            raise unsupported(self.original, f"reducer={name} other than {' and '.join(self.reducers)}")
        return name


class _Pairs(NamedTuple):
    """The pairs of N anchors and M columns, as arguments of :func:`selfsup_kernels.info_nce.one_way.losses`."""

    labels: torch.Tensor
    """(N,) integers."""
    ref_labels: torch.Tensor
    """(M,) integers of the same dtype."""
    itself: bool
    """Whether the pairs (i, i) are left out."""

    def positives(self):
        """Return the number of positives of each anchor, (N,), without waiting for the accelerator."""
        ordered = self.ref_labels.sort().values
        first, end = (torch.searchsorted(ordered, self.labels, right=right) for right in (False, True))
        return end - first - int(self.itself)

    def differ(self):
        """Return whether there are negative pairs, as a tensor."""
        return (self.labels != self.ref_labels[0]).any() | (self.ref_labels != self.labels[0]).any()


def _pairs(labels, ref_labels):
    """Return the pairs for labels of any dtype. One tensor as both leaves out the pairs (i, i), as in the original."""
    if ref_labels is labels:
        labels = _integers(labels)
        return _Pairs(labels, labels, True)
    both = _integers(torch.cat([labels, ref_labels]))
    return _Pairs(*both.split([len(labels), len(ref_labels)]), False)


def _over_pairs(losses, pairs):
    """Return the sum over all positive pairs, and their number."""
    positives = pairs.positives().to(losses.dtype)
    return (positives * losses).sum(), positives.sum().clamp_min(1)


def _nonzero_mean(losses):
    used = (losses > 0) | losses.isnan()
    return (losses * used).sum() / used.sum().clamp_min(1)


def _with_negatives(reduce):
    """Make the loss zero if all labels are equal, as the original's is without negative pairs."""
    return lambda losses, pairs: reduce(losses) * pairs.differ()


_ntxent = _Loss(
    NTXentLoss.original,
    "per_positive",
    "pair_based_loss",
    {
        "MeanReducer": lambda losses, pairs: torch.div(*_over_pairs(losses, pairs)),
        "SumReducer": lambda losses, pairs: _over_pairs(losses, pairs)[0],
    },
)
_supcon = _Loss(
    SupConLoss.original,
    "supcon_out",
    "mat_based_loss",
    {
        "AvgNonZeroReducer": _with_negatives(_nonzero_mean),
        "MeanReducer": _with_negatives(torch.mean),
        "SumReducer": _with_negatives(torch.sum),
    },
)


def _check_end(module, embeddings, columns):
    """Under ``compat.patch``, leave a call to the original if a pair's loss may come near the original's cap."""
    dtype = _scores_dtype(embeddings)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return  # raises later
    if not getattr(module.distance, "normalize_embeddings", True):
        raise unsupported(NTXentLoss.original, "rows that are not normalised, whose loss may reach the original's end")
    if isinstance(module.temperature, torch.Tensor):
        raise unsupported(
            NTXentLoss.original, "a tensor as temperature, which may be one where the original's loss ends"
        )
    info = torch.finfo(dtype)
    end = -math.log(info.tiny)
    # A pair's loss is at most 2 / T + log M; the original's error of exp(loss - cap) is then below a rounding.
    if not 2 / module.temperature + math.log(max(len(columns), 1)) < end + math.log(info.eps):
        name = str(dtype).removeprefix("torch.")
        raise unsupported(NTXentLoss.original, f"{name} losses near {end:.1f}, where the original ends a pair's")


def _check_rows(name, count, rows):
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"{name}: expected a ({count}, D) tensor, got {type(rows).__name__}")
    if rows.dim() != 2:
        raise ValueError(f"{name}: expected a ({count}, D) tensor, got shape {tuple(rows.shape)}")


def _labels(name, count, labels, rows):
    """Return the labels, one per row, on the device of the rows."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{name}: expected a ({count},) tensor, got {type(labels).__name__}")
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"{name}: expected shape ({len(rows)},), one per embedding, got {tuple(labels.shape)}")
    return labels.to(rows.device)


def _labels_of_references(embeddings, labels, ref_emb, ref_labels):
    """Check ``ref_emb`` and return its labels on its device."""
    check.rows("embeddings", embeddings)
    _check_rows("ref_emb", "M", ref_emb)
    check.plain("ref_emb", ref_emb)
    if ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(f"ref_emb: expected shape (M, {embeddings.shape[1]}), got {tuple(ref_emb.shape)}")
    names = ("embeddings", "ref_emb").__getitem__
    check.same_dtype_and_device([embeddings, ref_emb], names, not check.autocasts(embeddings.device))
    if ref_labels is not None:
        return _labels("ref_labels", "M", ref_labels, ref_emb)
    if len(ref_emb) != len(embeddings):
        raise ValueError(
            "ref_labels: expected a (M,) tensor (without, row i of ref_emb has the label of row i of embeddings),"
            f" got None with {len(embeddings)} embeddings and {len(ref_emb)} rows of ref_emb"
        )
    return labels


def _integers(labels):
    return labels if labels.dtype in check.LABELS else torch.unique(labels, return_inverse=True)[1]


def _scores_dtype(embeddings):
    """Return the dtype of the original's matrix of scores."""
    if not isinstance(embeddings, torch.Tensor) or not check.autocasts(embeddings.device):
        return getattr(embeddings, "dtype", None)
    return torch.get_autocast_dtype(embeddings.device.type)
