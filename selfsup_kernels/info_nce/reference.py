"""N-view InfoNCE in eager PyTorch: the ops ``info_nce_*.reference``.

Scores exist for a few samples at a time (``_BLOCK_BYTES``), so that memory is linear in the rows, and the backward
computes them again. Two small tables carry the objective from the forward to the backward (and the same two in every
implementation):

- ``logw[i, v]``: ``d loss_i / d S_ij = exp(logw[i, v] + S_ij)`` for every negative ``j`` of view ``v``;
- ``coef[i, v]``: ``d loss_i / d S_ip`` for the positive ``p`` of view ``v``. With labels, where an anchor has any
  number of positives, ``coef[i] = (den, lsep, 1 / count, n)``, from which ``_label_pairs`` makes them.

So the backward does not know the objective: with ``G_ij = g_i exp(logw[i, v_j] + S_ij) + g_j exp(logw[j, v_i] + S_ij)``
the gradient is ``dz_i = scale * sum_j G_ij z_j`` plus the positives' part, and ``d/d scale`` falls out of its products
with the rows.

Over many processes each computes the tables and the gradient of its own samples, ``first .. first + count``, against
the rows of all; the rows of the others' tables arrive between forward and backward (``exchange.py``).

Shapes: V views, W of them compared with an anchor, B samples, n of them in a block, D features, K rows of the queue;
rows are ordered view by view.
"""

import torch

from selfsup_kernels.core.eager import scale_of, through_the_norm
from selfsup_kernels.info_nce.objectives import OBJECTIVES, negative_views, positive_views

_BLOCK_BYTES = 1 << 22
"""Scores held at a time, with up to three copies of them: so many that the work of a block dwarfs the overhead of
its dozen of calls, so few that they stay in the processor's cache. Larger blocks are slower as well as larger."""


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
    samples = range(first, batch if count < 0 else first + count)
    with torch.autocast(device.type, enabled=False):
        scale = scale_of(temperature_tensor, temperature, device)
        z, rnorm = _rows(torch.cat([v.to(acc) for v in views]), normalize, eps)
        zq = z.new_empty((0, z.shape[1])) if queue is None else _rows(queue.to(acc).contiguous(), normalize, eps)[0]
        met = _met(num_views, name, device)
        columns = _columns(z, met, num_views)
        blocks = _blocks(z, zq, columns, scale, num_views, samples)
        if labels is None:
            order = torch.empty(0, dtype=torch.int64, device=device)
            loss, logw, coef = _view_tables(blocks, met, num_views, len(zq) > 0, name, core_view)
        else:
            order = torch.argsort(labels)
            loss, logw, coef = _label_tables(blocks, num_views, labels, name)
        logw, coef = (_of_all_rows(table, samples, batch) for table in (logw, coef))
        loss = loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()
    return loss.to(acc), z, rnorm, logw, coef, zq, order


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
    rows, name = num_views * batch, OBJECTIVES[objective]
    samples = range(first, batch if count < 0 else first + count)
    with torch.autocast(z.device.type, enabled=False):
        scale = scale_of(temperature_tensor, temperature, z.device)
        g = grad.double() / rows if reduction == 1 else grad.double()
        g = g.expand(num_views, batch)
        logw = logw.view(num_views, batch, -1)
        coef = coef.view(num_views, batch, -1)
        anchors = _exponents(logw, g.unsqueeze(-1), z.dtype)
        met = _met(num_views, name, z.device)
        columns = _columns(z, met, num_views)
        if labels is None:
            by_view = [t[..., :num_views] for t in anchors]
            # By (view of the row, view of the column, sample): the columns as anchors, and the positives' coefficients.
            as_columns = [_pick(t.permute(2, 0, 1), met, 1).unsqueeze(1).contiguous() for t in by_view]
            by_view = [_pick(t, met, 2).unsqueeze(-1) for t in by_view]
            positives = (g.unsqueeze(-1) * coef).transpose(1, 2)
            positives = _pick((positives + positives.transpose(0, 1)).to(z.dtype), met, 1)
        in_batch, from_queue = [], []
        for block, scores, queue_scores in _blocks(z, zq, columns, scale, num_views, samples):
            if labels is None:
                pairs = _weighted(scores, *(t[:, block] for t in by_view))
                pairs += _weighted(scores, *as_columns)
                _same_sample(pairs, block).copy_(positives[..., block])
            else:
                pairs = _label_pairs(scores, block, logw, coef, g, labels, name)
            in_batch.append(_product(pairs.flatten(2), columns))
            if queue_scores is not None:
                pairs = _weighted(queue_scores, *(t[:, block, -1:] for t in anchors))
                from_queue.append(_product(pairs, zq))
        in_batch = _join(in_batch)
        own = slice(samples.start, samples.stop)
        z, rnorm = z.view(num_views, batch, dim)[:, own], rnorm.view(num_views, batch, 1)[:, own]
        dz = in_batch
        if from_queue:
            from_queue = _join(from_queue)
            dz = in_batch + from_queue
        grad_temperature = torch.zeros_like(scale)
        if need_temperature:
            # Each score of the batch meets z twice (as row and as column), a queue score once.
            grad_scale = 0.5 * (z.double() * in_batch).sum()
            grad_scale = grad_scale + (z.double() * from_queue).sum() if len(zq) else grad_scale
            grad_temperature = -scale * scale * grad_scale
        dz = dz * scale.to(dz.dtype)
        if normalize:
            dz = through_the_norm(dz, z, rnorm, dtype)
    return dz.to(dtype), grad_temperature


