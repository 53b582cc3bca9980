"""The losses written out in PyTorch and differentiated by autograd: ``impl="reference"`` where that fits.

Nothing in eager PyTorch is faster there. ``reference.info_nce`` takes over where the scores are many, which it computes
block by block, for float16, whose gradient of a row of zeros it limits, and for a batch of several processes.

Shapes: V views, B samples, M = V B rows, K rows of the queue.
"""

import contextlib
import itertools

import torch
import torch.nn.functional as F

from selfsup_kernels.objectives import OBJECTIVES, interacts
from selfsup_kernels.ops import REDUCTIONS

_SCORES = 1 << 22
"""The most scores, 16 MB in float32. From about there on a block at a time is as fast as all at once; for
``cross_view`` from four times as many, since its blocks have the scores of two views twice, as rows and as columns."""


def takes_info_nce(view, num_views, queue_rows, name):
    """Whether ``info_nce_loss`` below is meant for V views like ``view`` (B, D)."""
    rows, limit = num_views * len(view), _SCORES
    scores = rows * (rows + queue_rows)
    if name == "cross_view":
        scores, limit = rows * (rows - len(view)) // 2 + rows * queue_rows, 4 * _SCORES
    return view.dtype != torch.float16 and scores <= limit


def takes_byol(view):
    """Whether ``byol_loss`` below is meant for views like ``view``."""
    return view.dtype != torch.float16


def info_nce_loss(
    temperature, objective, core_view, normalize, eps, reduction, stacked, temperature_tensor, labels, queue, *views
):
    """The loss, in float32 at least, of the arguments of ``autograd.info_nce.InfoNCE``."""
    name, reduction, num_views = OBJECTIVES[objective], REDUCTIONS[reduction], len(views[0]) if stacked else len(views)
    with _no_autocast(views[0].device):
        z = _rows(views[0].flatten(0, 1) if stacked else torch.cat(views), normalize, eps)
        queue = None if queue is None else _rows(queue, normalize, eps)
        if temperature_tensor is not None:
            temperature = temperature_tensor.to(z).reshape(())
            temperature = torch.where((temperature > 0) & temperature.isfinite(), temperature, torch.nan)
        if (num_views > 2 and name == "pairwise") or name == "cross_view":
            loss = _by_view_pairs(z, queue, temperature, num_views, name, core_view)
        else:
            scores = _scores(z, z if queue is None else torch.cat([z, queue]), temperature)
            if num_views == 2 and labels is None and name != "decoupled":  # one positive: these objectives are NT-Xent
                return _nt_xent(scores, reduction)
            loss = _pooled(scores, num_views, labels, name, core_view)
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _scores(rows, columns, temperature):
    if isinstance(temperature, torch.Tensor):  # whose gradient is more accurate from the scores than from the rows
        return rows @ columns.mT / temperature
    return (rows / temperature) @ columns.mT


