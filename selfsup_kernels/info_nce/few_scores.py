"""The plain InfoNCE loss, differentiated by autograd: ``impl="reference"`` for calls with few scores.

The op takes calls with more scores, calls under autocast and over several processes, and calls in ``torch.compile``,
``torch.export``, ``torch.jit.trace`` and ``torch.func``, whose graphs have to be right for other sizes too.
"""

import itertools

import torch
import torch.nn.functional as F

from selfsup_kernels.core.eager import UnitRows, ordinary, without_autocast
from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype
from selfsup_kernels.info_nce.objectives import Columns, Ids, Numerator, Positives, negative_views, positive_views

_MB = 1 << 20


def takes(view, call):
    """Return True if ``by_autograd`` should compute a call with views like ``view`` (B, D), that is if the call is so
    small that the op would be slower. Autograd keeps up to ten times the memory of the scores."""
    if call.ids == Ids.DUPLICATES or call.crossed:
        return False
    rows = call.num_views * call.batch
    if call.columns == Columns.OTHER:  # the op computes each score twice, once per direction
        scores, limit = rows * (rows - call.batch) // 2 + rows * call.queue_rows, 64 * _MB
    else:
        scores = rows * (rows + call.queue_rows)
        limit = 16 * _MB if call.labelled or call.queue_rows or call.columns == Columns.OWN_AND_OTHER else _MB
    return ordinary(view) and scores * accumulation_dtype(view.dtype).itemsize <= limit


class _Scores(torch.autograd.Function):
    """``rows @ columns.mT``, with a backward that keeps their dtype under autocast."""

    @staticmethod
    def forward(ctx, rows, columns):
        ctx.save_for_backward(rows, columns)
        ctx.device = rows.device
        return rows @ columns.mT

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        rows, columns = ctx.saved_tensors
        return grad @ columns, grad.mT @ rows if ctx.needs_input_grad[1] else None


def by_autograd(call, temperature_tensor, labels, queue, *views):
    """Return the loss, in float32 at least; differentiable by autograd."""
    reduction, num_views, normalize, eps = REDUCTIONS[call.reduction], call.num_views, call.normalize, call.eps
    z, scale = UnitRows.apply(normalize, eps, temperature_tensor, *views)
    scaled = z * (1 / call.temperature if scale is None else scale)
    if queue is not None:
        with torch.no_grad():
            queue, _ = UnitRows.apply(normalize, eps, None, queue)
    if call.columns == Columns.OTHER or (call.columns == Columns.OWN_AND_OTHER and num_views > 2):
        loss = _by_view_pairs(scaled, z, queue, call)
    else:
        scores = _Scores.apply(scaled, z if queue is None else torch.cat([z, queue]))
        if num_views == 2 and labels is None and call.inside != Positives.NONE:  # equals NT-Xent with one positive
            return _nt_xent(scores, reduction)
        loss = _pooled(scores, labels, call)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _nt_xent(scores, reduction):
    """Return NT-Xent (arXiv:2002.05709, eq. 1) from the scores (2 B, 2 B + K) of two views."""
    rows, columns = scores.shape
    itself = torch.eye(rows, columns, dtype=torch.bool, device=scores.device)
    positive = torch.arange(rows, device=scores.device).roll(rows // 2)
    loss = F.cross_entropy(scores.masked_fill(itself, -torch.inf), positive, reduction=reduction)
    return loss.view(2, -1) if reduction == "none" else loss


def _by_view_pairs(scaled, z, queue, call):
    """Return (V, B): the mean over the positives, each with the negatives of its view (and of the anchor's view)."""
    num_views, batch = call.num_views, call.batch
    rest = None  # the log-sum-exp of the negatives that all terms of an anchor share
    if queue is not None:
        rest = _Scores.apply(scaled, queue).logsumexp(-1).view(num_views, batch)
    if call.columns == Columns.OWN_AND_OTHER and batch > 1:
        itself = torch.eye(batch, dtype=torch.bool, device=z.device)
        own = _Scores.apply(scaled.view(num_views, batch, -1), z.view(num_views, batch, -1))
        own = own.masked_fill(itself, -torch.inf).logsumexp(-1)
        rest = own if rest is None else torch.logaddexp(rest, own)
    scaled, z, positive = scaled.split(batch), z.split(batch), torch.arange(batch, device=z.device)
    terms = [[] for _ in z]
    for u, v in itertools.combinations(range(num_views), 2):
        if v not in positive_views(u, num_views, call.core_view):
            continue
        scores = _Scores.apply(scaled[u], z[v])
        for anchor, of_anchor in ((u, scores), (v, scores.T)):
            if rest is None:
                term = F.cross_entropy(of_anchor, positive, reduction="none")
            else:
                term = torch.logaddexp(of_anchor.logsumexp(-1), rest[anchor]) - of_anchor.diagonal()
            terms[anchor].append(term)
    return torch.stack([own[0] if len(own) == 1 else torch.stack(own).mean(0) for own in terms])


def _pooled(scores, labels, call):
    """Return (V, B) from the scores (M, M + K), with the negatives of all views in one denominator."""
    rows, device, num_views, batch = len(scores), scores.device, call.num_views, call.batch
    samples = torch.arange(batch, device=device) if labels is None else labels
    same = (samples[:, None] == samples).repeat(num_views, num_views)
    itself = torch.eye(rows, dtype=torch.bool, device=device)
    positive = same & ~itself
    left_out = itself if call.inside == Positives.ALL else same  # columns that are not in the denominator
    if call.core_view >= 0:
        views = range(num_views)
        met = [negative_views(u, num_views, call.core_view, call.columns) for u in views]
        met = torch.tensor([[v in met[u] for v in views] for u in views], device=device)
        met = met.repeat_interleave(batch, 0).repeat_interleave(batch, 1)
        positive, left_out = positive & met, left_out | ~met
    if scores.shape[1] > rows:
        left_out = F.pad(left_out, (0, scores.shape[1] - rows))
    alone = left_out.all(-1)  # rows without a negative
    lse = _log_sum_exp(scores, left_out, alone)
    scores = scores[:, :rows]
    count = positive.sum(-1).to(scores.dtype)
    at_least_one = count.clamp_min(1)

    def mean(values):
        return torch.where(positive, values, 0).sum(-1) / at_least_one

    if call.numerator == Numerator.LOG_SUM:
        loss = lse - _log_sum_exp(scores, ~positive, count == 0) + at_least_one.log()
    elif call.inside == Positives.ITSELF:
        # A row without negatives has loss 0, or NaN if its score is infinite, as the log-sum-exp would give.
        loss = mean(torch.where(alone[:, None], scores, torch.logaddexp(lse[:, None], scores)) - scores)
    else:
        loss = lse - mean(scores)
        if call.inside == Positives.NONE:
            loss = loss.masked_fill(alone, 0)
    return torch.where(count > 0, loss, 0).view(num_views, batch)


def _log_sum_exp(scores, left_out, alone):
    """Return the log-sum-exp over the columns that are not left out. Rows without any (``alone``) keep all of them: the
    gradient of an empty sum would be NaN."""
    return scores.masked_fill(left_out & ~alone[:, None], -torch.inf).logsumexp(-1)
