"""Blockwise N-view InfoNCE in eager PyTorch: the ops ``info_nce_*.reference``.

Memory is linear in the rows: similarities exist for a chunk of rows at a time. Two small tables carry the objective
from the forward to the backward (and the same two in every implementation):

- ``logw[i, v]``: ``d loss_i / d S_ij = exp(logw[i, v] + S_ij)`` for every negative ``j`` of view ``v``;
- ``coef[i, v]``: ``d loss_i / d S_ip`` for the positive ``p`` of view ``v``. With labels, where an anchor has any
  number of positives, ``coef[i] = (den, lsep, 1 / count, n)``, from which ``_label_coefficients`` makes them.

So the backward does not know the objective: with ``G_ij = g_i exp(logw[i, v_j] + S_ij) + g_j exp(logw[j, v_i] + S_ij)``
the gradient is ``dz_i = scale * sum_j G_ij z_j`` plus the positives' part, and ``d/d scale`` falls out of its products
with the rows.

Over many processes each computes the tables and the gradient of its own samples, ``first .. first + count``, against
the rows of all; the rows of the others' tables arrive between forward and backward (``selfsup_kernels.distributed``).
"""

import math

import torch

from selfsup_kernels.objectives import OBJECTIVES, negative_views, positive_views

_CHUNK_ELEMENTS = 1 << 22
"""Scores held at a time: 16 MB in float32."""


def forward(
    views,
    labels,
    queue,
    temperature_tensor,
    temperature,
    objective,
    core_view,
    normalize,
    eps,
    reduction,
    first=0,
    count=-1,
):
    num_views, batch = len(views), views[0].shape[0]
    device = views[0].device
    acc = torch.float64 if views[0].dtype == torch.float64 else torch.float32
    name = OBJECTIVES[objective]
    with torch.autocast(device.type, enabled=False):
        scale = _scale(temperature_tensor, temperature, device)
        z, rnorm = _rows(torch.cat([v.to(acc) for v in views]), normalize, eps)
        zq = z.new_empty((0, z.shape[1])) if queue is None else _rows(queue.to(acc).contiguous(), normalize, eps)[0]
        own = _own_rows(num_views, batch, first, count, device)
        if labels is None:
            order = torch.empty(0, dtype=torch.int64, device=device)
            loss, logw, coef = _view_tables(z, zq, scale, num_views, name, core_view, own)
        else:
            order = torch.argsort(labels)
            loss, logw, coef = _label_tables(z, zq, scale, labels.repeat(num_views), name, own)
        logw, coef = (_at_rows(table, own, len(z)) for table in (logw, coef))
        loss = loss.to(acc)
        loss = loss.view(num_views, -1) if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()
    return loss, z, rnorm, logw, coef, zq, order


def backward(
    grad,
    z,
    rnorm,
    logw,
    coef,
    zq,
    order,
    labels,
    temperature_tensor,
    temperature,
    num_views,
    batch,
    dim,
    objective,
    core_view,
    normalize,
    reduction,
    need_temperature,
    dtype,
    first=0,
    count=-1,
):
    rows = num_views * batch
    count = batch if count < 0 else count
    name = OBJECTIVES[objective]
    with torch.autocast(z.device.type, enabled=False):
        scale = _scale(temperature_tensor, temperature, z.device)
        g = grad.double().expand(num_views, batch).reshape(rows)
        g = g / rows if reduction == 1 else g
        own = _own_rows(num_views, batch, first, count, z.device)
        in_batch = z.new_zeros(len(own), dim)
        from_queue = torch.zeros_like(in_batch)
        view = torch.arange(rows, device=z.device) // batch
        groups = None if labels is None else labels.repeat(num_views)
        for chunk in _chunks(len(own), rows + len(zq)):
            at = own[chunk]
            scores = scale.to(z.dtype) * (z[at] @ z.T)
            if groups is None:
                pair = _view_pair_gradient(scores, at, logw, g, view, num_views)
            else:
                pair = _label_pair_gradient(scores, at, logw, coef, g, groups, name)
            in_batch[chunk] = pair.to(z.dtype) @ z
            if len(zq):
                scores = scale.to(z.dtype) * (z[at] @ zq.T)
                pair = g[at, None] * (scores + logw[at, -1:]).exp()
                from_queue[chunk] = pair.to(z.dtype) @ zq
        if groups is None:
            samples = slice(first, first + count)
            zv = z.view(num_views, -1, dim)[:, samples]
            c = (g[:, None] * coef).view(num_views, -1, num_views)[:, samples]
            for v in range(num_views):
                both = c[:, :, v] + c[v].T
                in_batch += (both.unsqueeze(-1) * zv[v]).to(z.dtype).view(-1, dim)
        z, rnorm = z[own], rnorm[own]
        dz = scale.to(z.dtype) * (in_batch + from_queue)
        in_batch_part = (z.double() * in_batch.double()).sum(-1)
        queue_part = (z.double() * from_queue.double()).sum(-1)
        # Each in-batch score meets z twice (as row and as column), a queue score once.
        grad_scale = 0.5 * in_batch_part.sum() + queue_part.sum()
        grad_temperature = -scale * scale * grad_scale if need_temperature else torch.zeros_like(scale)
        if normalize:
            inside = (rnorm > 0).to(z.dtype)  # below the floor the norm is a constant: no projection
            along = (z * dz).sum(-1) * inside
            dz = (dz - z * along[:, None]) * rnorm.abs()[:, None]
            if dtype == torch.float16:  # dz / eps of a zero row is finite in float32 only
                limit = torch.finfo(dtype).max
                dz = torch.where((rnorm > 0)[:, None], dz, dz.clamp(-limit, limit))
    return dz.to(dtype).view(num_views, count, dim), grad_temperature