def _nt_xent(scores, reduction):
    """Of the scores (2 B, 2 B + K) of two views (arXiv:2002.05709, eq. 1)."""
    rows, columns = scores.shape
    itself = torch.eye(rows, columns, dtype=torch.bool, device=scores.device)
    positive = torch.arange(rows, device=scores.device).roll(rows // 2)
    loss = F.cross_entropy(scores.masked_fill(itself, -torch.inf), positive, reduction=reduction)
    return loss.view(2, -1) if reduction == "none" else loss


def _by_view_pairs(z, queue, temperature, num_views, name, core_view):
    """(V, B): the mean of a term for each view that the anchor's view meets, whose negatives are of these two views
    (``pairwise``) or of the other one (``cross_view``)."""
    batch = len(z) // num_views
    rest = None  # the log-sum-exp of what all terms of an anchor have in common
    if queue is not None:
        queue = queue.clone()  # its owner may fill it before the backward
        rest = _scores(z, queue, temperature).logsumexp(-1).view(num_views, batch)
    if name == "pairwise":
        itself = torch.eye(batch, dtype=torch.bool, device=z.device)
        own = z.view(num_views, batch, -1)
        own = _scores(own, own, temperature).masked_fill(itself, -torch.inf).logsumexp(-1)
        rest = own if rest is None else torch.logaddexp(rest, own)
    z, positive = z.split(batch), torch.arange(batch, device=z.device)
    terms = [[] for _ in z]
    for u, v in itertools.combinations(range(num_views), 2):
        if not interacts(u, v, core_view):
            continue
        scores = _scores(z[u], z[v], temperature)
        for anchor, of_anchor in ((u, scores), (v, scores.T)):
            if rest is None:
                term = F.cross_entropy(of_anchor, positive, reduction="none")
            else:
                term = torch.logaddexp(of_anchor.logsumexp(-1), rest[anchor]) - of_anchor.diagonal()
            terms[anchor].append(term)
    return torch.stack([own[0] if len(own) == 1 else torch.stack(own).mean(0) for own in terms])


def _pooled(scores, num_views, labels, name, core_view):
    """(V, B) of the scores (M, M + K), where the negatives of all views count alike."""
    rows, device = len(scores), scores.device
    batch = rows // num_views
    samples = torch.arange(batch, device=device) if labels is None else labels
    same = (samples[:, None] == samples).repeat(num_views, num_views)
    itself = torch.eye(rows, dtype=torch.bool, device=device)
    positive = same & ~itself
    left_out = itself if name in ("supcon_out", "supcon_in") else same  # of the denominator
    if core_view >= 0:
        views = range(num_views)
        met = torch.tensor([[interacts(u, v, core_view) for v in views] for u in views], device=device)
        met = met.repeat_interleave(batch, 0).repeat_interleave(batch, 1)
        positive, left_out = positive & met, left_out | ~met
    if scores.shape[1] > rows:
        left_out = F.pad(left_out, (0, scores.shape[1] - rows))
    lse = _logsumexp(scores, left_out)
    scores = scores[:, :rows]
    count = positive.sum(-1).to(scores.dtype)
    at_least_one = count.clamp_min(1)

    def mean(values):
        return torch.where(positive, values, 0).sum(-1) / at_least_one

    if name == "supcon_in":
        loss = lse - _logsumexp(scores, ~positive) + at_least_one.log()
    elif name == "per_positive":
        loss = mean(torch.logaddexp(lse[:, None], scores) - scores)
    else:
        loss = lse - mean(scores)
    return torch.where(count > 0, loss, 0).view(num_views, batch)


def _logsumexp(scores, left_out):
    """Over the rows' other columns; -inf, with a gradient of zero instead of NaN, where there are none."""
    empty = left_out.all(-1)
    return scores.masked_fill(left_out & ~empty[:, None], -torch.inf).logsumexp(-1).masked_fill(empty, -torch.inf)


def byol_loss(eps, reduction, stacked, num, *tensors):
    """The loss, in float32 at least, of the arguments of ``autograd.byol.BYOL``."""
    reduction = REDUCTIONS[reduction]
    with _no_autocast(tensors[0].device):
        p, t = (x[0] if len(x) == 1 else torch.stack(x) for x in (tensors[:num], tensors[num:]))
        p, t = _wide(p), _rows(t, True, eps)
        if p.dim() == 3:
            t = t.flip(0) if len(t) == 2 else (t.sum(0) - t) / (len(t) - 1)
        cosines = torch.linalg.vecdot(p, t) / _norm(p, eps)
        if reduction == "none" and p.dim() == 2:
            cosines = cosines.unsqueeze(0)
        loss = 2 - 2 * (cosines.mean() if reduction == "mean" else cosines)
        return loss.sum() if reduction == "sum" else loss


def _wide(h):
    return h.to(torch.float64 if h.dtype == torch.float64 else torch.float32)


def _rows(h, normalize, eps):
    h = _wide(h)
    return h / _norm(h, eps).unsqueeze(-1) if normalize else h


def _norm(h, eps):
    """At least ``eps``; summed in float64, since the squares of a long or a short row leave the range of float32."""
    return torch.linalg.vector_norm(h, dim=-1, dtype=torch.float64).clamp_min(eps).to(h.dtype)


def _no_autocast(device):
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
