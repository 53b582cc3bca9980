"""Drop-ins for pytorch-metric-learning 2.9.0: ``losses.NTXentLoss`` and ``losses.SupConLoss``."""

import torch
from torch import nn

from selfsup_kernels import _validate as check
from selfsup_kernels.compat._common import narrow, unsupported, wide_loss

__all__ = ["NTXentLoss", "SupConLoss"]


class _PairLoss(nn.Module):
    """The constructor and the forward that the two losses share."""

    _objective: str
    _reducers: tuple[str, ...]
    """Those that can be had, the default one first."""

    def __init__(self, temperature, **kwargs):
        super().__init__()
        self.temperature = temperature
        self.distance, self.reducer = kwargs.pop("distance", None), kwargs.pop("reducer", None)
        self.collect_stats = bool(kwargs.pop("collect_stats", None))
        if self.collect_stats:
            raise unsupported(self._original, "collect_stats=True")
        if kwargs.pop("embedding_regularizer", None) is not None:
            raise unsupported(self._original, "embedding_regularizer", "add the regularizer's loss to this one's")
        kwargs.pop("embedding_reg_weight", None)
        if kwargs:
            raise TypeError(f"{type(self).__name__}: unexpected arguments {', '.join(kwargs)}")
        self._normalize = self._check_distance()
        self._reduction = self._check_reducer()

    @property
    def _original(self):
        return f"pytorch_metric_learning.losses.{type(self).__name__}"

    def _check_distance(self):
        """Whether rows are normalised."""
        if self.distance is None:
            return True
        name = type(self.distance).__name__
        if name not in ("CosineSimilarity", "DotProductSimilarity") or (self.distance.p, self.distance.power) != (2, 1):
            raise unsupported(
                self._original, f"distance={self.distance!r} other than CosineSimilarity and DotProductSimilarity"
            )
        return bool(self.distance.normalize_embeddings)

    def _check_reducer(self):
        if self.reducer is None:
            return self._reducers[0]
        name = type(self.reducer).__name__
        if name not in self._reducers or getattr(self.reducer, "high", None) is not None:
            raise unsupported(self._original, f"reducer={name} other than {' and '.join(self._reducers)}")
        return name

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """The loss of ``(B, D)`` embeddings with ``(B,)`` labels. The other arguments must be None."""
        if indices_tuple is not None:
            raise unsupported(self._original, "indices_tuple (a miner's pairs or triplets)")
        if ref_emb is not None or ref_labels is not None:
            raise unsupported(self._original, "ref_emb and ref_labels")
        if not isinstance(embeddings, torch.Tensor):
            raise TypeError(f"embeddings: expected a (B, D) tensor, got {type(embeddings).__name__}")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings: expected a (B, D) tensor, got shape {tuple(embeddings.shape)}")
        labels = _integer_labels(labels, embeddings)
        if len(embeddings) == 1:
            return (embeddings * 0).sum()  # as the original: no pairs
        losses = wide_loss(
            [embeddings],
            temperature=self.temperature,
            objective=self._objective,
            labels=labels,
            normalize=self._normalize,
            reduction="none",
        )[0]
        return narrow(self._reduce(losses, labels), embeddings)

    def extra_repr(self):
        return f"temperature={self.temperature}"


class NTXentLoss(_PairLoss):
    r"""``pytorch_metric_learning.losses.NTXentLoss``: NT-Xent over all pairs of samples that share a label.

    The mean over all ordered positive pairs :math:`(a, p)` of :math:`-\log` of the softmax of :math:`S_{ap}` over that
    one positive and the anchor's negatives: ``per_positive`` in :func:`selfsup_kernels.info_nce_loss`, its anchors
    weighed by their number of positives. Rows are normalised. Zero where there are no positive or no negative pairs.

    Departure: the original adds the dtype's smallest normal number inside the logarithm, so that a pair's loss ends,
    with its gradient, at 87.3 in float32 (9.7 in float16). Ours does not end.

    Args:
        temperature: a positive number.
        **kwargs: ``distance``: CosineSimilarity (default) or DotProductSimilarity. ``reducer``: MeanReducer (default)
            or SumReducer. Others, ``embedding_regularizer`` and ``collect_stats`` are not supported, nor are
            ``indices_tuple``, ``ref_emb`` and ``ref_labels`` of the forward.

    Raises:
        RuntimeError: what is not supported.
        ValueError, TypeError: embeddings or labels that do not fit.
    """

    _objective = "per_positive"
    _reducers = ("MeanReducer", "SumReducer")

    def __init__(self, temperature=0.07, **kwargs):
        super().__init__(temperature, **kwargs)

    def _reduce(self, losses, labels):
        pairs = (_class_sizes(labels) - 1).to(losses.dtype)
        total = (pairs * losses).sum()
        return total if self._reduction == "SumReducer" else total / pairs.sum().clamp_min(1)


class SupConLoss(_PairLoss):
    r"""``pytorch_metric_learning.losses.SupConLoss``: SupCon's L_out (arXiv:2004.11362, eq. 2).

    An anchor's loss is :func:`selfsup_kernels.info_nce_loss` with ``supcon_out``; rows are normalised, and there is no
    factor of temperature / base temperature. The default reducer is the mean over the anchors whose loss is above zero:
    those that have a positive (and among them those that rounding does not bring to zero, here as in the original).
    Zero where there are no positive or no negative pairs.

    Departure: NaN in the embeddings gives NaN; the original's default reducer drops what is NaN, and returns zero.

    Args:
        temperature: a positive number.
        **kwargs: ``distance``: CosineSimilarity (default) or DotProductSimilarity. ``reducer``: AvgNonZeroReducer
            (default), MeanReducer or SumReducer. Others, ``embedding_regularizer`` and ``collect_stats`` are not
            supported, nor are ``indices_tuple``, ``ref_emb`` and ``ref_labels`` of the forward.

    Raises:
        RuntimeError: what is not supported.
        ValueError, TypeError: embeddings or labels that do not fit.
    """

    _objective = "supcon_out"
    _reducers = ("AvgNonZeroReducer", "MeanReducer", "SumReducer")

    def __init__(self, temperature=0.1, **kwargs):
        super().__init__(temperature, **kwargs)

    def _reduce(self, losses, labels):
        pairs_differ = (labels != labels[0]).any()  # without negative pairs the original is zero
        if self._reduction == "AvgNonZeroReducer":
            used = (losses > 0) | losses.isnan()
            total = (losses * used).sum() / used.sum().clamp_min(1)
        else:
            total = losses.mean() if self._reduction == "MeanReducer" else losses.sum()
        return total * pairs_differ


def _integer_labels(labels, embeddings):
    """Labels of any dtype as integers on the device of the embeddings."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels: expected a (B,) tensor, got {type(labels).__name__}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(embeddings)},), one per embedding, got {tuple(labels.shape)}")
    labels = labels.to(embeddings.device)
    return labels if labels.dtype in check.LABELS else torch.unique(labels, return_inverse=True)[1]


def _class_sizes(labels):
    """(B,) number of the samples that share each one's label; nothing here waits for an accelerator."""
    ordered = labels.sort().values
    return torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
