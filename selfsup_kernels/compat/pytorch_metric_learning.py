"""Drop-ins for pytorch-metric-learning 2.9.0: ``losses.NTXentLoss`` and ``losses.SupConLoss``."""

import math
from typing import NamedTuple

import torch

from selfsup_kernels.compat._common import DropIn, altered, is_from, narrow, unsupported, wide_loss
from selfsup_kernels.core import validate as check

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
            or SumReducer. Other values, ``embedding_regularizer`` and ``collect_stats`` are not supported, nor are
            ``indices_tuple``, ``ref_emb`` and ``ref_labels`` of the forward.

    A subclass may define ``get_default_distance`` and ``get_default_reducer``.

    Raises:
        RuntimeError: a feature is not supported, or a subclass overrides another method of the original (raised when
            the subclass is defined).
        ValueError, TypeError: embeddings or labels do not fit.
    """

    original = "pytorch_metric_learning.losses.NTXentLoss"

    def __init__(self, temperature=0.07, **kwargs):
        super().__init__(temperature, **kwargs)
        _ntxent.settings(self)

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Return the loss of ``(B, D)`` embeddings with ``(B,)`` labels. The other arguments must be None."""
        if not isinstance(self, NTXentLoss):
            _check_end(self, embeddings)
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
            supported, nor are ``indices_tuple``, ``ref_emb`` and ``ref_labels`` of the forward.

    A subclass may define ``get_default_distance`` and ``get_default_reducer``.

    Raises:
        RuntimeError: a feature is not supported, or a subclass overrides another method of the original (raised when
            the subclass is defined).
        ValueError, TypeError: embeddings or labels do not fit.
    """

    original = "pytorch_metric_learning.losses.SupConLoss"

    def __init__(self, temperature=0.1, **kwargs):
        super().__init__(temperature, **kwargs)
        _supcon.settings(self)

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Return the loss of ``(B, D)`` embeddings with ``(B,)`` labels. The other arguments must be None."""
        return _supcon(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)


class _Loss(NamedTuple):
    """Computation of one of the losses, for a module with the original's attributes: ours, or the original itself."""

    original: str
    objective: str
    method: str
    """The method that the original calls with the matrix of scores."""
    reducers: dict
    """Functions ``reduce(losses, labels)`` by the name of the supported reducer, the default one first."""

    def __call__(self, module, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        normalize, reduce = self.settings(module)
        if indices_tuple is not None:
            raise unsupported(self.original, "indices_tuple (a miner's pairs or triplets)")
        if ref_emb is not None or ref_labels is not None:
            raise unsupported(self.original, "ref_emb and ref_labels")
        if not isinstance(embeddings, torch.Tensor):
            raise TypeError(f"embeddings: expected a (B, D) tensor, got {type(embeddings).__name__}")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings: expected a (B, D) tensor, got shape {tuple(embeddings.shape)}")
        labels = _integer_labels(labels, embeddings)
        if len(embeddings) == 1:
            return (embeddings * 0).sum()  # as the original: no pairs
        losses = wide_loss(
            [embeddings],
            temperature=module.temperature,
            objective=self.objective,
            labels=labels,
            normalize=normalize,
            reduction="none",
        )[0]
        return narrow(reduce(losses, labels), embeddings)

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


def _over_pairs(losses, labels):
    """Return the sum over all positive pairs, and their number."""
    pairs = (_class_sizes(labels) - 1).to(losses.dtype)
    return (pairs * losses).sum(), pairs.sum().clamp_min(1)


def _nonzero_mean(losses):
    used = (losses > 0) | losses.isnan()
    return (losses * used).sum() / used.sum().clamp_min(1)


def _with_negatives(reduce):
    """Make the loss zero if all labels are equal, as the original's is without negative pairs."""
    return lambda losses, labels: reduce(losses) * (labels != labels[0]).any()


_ntxent = _Loss(
    NTXentLoss.original,
    "per_positive",
    "pair_based_loss",
    {
        "MeanReducer": lambda losses, labels: torch.div(*_over_pairs(losses, labels)),
        "SumReducer": lambda losses, labels: _over_pairs(losses, labels)[0],
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


def _check_end(module, embeddings):
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
    # A pair's loss is at most 2 / T + log B; the original's error of exp(loss - cap) is then below a rounding.
    if not 2 / module.temperature + math.log(max(len(embeddings), 1)) < end + math.log(info.eps):
        name = str(dtype).removeprefix("torch.")
        raise unsupported(NTXentLoss.original, f"{name} losses near {end:.1f}, where the original ends a pair's")


def _integer_labels(labels, embeddings):
    """Convert labels of any dtype to integers on the device of the embeddings."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels: expected a (B,) tensor, got {type(labels).__name__}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(embeddings)},), one per embedding, got {tuple(labels.shape)}")
    labels = labels.to(embeddings.device)
    return labels if labels.dtype in check.LABELS else torch.unique(labels, return_inverse=True)[1]


def _scores_dtype(embeddings):
    """Return the dtype of the original's matrix of scores."""
    if not isinstance(embeddings, torch.Tensor) or not check.autocasts(embeddings.device):
        return getattr(embeddings, "dtype", None)
    return torch.get_autocast_dtype(embeddings.device.type)


def _class_sizes(labels):
    """Return the number of samples that share each sample's label, (B,), without waiting for the accelerator."""
    ordered = labels.sort().values
    return torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