def _scale(temperature_tensor, temperature, device):
    """1 / temperature as a 0-dim float64 tensor; NaN where the temperature is not a positive number."""
    if temperature_tensor is None:
        return torch.full((), 1 / temperature, dtype=torch.float64, device=device)
    t = temperature_tensor.detach().double().reshape(()).to(device)
    return torch.where((t > 0) & t.isfinite(), 1 / t, torch.nan)


def _rows(h, normalize, eps):
    """Unit rows and 1 / max(|h|, eps), the latter negative where the floor was taken."""
    h = h.detach()
    if not normalize:
        return h.clone(), torch.ones_like(h[:, 0])
    norm = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float64)
    rnorm = torch.where(norm < eps, -1 / eps, 1 / norm)
    return (h * rnorm.abs()[:, None]).to(h.dtype), rnorm.to(h.dtype)


def _own_rows(num_views, batch, first, count, device):
    """The rows of samples first .. first + count, view by view."""
    count = batch if count < 0 else count
    row = torch.arange(num_views * batch, device=device)
    return row.view(num_views, batch)[:, first : first + count].reshape(-1)


def _at_rows(table, own, rows):
    """The table of all rows; NaN where a row is another process's, whose table has not come yet."""
    if len(own) == rows:
        return table
    return table.new_full((rows, table.shape[1]), torch.nan).index_copy_(0, own, table)


def _chunks(rows, columns):
    step = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _view_tables(z, zq, scale, num_views, name, core_view, own):
    """loss (R,), logw (R, V [+ 1]) and coef (R, V) of the rows ``own``, from N (negatives by view) and P (positives)"""
    rows = len(z)
    batch = rows // num_views
    sample = own % batch
    negatives = torch.empty(len(own), num_views + bool(len(zq)), dtype=torch.float64, device=z.device)
    for chunk in _chunks(len(own), rows + len(zq)):
        mine = z[own[chunk]]
        scores = (scale.to(z.dtype) * (mine @ z.T)).view(-1, num_views, batch)
        index = sample[chunk, None, None].expand(-1, num_views, 1)
        negatives[chunk, :num_views] = _logsumexp(scores.scatter_(2, index, -torch.inf))
        if len(zq):
            negatives[chunk, -1] = _logsumexp(scale.to(z.dtype) * (mine @ zq.T))
    zv = z[own].view(num_views, -1, z.shape[1])
    positives = torch.stack([(zv * zv[v]).sum(-1) for v in range(num_views)], -1).double() * scale
    tables = [
        _coefficients(name, u, core_view, num_views, negatives.view(*zv.shape[:2], -1)[u], positives[u])
        for u in range(num_views)
    ]
    return tuple(torch.cat(column) for column in zip(*tables, strict=True))


def _logsumexp(scores):
    """Over the last dimension, in float64 from the sum on: rounding the result to float32 at scores of 1 / temperature
    would make probabilities that do not sum to one, and the gradient of the temperature is a difference of scores."""
    largest = scores.amax(-1)
    largest = torch.where(largest.isinf(), 0, largest)
    return (scores - largest.unsqueeze(-1)).exp().sum(-1).double().log() + largest


def _coefficients(name, u, core_view, num_views, n, p):
    """One anchor view: loss (B,), logw (B, K), coef (B, V) from N (B, K) and P (B, V). The table of the objectives."""
    positive = positive_views(u, num_views, core_view)
    negative = negative_views(u, num_views, core_view, name)
    queue = list(range(num_views, n.shape[1]))
    count = len(positive)
    logw = torch.full_like(n, -torch.inf)
    coef = torch.zeros_like(p)
    pos = p[:, positive]
    if name in ("pairwise", "cross_view"):
        shared = queue + ([u] if name == "pairwise" else [])
        rest = torch.stack([n[:, [v, *shared]].logsumexp(-1) for v in positive], -1)
        each = -torch.logaddexp(rest, pos) - math.log(count)
        logw[:, positive] = each
        logw[:, shared] = each.logsumexp(-1, keepdim=True)
        coef[:, positive] = -torch.sigmoid(rest - pos) / count
        return _log_ratio(rest, pos).mean(-1), logw, coef
    used = negative + queue
    rest = n[:, used].logsumexp(-1, keepdim=True)
    if name == "per_positive":
        logw[:, used] = (-torch.logaddexp(rest, pos)).logsumexp(-1, keepdim=True) - math.log(count)
        coef[:, positive] = -torch.sigmoid(rest - pos) / count
        return _log_ratio(rest, pos).mean(-1), logw, coef
    if name == "decoupled":
        den = rest
        coef[:, positive] = -1 / count
        loss = den[:, 0] - pos.mean(-1)
    else:
        inside = pos.logsumexp(-1, keepdim=True)
        den = torch.logaddexp(rest, inside)
        if name == "supcon_out":
            coef[:, positive] = (pos - den).exp() - 1 / count
            loss = (den - pos).mean(-1)
        else:
            coef[:, positive] = (pos - den).exp() - (pos - inside).exp()
            loss = (den - inside)[:, 0] + math.log(count)
    logw[:, used] = torch.where(den == -torch.inf, -torch.inf, -den)
    return loss, logw, coef


