"""The losses as one writes them by hand, differentiated by autograd: ``impl="reference"`` in ordinary calls.

The reference's ops, ``reference.info_nce`` and ``reference.byol``, take the others: calls with many scores, calls under
autocast, calls over many processes, and calls in torch.compile, torch.export, torch.jit.trace and torch.func (whose
graphs have to be right for other sizes too).

Shapes: V views, B samples, M = V B rows, K rows of the queue, D features.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from selfsup_kernels import _validate as check
from selfsup_kernels.autograd._once import once
from selfsup_kernels.autograd._transforms import active
from selfsup_kernels.objectives import OBJECTIVES, interacts
from selfsup_kernels.ops import REDUCTIONS, accumulation_dtype
from selfsup_kernels.reference import info_nce

_MB = 1 << 20
_BYOL_ELEMENTS = 1 << 16
"""The most elements of a view in ``byol_loss``. With more, passes over the rows take the time, and the op has fewer."""


def takes_info_nce(view, num_views, queue_rows, labelled, name):
    """Whether ``info_nce_loss`` below is for a call with V views like ``view`` (B, D).

    It is up to the size from which the op is as fast as a loss written by hand. Autograd keeps up to ten times the
    scores.
    """
    batch = view.shape[0]
    rows = num_views * batch
    if name == "cross_view":  # the op computes each score twice: for its row, and for its column
        scores, limit = rows * (rows - batch) // 2 + rows * queue_rows, 64 * _MB
    else:
        scores = rows * (rows + queue_rows)
        limit = 16 * _MB if labelled or queue_rows or name == "pairwise" else _MB
    return _ordinary(view) and scores * accumulation_dtype(view.dtype).itemsize <= limit


def takes_byol(view):
    """Whether ``byol_loss`` below is for a call with views like ``view``."""
    return _ordinary(view) and view.numel() <= _BYOL_ELEMENTS


def _ordinary(view):
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or check.autocasts(view.device) or active())


def _without_autocast(backward):
    """Decorates a ``backward``: called under autocast, where the forward was not, it would multiply in 16 bits."""

    @functools.wraps(backward)
    def wrapper(ctx, *arguments):
        if not check.autocasts(ctx.device):
            return backward(ctx, *arguments)
        with torch.autocast(ctx.device.type, enabled=False):
            return backward(ctx, *arguments)

    return wrapper


class _Rows(torch.autograd.Function):
    """(unit rows (M, D), 1 / temperature or None), in float32 at least. Differentiable once, as the ops are."""

    @staticmethod
    def forward(ctx, normalize, eps, temperature, *views):
        h = views[0].flatten(0, -2) if len(views) == 1 else torch.cat(views)
        z = h.to(accumulation_dtype(h.dtype))
        scale = rnorm = None
        if normalize:
            # In float64, since the squares of a long or a short row leave the range of float32.
            norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=torch.float64)
            eps = max(eps, torch.finfo(z.dtype).tiny)  # whose reciprocal is finite
            rnorm = norm.clamp_min(eps).reciprocal_().to(z.dtype)
            z = z * rnorm
            rnorm = torch.where(norm < eps, -rnorm, rnorm)
        elif len(views) == 1 and z.dtype == h.dtype:  # not the input, which may be changed before the backward
            z = z.clone()
        if temperature is not None:
            scale = info_nce.scale_of(temperature, 0.0, z.device).to(z.dtype)
        ctx.save_for_backward(z, rnorm, scale, temperature, *views)  # the inputs: for `once`
        ctx.device = z.device
        return z, scale

    @staticmethod
    @once
    @_without_autocast
    def backward(ctx, saved, grad, grad_scale):
        z, rnorm, scale, temperature, *views = saved
        if temperature is not None and ctx.needs_input_grad[2]:
            temperature = (-scale * scale * grad_scale).to(temperature).view(temperature.shape)
        else:
            temperature = None
        dtype = views[0].dtype
        if rnorm is not None:
            grad = info_nce.through_the_norm(grad, z, rnorm, dtype)
        grad = grad.to(dtype)
        grads = [grad.view(views[0].shape)] if len(views) == 1 else grad.split(views[0].shape[0])
        return None, None, temperature, *grads


class _Scores(torch.autograd.Function):
    """``rows @ columns.mT``, also backwards in their dtype where that is called under autocast."""

    @staticmethod
    def forward(ctx, rows, columns):
        ctx.save_for_backward(rows, columns)
        ctx.device = rows.device
        return rows @ columns.mT

    @staticmethod
    @_without_autocast
    def backward(ctx, grad):
        rows, columns = ctx.saved_tensors
        return grad @ columns, grad.mT @ rows if ctx.needs_input_grad[1] else None


def info_nce_loss(
    temperature, objective, core_view, normalize, eps, reduction, stacked, temperature_tensor, labels, queue, *views
):
    """The loss, in float32 at least, of the arguments of ``autograd.info_nce.InfoNCE``."""
    name, reduction = OBJECTIVES[objective], REDUCTIONS[reduction]
    num_views = len(views[0]) if stacked else len(views)
    z, scale = _Rows.apply(normalize, eps, temperature_tensor, *views)
    scaled = z * (1 / temperature if scale is None else scale)
    if queue is not None:
        with torch.no_grad():
            queue, _ = _Rows.apply(normalize, eps, None, queue)
    if (num_views > 2 and name == "pairwise") or name == "cross_view":
        loss = _by_view_pairs(scaled, z, queue, num_views, name, core_view)
    else:
        scores = _Scores.apply(scaled, z if queue is None else torch.cat([z, queue]))
        if num_views == 2 and labels is None and name != "decoupled":  # one positive: these objectives are NT-Xent
            return _nt_xent(scores, reduction)
        loss = _pooled(scores, num_views, labels, name, core_view)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _nt_xent(scores, reduction):
    """Of the scores (2 B, 2 B + K) of two views (arXiv:2002.05709, eq. 1)."""
    rows, columns = scores.shape
    itself = torch.eye(rows, columns, dtype=torch.bool, device=scores.device)
    positive = torch.arange(rows, device=scores.device).roll(rows // 2)
    loss = F.cross_entropy(scores.masked_fill(itself, -torch.inf), positive, reduction=reduction)
    return loss.view(2, -1) if reduction == "none" else loss


def _by_view_pairs(scaled, z, queue, num_views, name, core_view):
    """(V, B): the mean of a term for each view that the anchor's view meets, whose negatives are of these two views
    (``pairwise``) or of the other one (``cross_view``)."""
    batch = len(z) // num_views
    rest = None  # the log-sum-exp of what all terms of an anchor have in common
    if queue is not None:
        rest = _Scores.apply(scaled, queue).logsumexp(-1).view(num_views, batch)
    if name == "pairwise" and batch > 1:
        itself = torch.eye(batch, dtype=torch.bool, device=z.device)
        own = _Scores.apply(scaled.view(num_views, batch, -1), z.view(num_views, batch, -1))
        own = own.masked_fill(itself, -torch.inf).logsumexp(-1)
        rest = own if rest is None else torch.logaddexp(rest, own)
    scaled, z, positive = scaled.split(batch), z.split(batch), torch.arange(batch, device=z.device)
    terms = [[] for _ in z]
    for u, v in itertools.combinations(range(num_views), 2):
        if not interacts(u, v, core_view):
            continue
        scores = _Scores.apply(scaled[u], z[v])
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
    alone = left_out.all(-1)  # rows without a negative
    lse = _logsumexp(scores, left_out, alone)
    scores = scores[:, :rows]
    count = positive.sum(-1).to(scores.dtype)
    at_least_one = count.clamp_min(1)

    def mean(values):
        return torch.where(positive, values, 0).sum(-1) / at_least_one

    if name == "supcon_in":
        loss = lse - _logsumexp(scores, ~positive, count == 0) + at_least_one.log()
    elif name == "per_positive":
        # Where a row has no negative: 0, or NaN where the score is infinite, as its log-sum-exp would give.
        loss = mean(torch.where(alone[:, None], scores, torch.logaddexp(lse[:, None], scores)) - scores)
    else:
        if name == "decoupled":
            lse = lse.masked_fill(alone, -torch.inf)
        loss = lse - mean(scores)
    return torch.where(count > 0, loss, 0).view(num_views, batch)


def _logsumexp(scores, left_out, alone):
    """Of each row's other columns. Rows that have none, ``alone``, keep all: of nothing, the gradient would be NaN."""
    return scores.masked_fill(left_out & ~alone[:, None], -torch.inf).logsumexp(-1)


def byol_loss(eps, reduction, stacked, num, *tensors):
    """The loss, in float32 at least, of the arguments of ``autograd.byol.BYOL``."""
    reduction, num_views = REDUCTIONS[reduction], len(tensors[0]) if stacked else num
    p, _ = _Rows.apply(True, eps, None, *tensors[:num])
    with torch.no_grad():
        t, _ = _Rows.apply(True, eps, None, *tensors[num:])
        if num_views > 1:  # of the other views the mean is enough
            t = t.view(num_views, -1, t.shape[1])
            t = (t.flip(0) if num_views == 2 else (t.sum(0) - t) / (num_views - 1)).flatten(0, 1)
    cosines = torch.linalg.vecdot(p, t)
    if reduction == "mean":
        return 2 - 2 * cosines.mean()
    loss = 2 - 2 * cosines
    return loss.sum() if reduction == "sum" else loss.view(num_views, -1)
