"""The losses as their papers state them: dense, eager, differentiable by autograd, any floating dtype.

This is the specification that every implementation is tested against. It materialises the M x M matrix of
similarities, one view pair at a time, so it is for understanding and for tests. ``impl="reference"`` of the public
functions is the fast form in eager PyTorch, in ``reference.eager`` and ``reference.info_nce``.
"""

import math

import torch
import torch.nn.functional as F

from selfsup_kernels.info_nce.objectives import TABLE, negative_views, positive_views


def info_nce_loss(
    views,
    *,
    temperature=0.1,
    objective="supcon_out",
    labels=None,
    queue=None,
    core_view=None,
    normalize=True,
    eps=1e-12,
    reduction="mean",
):
    r"""N-view InfoNCE, dense. The arguments are those of :func:`selfsup_kernels.info_nce_loss`.

    With unit rows ``z`` and ``S_ij = <z_i, z_j> / temperature``, for an anchor with negatives ``n`` and positives ``p``

    - ``supcon_out``:   ``LSE(S_n, S_p) - mean S_p``                  (arXiv:2004.11362, eq. 2)
    - ``supcon_in``:    ``LSE(S_n, S_p) - LSE(S_p) + log |p|``        (arXiv:2004.11362, eq. 3)
    - ``per_positive``: ``mean over p of LSE(S_n, S_p) - S_p``
    - ``decoupled``:    ``LSE(S_n) - mean S_p``                       (arXiv:2110.06848)

    and, where the negatives ``n_v`` of one view are told apart, ``u`` being the anchor's own view,

    - ``pairwise``:     ``mean over v of LSE(S_(n_u), S_(n_v), S_(p_v)) - S_(p_v)``   (arXiv:2002.05709, each two views)
    - ``cross_view``:   ``mean over v of LSE(S_(n_v), S_(p_v)) - S_(p_v)``            (arXiv:1906.05849, full graph)
    """
    h = torch.stack(tuple(views))
    num_views, batch, _ = h.shape
    core = -1 if core_view is None else core_view
    z = F.normalize(h, dim=-1, eps=eps) if normalize else h
    scores = torch.einsum("uad,vbd->uavb", z, z) / temperature
    if queue is not None:
        queue = F.normalize(queue, dim=-1, eps=eps) if normalize else queue
        queue_scores = torch.einsum("uad,kd->uak", z, queue.detach()) / temperature
    sample = torch.arange(batch, device=h.device)
    group = sample if labels is None else labels
    same = group[:, None] == group[None, :]

    losses = []
    for u in range(num_views):
        # Row a of `negatives[v]` and `positives[v]` holds anchor (u, a)'s scores with view v, -inf where not one.
        negatives, positives, is_positive = {}, {}, {}
        for v in negative_views(u, num_views, core, TABLE[objective].columns):
            negatives[v] = scores[u, :, v].masked_fill(same, -torch.inf)
        for v in positive_views(u, num_views, core) if labels is None else range(num_views):
            own = (sample[:, None] == sample[None, :]) if v == u else torch.zeros_like(same)
            is_positive[v] = same & ~own
            positives[v] = scores[u, :, v].masked_fill(~is_positive[v], -torch.inf)
        extra = [] if queue is None else [queue_scores[u]]
        losses.append(_anchor_losses(objective, u, negatives, positives, is_positive, extra))
    loss = torch.stack(losses)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _anchor_losses(objective, u, negatives, positives, is_positive, queue):
    """Per-anchor loss (B,) from the scores of one anchor view, by view of the other side; -inf marks an absent pair."""
    if objective in ("pairwise", "cross_view"):
        terms = []
        for v, score in positives.items():
            columns = [negatives[v], *([negatives[u]] if objective == "pairwise" else []), *queue, score]
            terms.append(torch.cat(columns, -1).logsumexp(-1) - score.diagonal())
        return torch.stack(terms).mean(0)

    negative = torch.cat([*negatives.values(), *queue], -1)
    positive = torch.cat(list(positives.values()), -1)
    is_positive = torch.cat(list(is_positive.values()), -1)
    count = is_positive.sum(-1).to(positive.dtype)
    mean = positive.masked_fill(~is_positive, 0).sum(-1) / count.clamp_min(1)
    if objective == "supcon_out":
        loss = torch.cat([negative, positive], -1).logsumexp(-1) - mean
    elif objective == "supcon_in":
        # An anchor without positives (count 0) is replaced below; its -inf must not reach the gradient.
        inside = torch.where((count > 0)[:, None], positive, 0).logsumexp(-1) - count.clamp_min(1).log()
        loss = torch.cat([negative, positive], -1).logsumexp(-1) - inside
    elif objective == "decoupled":
        loss = negative.logsumexp(-1) - mean
    else:
        score = positive.masked_fill(~is_positive, 0)
        term = torch.logaddexp(negative.logsumexp(-1, keepdim=True), score) - score
        loss = term.masked_fill(~is_positive, 0).sum(-1) / count.clamp_min(1)
    return torch.where(count > 0, loss, 0)


def byol_loss(predictions, targets, *, eps=1e-12, reduction="mean"):
    r"""BYOL's regression loss, dense (arXiv:2006.07733, eq. 2): ``2 - 2 cos(p, t)``.

    ``(B, D)`` pairs give one value a row. Over V views, anchor ``(u, a)`` has the mean of
    ``2 - 2 cos(p_(u,a), t_(v,a))`` over the other views ``v != u``.
    """
    pairs = isinstance(predictions, torch.Tensor) and predictions.dim() == 2
    p = (predictions if isinstance(predictions, torch.Tensor) else torch.stack(tuple(predictions))).reshape(
        -1, *predictions[0].shape[-2 if not pairs else -1 :]
    )
    t = (targets if isinstance(targets, torch.Tensor) else torch.stack(tuple(targets))).reshape(p.shape).detach()
    p, t = F.normalize(p, dim=-1, eps=eps), F.normalize(t, dim=-1, eps=eps)
    if pairs:
        loss = 2 - 2 * (p * t).sum(-1)
    else:
        others = [[v for v in range(len(p)) if v != u] for u in range(len(p))]
        loss = torch.stack(
            [torch.stack([2 - 2 * (p[u] * t[v]).sum(-1) for v in others[u]]).mean(0) for u in range(len(p))]
        )
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def ema_update_(targets, sources, momentum):
    """``t <- momentum * t + (1 - momentum) * s``, tensor by tensor, in float32 at least (arXiv:2006.07733, eq. 1)."""
    with torch.no_grad():
        for t, s in zip(targets, sources, strict=True):
            if not t.is_floating_point():
                t.copy_(s)
                continue
            wide = torch.float64 if t.dtype == torch.float64 else torch.float32
            # 0 times an infinity would be NaN: with a weight of 0 it does not count.
            terms = [
                weight * (x if weight else x.nan_to_num(math.nan, 0.0, 0.0))
                for weight, x in ((float(momentum), t.to(wide)), (float(1 - momentum), s.to(wide)))
            ]
            t.copy_(terms[0] + terms[1])
