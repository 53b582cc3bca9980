"""The losses as their papers state them: dense, eager, differentiable by autograd, any floating dtype.

Every implementation is tested against this specification. It materialises the M x M matrix of similarities, so use it
only for understanding and tests. ``impl="reference"`` of the public functions is the fast form in eager PyTorch, in
``core.eager`` and the ``reference`` module of each loss.
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
    duplicates=None,
    logq=None,
    queue=None,
    core_view=None,
    normalize=True,
    eps=1e-12,
    reduction="mean",
):
    r"""N-view InfoNCE, dense. The arguments are those of :func:`selfsup_kernels.info_nce_loss`.

    For an anchor with negatives ``n`` and positives ``p``, unit rows ``z`` and ``S_ij = <z_i, z_j> / temperature``:

    - ``supcon_out``:   ``LSE(S_n, S_p) - mean S_p``                  (arXiv:2004.11362, eq. 2)
    - ``supcon_in``:    ``LSE(S_n, S_p) - LSE(S_p) + log |p|``        (arXiv:2004.11362, eq. 3)
    - ``per_positive``: ``mean over p of LSE(S_n, S_p) - S_p``
    - ``decoupled``:    ``LSE(S_n) - mean S_p``                       (arXiv:2110.06848)

    With ``n_v`` the negatives of view ``v`` and ``u`` the anchor's own view:

    - ``pairwise``:     ``mean over v of LSE(S_(n_u), S_(n_v), S_(p_v)) - S_(p_v)``   (arXiv:2002.05709, per view pair)
    - ``cross_view``:   ``mean over v of LSE(S_(n_v), S_(p_v)) - S_(p_v)``            (arXiv:1906.05849, full graph)

    With ``labels`` an anchor has several positives in a view, and ``cross_view`` is the mean over ``v`` of
    ``LSE(S_(n_v), S_(p_v)) - mean S_(p_v)`` (UniCL, arXiv:2204.03610, eq. 2 to 4). ``duplicates`` (B,): the negatives
    are the rows of samples with another id. ``logq`` (B,) or (V, B): ``S_ij = <z_i, z_j> / temperature - logq_j``.
    ``decoupled`` is 0 for an anchor without negatives.
    """
    h = torch.stack(tuple(views))
    num_views, batch, _ = h.shape
    core = -1 if core_view is None else core_view
    z = F.normalize(h, dim=-1, eps=eps) if normalize else h
    scores = torch.einsum("uad,vbd->uavb", z, z) / temperature
    if logq is not None:
        scores = scores - logq.detach().expand(num_views, batch)
    if queue is not None:
        queue = F.normalize(queue, dim=-1, eps=eps) if normalize else queue
        queue_scores = torch.einsum("uad,kd->uak", z, queue.detach()) / temperature
    sample = torch.arange(batch, device=h.device)
    group = labels if labels is not None else duplicates if duplicates is not None else sample
    same = group[:, None] == group[None, :]
    together = same if labels is not None else sample[:, None] == sample[None, :]

    losses = []
    for u in range(num_views):
        # Row a of `negatives[v]` and `positives[v]` holds the scores of anchor (u, a) with view v, -inf elsewhere.
        negatives, positives, is_positive = {}, {}, {}
        for v in negative_views(u, num_views, core, TABLE[objective].columns):
            negatives[v] = scores[u, :, v].masked_fill(same, -torch.inf)
        own_too = labels is not None and objective != "cross_view"
        for v in range(num_views) if own_too else positive_views(u, num_views, core):
            own = (sample[:, None] == sample[None, :]) if v == u else torch.zeros_like(same)
            is_positive[v] = together & ~own
            positives[v] = scores[u, :, v].masked_fill(~is_positive[v], -torch.inf)
        extra = [] if queue is None else [queue_scores[u]]
        losses.append(_anchor_losses(objective, u, negatives, positives, is_positive, extra))
    loss = torch.stack(losses)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _anchor_losses(objective, u, negatives, positives, is_positive, queue):
    """Return the losses (B,) of one anchor view from its scores, keyed by the other view; -inf marks an absent pair."""
    if objective in ("pairwise", "cross_view"):
        terms = []
        for v, score in positives.items():
            columns = [negatives[v], *([negatives[u]] if objective == "pairwise" else []), *queue, score]
            mean = score.masked_fill(~is_positive[v], 0).sum(-1) / is_positive[v].sum(-1)
            terms.append(torch.cat(columns, -1).logsumexp(-1) - mean)
        return torch.stack(terms).mean(0)

    negative = torch.cat([*negatives.values(), *queue], -1)
    positive = torch.cat(list(positives.values()), -1)
    is_positive = torch.cat(list(is_positive.values()), -1)
    count = is_positive.sum(-1).to(positive.dtype)
    mean = positive.masked_fill(~is_positive, 0).sum(-1) / count.clamp_min(1)
    if objective == "supcon_out":
        loss = torch.cat([negative, positive], -1).logsumexp(-1) - mean
    elif objective == "supcon_in":
        # The loss of an anchor without positives (count 0) is set to 0 below; its -inf must not reach the gradient.
        inside = torch.where((count > 0)[:, None], positive, 0).logsumexp(-1) - count.clamp_min(1).log()
        loss = torch.cat([negative, positive], -1).logsumexp(-1) - inside
    elif objective == "decoupled":
        alone = (negative == -torch.inf).all(-1)
        loss = torch.where(alone, 0, negative.masked_fill(alone[:, None], 0).logsumexp(-1) - mean)
    else:
        score = positive.masked_fill(~is_positive, 0)
        term = torch.logaddexp(negative.logsumexp(-1, keepdim=True), score) - score
        loss = term.masked_fill(~is_positive, 0).sum(-1) / count.clamp_min(1)
    return torch.where(count > 0, loss, 0)


def siglip_loss(x, y, *, scale=10.0, bias=-10.0, duplicates=None, normalize=True, eps=1e-12, reduction="mean"):
    r"""The pairwise sigmoid loss, dense (arXiv:2303.15343, section 3.2).

    ``-mean_i sum_j log sigmoid(y_ij (scale <x_i, y_j> + bias))`` with ``y_ij = 1`` for ``i = j``, else -1. Pairs of two
    samples that share an element of ``duplicates`` (B,) do not count.
    """
    if normalize:
        x, y = F.normalize(x, dim=-1, eps=eps), F.normalize(y, dim=-1, eps=eps)
    pair = torch.eye(len(x), dtype=torch.bool, device=x.device)
    scores = scale * (x @ y.T) + bias
    losses = -F.logsigmoid(torch.where(pair, scores, -scores))
    if duplicates is not None:
        losses = losses.masked_fill((duplicates[:, None] == duplicates[None, :]) & ~pair, 0)
    loss = losses.sum(1)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def byol_loss(predictions, targets, *, eps=1e-12, reduction="mean"):
    r"""BYOL's regression loss, dense (arXiv:2006.07733, eq. 2): ``2 - 2 cos(p, t)``.

    ``(B, D)`` pairs give one value per row. For V views the loss of anchor ``(u, a)`` is the mean of
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
    """Set ``t <- momentum * t + (1 - momentum) * s`` per tensor, in float32 or float64 (arXiv:2006.07733, eq. 1)."""
    with torch.no_grad():
        for t, s in zip(targets, sources, strict=True):
            if not t.is_floating_point():
                t.copy_(s)
                continue
            wide = torch.float64 if t.dtype == torch.float64 else torch.float32
            # An infinity with weight 0 counts as 0: the product would be NaN.
            terms = [
                weight * (x if weight else x.nan_to_num(math.nan, 0.0, 0.0))
                for weight, x in ((float(momentum), t.to(wide)), (float(1 - momentum), s.to(wide)))
            ]
            t.copy_(terms[0] + terms[1])