def _rows(h, normalize, eps):
    """Unit rows and 1 / max(|h|, eps), the latter negative where the floor was taken."""
    h = h.detach()
    if not normalize:
        return h.clone(), torch.ones_like(h[:, 0])
    norm = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float64)
    rnorm = torch.where(norm < eps, -1 / eps, 1 / norm)
    return (h * rnorm.abs()[:, None]).to(h.dtype), rnorm.to(h.dtype)


def _met(num_views, name, device):
    """(V, W): the views that an anchor of each view is compared with; None where that is all of them."""
    if name != "cross_view":
        return None
    return torch.tensor([[v for v in range(num_views) if v != u] for u in range(num_views)], device=device)


def _pick(table, met, dim):
    """Of a table (V, ...) with one entry for each view along ``dim``: those of the views that are met."""
    if met is None:
        return table
    shape = [len(met) if d == 0 else met.shape[1] if d == dim else 1 for d in range(table.dim())]
    return torch.take_along_dim(table, met.view(shape), dim)


def _columns(z, met, num_views):
    """The rows that anchors are compared with, W B of them: for all views the same, or (V, W B, D)."""
    return z if met is None else z.view(num_views, -1, z.shape[1])[met].flatten(1, 2)


def _blocks(z, zq, columns, scale, num_views, samples):
    """By blocks of ``samples``: their slice, the scores of their rows with the columns (V, n, W, B) and, or None, with
    the queue (V, n, K)."""
    batch, width = len(z) // num_views, columns.shape[-2]
    # Both factors take the square root of the scale, so that S_ij and S_ji are one number: exp() of long rows' scores
    # turns a rounding of one of them into a wrong weight.
    root = scale.sqrt().to(z.dtype)
    scaled, columns, zq = (z * root).view(num_views, batch, -1), columns * root, zq * root
    step = max(1, _BLOCK_BYTES // (z.element_size() * num_views * (width + len(zq))))
    for start in range(samples.start, samples.stop, step):
        block = slice(start, min(start + step, samples.stop))
        rows = scaled[:, block]
        scores = _product(rows, columns.mT).unflatten(-1, (-1, batch))
        yield block, scores, _product(rows, zq.T) if len(zq) else None


def _product(rows, matrix):
    """(V, n, x) times one (x, y) or one for each view: (V, n, y)."""
    return rows @ matrix if matrix.dim() == 3 else (rows.flatten(0, 1) @ matrix).unflatten(0, rows.shape[:2])


def _same_sample(pairs, block):
    """The part of (V, n, W, B) that pairs rows of one sample, as a view (V, W, n)."""
    return pairs[..., block].diagonal(0, 1, 3)


def _self(pairs, block):
    """The part of (V, n, W, B) that pairs each row with itself, as a view (n, V)."""
    return _same_sample(pairs, block).diagonal(0, 0, 1)


def _join(blocks):
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _of_all_rows(table, samples, batch):
    """The table (V, n, columns) as (V B, columns); NaN in other processes' rows, which have not come yet."""
    if len(samples) < batch:
        own, table = table, table.new_full((len(table), batch, table.shape[-1]), torch.nan)
        table[:, samples.start : samples.stop] = own
    return table.reshape(-1, table.shape[-1]).contiguous()


def _view_tables(blocks, met, num_views, has_queue, name, core_view):
    """loss (V, n), logw (V, n, V [+ 1]) and coef (V, n, V)."""

    def of_all_views(table, otherwise):
        if met is None:
            return table
        index = met.unsqueeze(1).expand(-1, table.shape[1], -1)
        return table.new_full((*table.shape[:2], num_views), otherwise).scatter_(2, index, table)

    negatives, positives = [], []
    for block, scores, queue_scores in blocks:
        same = _same_sample(scores, block)
        positives.append(of_all_views(same.transpose(1, 2).to(torch.float64, copy=True), 0))
        same.fill_(-torch.inf)
        sums = [of_all_views(_logsumexp_(scores), -torch.inf)]
        if has_queue:
            sums.append(_logsumexp_(queue_scores).unsqueeze(-1))
        negatives.append(torch.cat(sums, -1) if has_queue else sums[0])
    return _coefficients(name, core_view, num_views, _join(negatives), _join(positives))


def _logsumexp_(scores):
    """Over the last dimension, overwriting it; in float64 from the sum on: rounding the result to float32 at scores of
    1 / temperature would make probabilities that do not sum to one, and the gradient of the temperature is a difference
    of scores."""
    largest = scores.amax(-1, keepdim=True)
    largest = torch.where(largest.isinf(), 0, largest)
    return scores.sub_(largest).exp_().sum(-1).double().log_().add_(largest.squeeze(-1))


def _coefficients(name, core_view, num_views, n, p):
    """loss (V, B), logw (V, B, K), coef (V, B, V) from the log-sum-exp of the negatives by view (and of the queue), n
    (V, B, K), and the positives' scores p (V, B, V). The table of the objectives."""
    device, every = n.device, range(num_views)
    met = [positive_views(u, num_views, core_view) for u in every]
    share = torch.tensor([[[(v in met[u]) / len(met[u]) for v in every]] for u in every], dtype=n.dtype, device=device)
    positive = share > 0
    used = [negative_views(u, num_views, core_view, name) for u in every]
    extra = range(num_views, n.shape[-1])  # the queue's column
    negative = torch.tensor([[[v in used[u] or v in extra for v in range(n.shape[-1])]] for u in every], device=device)

    def mean(values):
        return torch.where(positive, share * values, 0).sum(-1)

    rest = torch.where(negative, n, -torch.inf).logsumexp(-1, keepdim=True)
    if name in ("pairwise", "cross_view"):
        own = n.diagonal(0, 0, 2).T.unsqueeze(-1)  # of the anchor's view
        rest = n[..., :num_views]
        for shared in ([own] if name == "pairwise" else []) + [n[..., extra.start :]] * len(extra):
            rest = torch.logaddexp(rest, shared)
    if name in ("pairwise", "cross_view", "per_positive"):
        each = torch.where(positive, share.log() - torch.logaddexp(rest, p), -torch.inf)
        total = each.logsumexp(-1, keepdim=True)
        if name == "per_positive":
            logw = torch.where(negative, total, -torch.inf)
        else:
            logw = torch.cat([each, *[total] * len(extra)], -1)
            if name == "pairwise":
                logw.diagonal(0, 0, 2).copy_(total.squeeze(-1).T)
        return mean(_log_ratio(rest, p)), logw, torch.where(positive, -share * torch.sigmoid(rest - p), 0)
    if name == "decoupled":
        den, loss, coef = rest, rest.squeeze(-1) - mean(p), -share.expand_as(p)
    else:
        lsep = torch.where(positive, p, -torch.inf).logsumexp(-1, keepdim=True)
        den = torch.logaddexp(rest, lsep)
        if name == "supcon_out":
            loss, coef = den.squeeze(-1) - mean(p), (p - den).exp() - share
        else:
            loss, coef = (den - lsep).squeeze(-1) - share.amax(-1).log(), (p - den).exp() - (p - lsep).exp()
        coef = torch.where(positive, coef, 0)
    return loss, torch.where(negative & (den > -torch.inf), -den, -torch.inf), coef


def _log_ratio(rest, pos):
    """``logaddexp(rest, pos) - pos`` without cancellation; NaN, as that is, where the positive's score is infinite."""
    return torch.nn.functional.softplus(torch.where(pos < torch.inf, rest - pos, torch.nan), threshold=80)


def _label_tables(blocks, num_views, labels, name):
    """As ``_view_tables``, for labels: loss (V, n), logw (V, n, 1 [+ 1]), coef (V, n, 4)."""
    tables = []
    for block, scores, queue_scores in blocks:
        same = _same_label(labels, block, num_views)
        flat = scores.flatten(2)

        def of_positives(values, otherwise, same=same, block=block, shape=scores.shape):
            values = values.masked_fill(~same, otherwise)
            _self(values.view(shape), block).fill_(otherwise)
            return values

        count = same.sum(-1).double() - 1
        safe = count.clamp_min(1)
        n = _logsumexp_(flat.masked_fill(same, -torch.inf))
        if queue_scores is not None:
            n = torch.logaddexp(n, _logsumexp_(queue_scores))
        den = lsep = n
        if name in ("supcon_out", "supcon_in"):
            lsep = _logsumexp_(of_positives(flat, -torch.inf))
            den = torch.logaddexp(n, lsep)
        logw = -den
        if name == "per_positive":
            rest = n.unsqueeze(-1)
            ratio = torch.where(rest.isinf(), rest.to(flat.dtype) - flat, _minus(rest, flat))
            logw = of_positives(ratio.sigmoid(), 0).sum(-1).double().log() - n - safe.log()
            ratio = torch.where(flat < torch.inf, ratio, torch.nan)  # as in _log_ratio
            loss = of_positives(torch.nn.functional.softplus(ratio, threshold=80), 0).sum(-1).double() / safe
        elif name == "supcon_in":
            loss = den - lsep + safe.log()
        else:
            loss = den - of_positives(flat, 0).sum(-1).double() / safe
        # An anchor without positives counts as zero loss, and pushes nothing away.
        loss = torch.where(count > 0, loss, 0)
        logw = torch.where((count > 0) & (den > -torch.inf), logw, -torch.inf)
        share = torch.where(count > 0, 1 / safe, 0).expand_as(n)
        logw = logw.unsqueeze(-1).expand(-1, -1, 1 + (queue_scores is not None))
        tables.append((loss, logw, torch.stack([den, lsep, share, n], -1)))
    return tuple(map(_join, zip(*tables, strict=True)))


def _same_label(labels, block, num_views):
    """Whether a sample of the block and a row have the same label: (n, V B)."""
    return (labels[block, None] == labels).repeat(1, num_views)


def _label_pairs(scores, block, logw, coef, g, labels, name):
    """G (V, n, W, B) of the rows of a block; with labels the view of a negative does not matter."""
    same = _same_label(labels, block, len(logw))
    tables = (logw[..., 0], g, *coef.unbind(-1))
    as_anchors = _label_anchors(scores.flatten(2), same, *(t[:, block, None] for t in tables), name)
    as_columns = _label_anchors(scores.flatten(2), same, *(t.reshape(1, 1, -1) for t in tables), name)
    pairs = as_anchors.add_(as_columns).view(scores.shape)
    _self(pairs, block).fill_(0)
    return pairs


def _label_anchors(scores, same, logw, g, den, lsep, share, n, name):
    """``g d loss / d S`` of the anchors whose tables are given."""
    apart = _weighted(scores, *_exponents(logw, g, scores.dtype))
    together = (-g * share).to(scores.dtype)
    if name == "supcon_out":
        together = apart + together
    elif name == "supcon_in":  # exp(S - den) - exp(S - lsep)
        together = _weighted(scores, *_exponents(-lsep, g * torch.expm1(lsep - den), scores.dtype))
    elif name == "per_positive":
        together = _minus(n, scores).sigmoid_().mul_(together)
    return torch.where(same, together, apart)


def _weighted(scores, high, factor):
    """``factor exp(high + scores)``, with tables of ``_exponents``."""
    return (scores + high).exp_().mul_(factor)


def _exponents(logw, g, dtype):
    """``g exp(logw)`` as ``factor exp(high)``, see :func:`_weighted`."""
    high, low = _split(logw, dtype)
    return high, (g * low.exp()).to(dtype)


def _minus(n, scores):
    high, low = _split(n, scores.dtype)
    return (high - scores).add_(low.to(scores.dtype))


def _split(x, dtype):
    """Float64 numbers as ``high``, what ``dtype`` can hold of them, and the rest. At -100, rounding to float32 alone
    would move all of an anchor's probabilities by up to 4e-6 of them, and the gradient of the temperature is a
    difference of scores."""
    x = x.clamp(min=-(2.0**100))  # in place of -inf, whose difference with itself is NaN
    high = x.to(dtype)
    return high, x - high