def _log_ratio(rest, pos):
    """``logaddexp(rest, pos) - pos`` without cancellation; NaN, as that is, where the positive's score is infinite."""
    return torch.nn.functional.softplus(torch.where(pos < torch.inf, rest - pos, torch.nan), threshold=700)


def _label_tables(z, zq, scale, groups, name, own):
    """As ``_view_tables``, for labels: logw (R, 1 [+ 1]), coef (R, 4)."""
    loss = torch.empty(len(own), dtype=torch.float64, device=z.device)
    logw = torch.empty(len(own), 1 + bool(len(zq)), dtype=torch.float64, device=z.device)
    coef = torch.empty(len(own), 4, dtype=torch.float64, device=z.device)
    for chunk in _chunks(len(own), len(z) + len(zq)):
        mine = z[own[chunk]]
        scores = (scale.to(z.dtype) * (mine @ z.T)).double()
        positive, negative = _label_masks(groups, own[chunk])
        rest = scores.masked_fill(~negative, -torch.inf)
        if len(zq):
            rest = torch.cat([rest, (scale.to(z.dtype) * (mine @ zq.T)).double()], -1)
        n = rest.logsumexp(-1)
        count = positive.sum(-1).double()
        safe = count.clamp_min(1)
        lsep = scores.masked_fill(~positive, -torch.inf).logsumexp(-1)
        mean = scores.masked_fill(~positive, 0).sum(-1) / safe
        den = n if name == "decoupled" else torch.logaddexp(n, lsep)
        weight = torch.where(den == -torch.inf, -torch.inf, -den)
        if name == "per_positive":
            term = _log_ratio(n[:, None], scores)
            value = term.masked_fill(~positive, 0).sum(-1) / safe
            each = -torch.logaddexp(n[:, None], scores)
            weight = each.masked_fill(~positive, -torch.inf).logsumexp(-1) - safe.log()
            weight = torch.where(n == -torch.inf, -torch.inf, weight)
        elif name == "supcon_in":
            value = den - lsep + safe.log()
        else:
            value = den - mean
        # An anchor without positives counts as zero loss, and pushes nothing away.
        loss[chunk] = torch.where(count > 0, value, 0)
        logw[chunk] = torch.where(count > 0, weight, -torch.inf)[:, None]
        coef[chunk] = torch.stack([den, lsep, torch.where(count > 0, 1 / safe, 0), n], -1)
    return loss, logw, coef


def _label_masks(groups, at):
    """(positive, negative) masks of the rows ``at`` against all rows; a row is neither to itself."""
    same = groups[at, None] == groups[None, :]
    every = torch.arange(len(groups), device=groups.device)
    return same & (at[:, None] != every[None, :]), ~same


def _view_pair_gradient(scores, at, logw, g, view, num_views):
    """G of the rows ``at``: the anchors' own weights plus, G being symmetric, those of the columns as anchors."""
    rows = scores.shape[1]
    batch = rows // num_views
    as_anchor = logw[at, :num_views].repeat_interleave(batch, dim=1)
    as_column = logw[:, :num_views].T[view[at]]
    scores = scores.double()
    pair = g[at, None] * (scores + as_anchor).exp() + g * (scores + as_column).exp()
    index = torch.arange(rows, device=scores.device)
    return pair.masked_fill_(at[:, None] % batch == index % batch, 0)


def _label_pair_gradient(scores, at, logw, coef, g, groups, name):
    scores = scores.double()
    positive, negative = _label_masks(groups, at)
    apart = g[at, None] * (scores + logw[at, :1]).exp() + g * (scores + logw[:, 0]).exp()
    together = g[at, None] * _label_coefficients(name, scores, coef[at, None]) + g * _label_coefficients(
        name, scores, coef[None]
    )
    return apart.masked_fill(~negative, 0) + together.masked_fill(~positive, 0)


def _label_coefficients(name, score, coef):
    """d loss_i / d S_ip for a positive p of anchor i, from the anchor's (den, lsep, 1 / count, n)."""
    den, lsep, share, n = coef.unbind(-1)
    if name == "supcon_out":
        return (score - den).exp() - share
    if name == "supcon_in":
        return (score - den).exp() - (score - lsep).exp()
    if name == "per_positive":
        return -share * torch.sigmoid(n - score)
    return -share.expand_as(score)
