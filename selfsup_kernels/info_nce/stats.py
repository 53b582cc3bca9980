"""Quality measures of embeddings, without gradients and without the matrix of similarities."""

import math
from typing import NamedTuple

import torch

from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained

_CHUNK_ELEMENTS = 1 << 22
"""The number of similarities in memory at a time: 16 MB in float32."""


class ContrastiveStats(NamedTuple):
    """Result of :func:`contrastive_stats`: 0-dim float32 tensors on the device of the views."""

    top1: torch.Tensor
    positive_similarity: torch.Tensor
    hardest_negative_similarity: torch.Tensor
    alignment: torch.Tensor
    uniformity: torch.Tensor


@torch.no_grad()
@explained("contrastive_stats([z0, z1])")
def contrastive_stats(views, *, labels=None, normalize=True, eps=1e-12) -> ContrastiveStats:
    r"""Return retrieval accuracy, similarities, alignment and uniformity of a batch of embeddings.

    The :math:`M = V B` rows are :math:`z = h / \max(|h|, \epsilon)`. The positives of a row are the same sample's rows
    in the other views (with ``labels``: all other rows of its class); its negatives are the rows of all other samples
    (classes).

    - ``top1``: the share of rows whose most similar other row is a positive. A negative as similar as the best
      positive, up to rounding, counts as an error, so collapsed embeddings score 0. Chance is
      :math:`(V - 1) / (M - 1)` without labels.
    - ``positive_similarity``: the mean of :math:`\langle z_i, z_j \rangle` over the ordered positive pairs.
    - ``hardest_negative_similarity``: the mean over rows of the largest similarity with a negative.
    - ``alignment``: the mean of :math:`|z_i - z_j|^2` over the positive pairs (arXiv:2005.10242, section 4.1,
      with :math:`\alpha = 2`). Lower is better.
    - ``uniformity``: :math:`\log \operatorname{mean}_{i \ne j} \exp(-2 |z_i - z_j|^2)` over all pairs of rows
      (arXiv:2005.10242, section 4.1, with :math:`t = 2`; the paper uses the rows of one view, this function those of
      all views). Lower is better.

    Rows without a positive (alone in their class) are excluded from the statistics of positives, rows without a
    negative from ``hardest_negative_similarity``. A mean over nothing is NaN. A row with NaN or infinity makes all
    results NaN.

    Takes :math:`2 M^2 D` operations and memory linear in the rows. Computed in float32, or in float64 for float64
    inputs and for rows that are not normalised (distances between long rows cancel).

    Args:
        views: a ``(V, B, D)`` tensor or a sequence of V ``(B, D)`` tensors; V >= 2, or V >= 1 with ``labels``; B >= 2.
        labels: ``(B,)`` integers.
        normalize: divide the rows by their norm; with False, similarities are plain inner products.
        eps: the floor of the norm.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> z = torch.randn(256, 128)
        >>> stats = sk.contrastive_stats([z, z + 0.1 * torch.randn(256, 128)])
        >>> print(f"{stats.top1:.1f}")
        1.0
    """
    least = 1 if labels is not None else 2
    tensors, (num_views, batch, _) = check.views("views", views, least, "; one view needs labels")
    check.same_dtype_and_device(tensors, "views[{}]".format)
    check.samples(batch)
    device, dtype = tensors[0].device, tensors[0].dtype
    eps = check.positive_number("eps", eps)
    if labels is None:
        classes = torch.arange(batch, device=device)
    else:
        check.integers("labels", labels, "views", num_views, batch, device)
        classes = torch.unique(labels, return_inverse=True)[1]

    with torch.autocast(device.type, enabled=False):
        acc = torch.float64 if dtype == torch.float64 or not normalize else torch.float32
        z = torch.cat([x.to(acc).flatten(0, -2) for x in tensors])
        if normalize:
            norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=torch.float64)
            z = (z / norm.clamp_min(eps)).to(acc)
        classes = classes.repeat(num_views)
        top1, hardest, uniformity = _by_rows(z, classes)
        similarity, alignment = _by_classes(z, classes, batch)
        stats = (top1, similarity, hardest, alignment, uniformity)
        finite = z.isfinite().all()  # a comparison with NaN is false and would count as an error
        return ContrastiveStats(*(torch.where(finite, value, torch.nan).float() for value in stats))


def _by_rows(z, classes):
    """Return (top1, hardest negative similarity, uniformity), computing the similarities of a few rows at a time."""
    rows = len(z)
    right, anchors, hardest, with_negatives = (z.new_zeros((), dtype=torch.float64) for _ in range(4))
    square = (z * z).sum(-1)
    # A matrix product may sum its columns in different orders, so scores of equal rows differ by a few roundings,
    # relative to the largest score; subnormal scores differ by less than the smallest normal number.
    slack = 8 * torch.finfo(z.dtype).eps * square.max() + torch.finfo(z.dtype).tiny
    kernels = []
    step = max(1, _CHUNK_ELEMENTS // rows)
    for start in range(0, rows, step):
        own = torch.arange(start, min(start + step, rows), device=z.device)
        scores = z[own] @ z.T
        same = classes[own, None] == classes
        negative = scores.masked_fill(same, -torch.inf).amax(-1)
        same[own - start, own] = False
        positive = scores.masked_fill(~same, -torch.inf).amax(-1)
        is_anchor = same.any(-1)
        has_negative = negative > -torch.inf
        right += ((positive - negative > slack) & is_anchor).sum()
        anchors += is_anchor.sum()
        hardest += negative.where(has_negative, 0).sum(dtype=torch.float64)
        with_negatives += has_negative.sum()
        distance = (square[own, None] + square - 2 * scores).clamp_min_(0)
        distance[own - start, own] = torch.inf
        kernels.append((-2 * distance).logsumexp(-1).double())
    uniformity = torch.cat(kernels).logsumexp(0) - math.log(rows * (rows - 1))
    return right / anchors, hardest / with_negatives, uniformity


def _by_classes(z, classes, count):
    """Return (mean similarity, mean squared distance) of the positive pairs, from per-class sums.

    Over the ordered pairs of a class of n rows with sum ``s``: ``sum <z_i, z_j> = |s|^2 - sum |z_i|^2`` and
    ``sum |z_i - z_j|^2 = 2 (n sum |z_i|^2 - |s|^2)``. Computed in float64, since the differences cancel.
    """
    z = z.double()
    sums = z.new_zeros(count, z.shape[1]).index_add_(0, classes, z)
    squares = z.new_zeros(count).index_add_(0, classes, (z * z).sum(-1))
    sizes = z.new_zeros(count).index_add_(0, classes, z.new_ones(len(z)))
    pairs = (sizes * (sizes - 1)).sum()
    of_sums = (sums * sums).sum(-1)
    similarity = (of_sums - squares).sum() / pairs
    alignment = (2 * (sizes * squares - of_sums)).sum().clamp_min(0) / pairs
    return similarity, alignment
