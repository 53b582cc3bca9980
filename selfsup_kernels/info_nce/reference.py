"""N-view InfoNCE in eager PyTorch, ``impl="reference"``: the ops ``info_nce_*.reference``. Calls with few scores go to
:mod:`selfsup_kernels.info_nce.few_scores`.

Scores exist for a few samples at a time (``_BLOCK_BYTES``), so that memory is linear in the rows, and the backward
computes them again. Two small tables carry the objective from the forward to the backward, ``log_weights`` and
``positives`` of :class:`selfsup_kernels.info_nce.call.Saved`. So the backward does not know the objective: with
``G_ij = g_i exp(log_weights[v_j, i] + S_ij) + g_j exp(log_weights[v_i, j] + S_ij)`` the gradient is
``dz_i = scale * sum_j G_ij z_j`` plus the positives' part, and ``d/d scale`` follows from its products with the rows.

With several processes each computes the tables and the gradient of its own samples, ``first .. first + count``,
against the rows of all; ``exchange.py`` gathers the tables of all samples between forward and backward.

Shapes: V views, W of them compared with an anchor, B samples, n of them in a block, D features, K rows of the queue, C
columns of negatives, P of positives; rows are ordered view by view.
"""

import torch

from selfsup_kernels.core.eager import scale_of, through_the_norm, unit_rows
from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype
from selfsup_kernels.info_nce.call import SCALE, Call, Saved, unpack_backward
from selfsup_kernels.info_nce.exponentials import exponents, log_sum_exp_, minus, weighted
from selfsup_kernels.info_nce.objectives import Columns, Ids, Numerator, Positives, negative_views, positive_views

_BLOCK_BYTES = 1 << 22
"""Bytes of scores per block; up to three copies exist at a time. Smaller blocks pay more for calls of operators, larger
ones leave the cache."""


def forward(views, ids, logq, queue, temperature_tensor, *call):
    call = Call(*call)
    device = views[0].device
    acc = accumulation_dtype(views[0].dtype)
    samples = range(call.first, call.first + call.own)
    with torch.autocast(device.type, enabled=False):
        scale = scale_of(temperature_tensor, call.temperature, device)
        rows, inverse_norms = unit_rows(torch.cat([v.to(acc) for v in views]), call.normalize, call.eps)
        if queue is not None:
            both = unit_rows(queue.to(acc), call.normalize, call.eps)
            rows, inverse_norms = (torch.cat(pair) for pair in zip((rows, inverse_norms), both, strict=True))
        blocks = _less_logq(_blocks(rows, scale, call, samples), _as_columns(logq, _met(call, device)))
        tables = _label_tables(blocks, call, ids) if call.labelled else _view_tables(blocks, call, device, ids)
        loss, *tables = tables
        log_weights, positives = (_of_all_rows(table, samples, call.batch) for table in tables)
        reduction = REDUCTIONS[call.reduction]
        loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
        scalars = scale.new_zeros(4)
        scalars[SCALE] = scale
    new = log_weights.new_empty
    return loss.to(acc), *Saved(
        rows,
        inverse_norms,
        log_weights,
        new((0, log_weights.shape[1])),
        positives,
        scalars,
        new(0, dtype=torch.int64),
        new((2, 0), dtype=torch.int32),
        rows.new_empty(0) if logq is None else logq.flatten().to(acc, copy=True),
    )


def backward(grad, *arguments):
    saved, ids, call, (need_temperature, dtype) = unpack_backward(arguments)
    num_views, batch, dim = call.num_views, call.batch, call.dim
    samples = range(call.first, call.first + call.own)
    z = saved.rows[: num_views * batch]
    zq = saved.rows[num_views * batch :]
    with torch.autocast(z.device.type, enabled=False):
        scale = saved.scalars[SCALE]
        g = grad.double() / (num_views * batch) if REDUCTIONS[call.reduction] == "mean" else grad.double()
        g = g.expand(num_views, batch)
        log_weights, positives = (
            table.view(-1, num_views, batch).permute(1, 2, 0) for table in (saved.log_weights, saved.positives)
        )
        anchors = exponents(log_weights, g.unsqueeze(-1), z.dtype)
        met = _met(call, z.device)
        logq = saved.logq.view(num_views, batch) if len(saved.logq) else None
        column_logq = _as_columns(logq, met)
        if not call.labelled:
            by_view = [t[..., :num_views] for t in anchors]
            # By (view of the row, view of the column, sample): the columns as anchors, and the positives' coefficients.
            as_columns = [_pick(t.permute(2, 0, 1), met, 1).unsqueeze(1).contiguous() for t in by_view]
            by_view = [_pick(t, met, 2).unsqueeze(-1) for t in by_view]
            coefficients = (g.unsqueeze(-1) * positives[..., :num_views]).transpose(1, 2)
            coefficients = _pick((coefficients + coefficients.transpose(0, 1)).to(z.dtype), met, 1)
        columns = _columns(z, met, num_views)
        in_batch, from_queue = [], []
        if call.crossed:
            shares = (g * positives[..., num_views]).to(z.dtype)
            single = positives[..., num_views] == 0
            column_shares = _as_columns(shares, met)
        for block, scores, queue_scores in _blocks(saved.rows, scale, call, samples):
            # The scores of the anchors of the block, and of the columns as anchors.
            of_rows = scores if logq is None else scores - column_logq
            of_columns = scores if logq is None else scores - logq[:, block, None, None]
            if not call.labelled:
                pairs = weighted(of_rows, *(t[:, block] for t in by_view))
                pairs += weighted(of_columns, *as_columns)
                own = _same_sample(pairs, block)
                if call.ids == Ids.DUPLICATES:
                    pairs.masked_fill_(_same_id(ids, block), 0)
                elif call.crossed:
                    of_class = shares[:, block, None, None] + column_shares
                    pairs -= torch.where(_same_id(ids, block), of_class, 0)
                    own.copy_(torch.where(single[:, block].unsqueeze(1), coefficients[..., block], own))
                if not call.crossed:
                    own.copy_(coefficients[..., block])
            else:
                pairs = _label_pairs(of_rows, of_columns, block, log_weights, positives, g, ids, call)
            in_batch.append(_product(pairs.flatten(2), columns))
            if queue_scores is not None:
                pairs = weighted(queue_scores, *(t[:, block, -1:] for t in anchors))
                from_queue.append(_product(pairs, zq))
        in_batch = _join(in_batch)
        own = slice(samples.start, samples.stop)
        z = z.view(num_views, batch, dim)[:, own]
        inverse_norms = saved.inverse_norms[: num_views * batch].view(num_views, batch, 1)[:, own]
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
        if call.normalize:
            dz = through_the_norm(dz, z, inverse_norms, dtype)
    return dz.to(dtype), grad_temperature


def _met(call, device):
    """Return (V, W), the views that an anchor of each view is compared with, or None if these are all views."""
    if call.columns != Columns.OTHER:
        return None
    every = range(call.num_views)
    return torch.tensor([[v for v in every if v != u] for u in every], device=device)


def _pick(table, met, dim):
    """Select, along ``dim`` of a table (V, ...), the entries of the views in ``met``."""
    if met is None:
        return table
    shape = [len(met) if d == 0 else met.shape[1] if d == dim else 1 for d in range(table.dim())]
    return torch.take_along_dim(table, met.view(shape), dim)


def _columns(z, met, num_views):
    """Return the rows that anchors are compared with: (W B, D) for all views, or (V, W B, D)."""
    return z if met is None else z.view(num_views, -1, z.shape[1])[met].flatten(1, 2)


def _blocks(rows, scale, call, samples):
    """Yield, for blocks of ``samples``: their slice, the scores of their rows with the columns (V, n, W, B), and their
    scores with the queue (V, n, K) or None."""
    batch = call.batch
    z, zq = rows.split([call.num_views * batch, call.queue_rows])
    columns = _columns(z, _met(call, z.device), call.num_views)
    # Both factors are multiplied by the square root of the scale, so that S_ij and S_ji are equal bit for bit: for long
    # rows, exp() would turn a rounding difference into a wrong weight.
    root = scale.sqrt().to(z.dtype)
    scaled, columns, zq = (z * root).view(call.num_views, batch, -1), columns * root, zq * root
    step = max(1, _BLOCK_BYTES // (z.element_size() * call.num_views * (columns.shape[-2] + len(zq))))
    for start in range(samples.start, samples.stop, step):
        block = slice(start, min(start + step, samples.stop))
        of_block = scaled[:, block]
        scores = _product(of_block, columns.mT).unflatten(-1, (-1, batch))
        yield block, scores, _product(of_block, zq.T) if len(zq) else None


def _as_columns(table, met):
    """Return a table (V, B) of rows as one of columns, (1, 1, V, B) or (V, 1, W, B); None stays."""
    if table is None or met is None:
        return table
    return table[met].unsqueeze(1)


def _less_logq(blocks, column_logq):
    """Yield the blocks with ``logq`` subtracted from the scores of the columns."""
    for block, scores, queue_scores in blocks:
        yield block, scores if column_logq is None else scores.sub_(column_logq), queue_scores


def _product(rows, matrix):
    """Multiply (V, n, x) by one matrix (x, y), or by one for each view; returns (V, n, y)."""
    return rows @ matrix if matrix.dim() == 3 else (rows.flatten(0, 1) @ matrix).unflatten(0, rows.shape[:2])


def _same_sample(pairs, block):
    """Return the entries of (V, n, W, B) that pair rows of one sample, as a view (V, W, n)."""
    return pairs[..., block].diagonal(0, 1, 3)


def _self(pairs, block):
    """Return the entries of (V, n, W, B) that pair each row with itself, as a view (n, V)."""
    return _same_sample(pairs, block).diagonal(0, 0, 1)


def _join(blocks):
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _of_all_rows(table, samples, batch):
    """Return the table (V, n, columns) as (columns, V B), with NaN in the rows of other processes."""
    if len(samples) < batch:
        own, table = table, table.new_full((len(table), batch, table.shape[-1]), torch.nan)
        table[:, samples.start : samples.stop] = own
    return table.permute(2, 0, 1).reshape(table.shape[-1], -1).contiguous()


def _view_tables(blocks, call, device, ids):
    """Return loss (V, n), log weights (V, n, C) and positives (V, n, P)."""
    num_views, met = call.num_views, _met(call, device)

    def of_all_views(table, otherwise):
        if met is None:
            return table
        index = met.unsqueeze(1).expand(-1, table.shape[1], -1)
        return table.new_full((*table.shape[:2], num_views), otherwise).scatter_(2, index, table)

    negatives, positives, means, sizes = [], [], [], []
    for block, scores, queue_scores in blocks:
        own, same = _same_sample(scores, block), None if ids is None else _same_id(ids, block)
        if call.crossed:  # the log-sum-exp of the positives of each view, and their mean
            size = same.sum(-1).double()
            positive = log_sum_exp_(scores.masked_fill(~same, -torch.inf))
            means.append(of_all_views(scores.masked_fill(~same, 0).sum(-1).double() / size, 0))
            sizes.append(size.expand(num_views, -1, -1))
        else:
            positive = own.transpose(1, 2).to(torch.float64, copy=True)
        positives.append(of_all_views(positive, 0))
        if same is None:
            own.fill_(-torch.inf)
        else:
            scores.masked_fill_(same, -torch.inf)
        sums = [of_all_views(log_sum_exp_(scores), -torch.inf)]
        if queue_scores is not None:
            sums.append(log_sum_exp_(queue_scores).unsqueeze(-1))
        negatives.append(torch.cat(sums, -1))
    positives = _join(positives)
    loss, log_weights, coefficients = _coefficients(call, _join(negatives), positives)
    if call.crossed:
        loss = loss + (positives - _join(means)).sum(-1) / (num_views - 1)
        size = _join(sizes)
        share = torch.where(size > 1, 1 / (size * (num_views - 1)), 0)
        coefficients = torch.cat([torch.where(size > 1, 0, coefficients), share], -1)
    return loss, log_weights, coefficients


def _coefficients(call, n, p):
    """Return loss (V, n), log weights (V, n, C) and positives (V, n, V): the arithmetic of the objectives.

    ``n`` (V, n, C): the log-sum-exp of the negatives in each column; ``p`` (V, n, V): the scores of the positives.
    """
    device, num_views, every = n.device, call.num_views, range(call.num_views)
    met = [positive_views(u, num_views, call.core_view) for u in every]
    share = torch.tensor([[[(v in met[u]) / len(met[u]) for v in every]] for u in every], dtype=n.dtype, device=device)
    positive = share > 0
    used = [negative_views(u, num_views, call.core_view, call.columns) for u in every]
    extra = range(num_views, n.shape[-1])  # the queue's column
    negative = torch.tensor([[[v in used[u] or v in extra for v in range(n.shape[-1])]] for u in every], device=device)

    def mean(values):
        return torch.where(positive, share * values, 0).sum(-1)

    rest = torch.where(negative, n, -torch.inf).logsumexp(-1, keepdim=True)
    if call.inside == Positives.ITSELF:
        if call.columns != Columns.ALL:
            own = n.diagonal(0, 0, 2).T.unsqueeze(-1)  # the column of the anchor's view
            rest = n[..., :num_views]
            for shared in [own] * (call.columns == Columns.OWN_AND_OTHER) + [n[..., extra.start :]] * len(extra):
                rest = torch.logaddexp(rest, shared)
        each = torch.where(positive, share.log() - torch.logaddexp(rest, p), -torch.inf)
        total = each.logsumexp(-1, keepdim=True)
        if call.columns == Columns.ALL:
            log_weights = torch.where(negative, total, -torch.inf)
        else:
            log_weights = torch.cat([each, *[total] * len(extra)], -1)
            if call.columns == Columns.OWN_AND_OTHER:
                log_weights.diagonal(0, 0, 2).copy_(total.squeeze(-1).T)
        return mean(_log_ratio(rest, p)), log_weights, torch.where(positive, -share * torch.sigmoid(rest - p), 0)
    if call.inside == Positives.NONE:
        some = rest > -torch.inf  # an anchor without negatives has loss 0 and no gradient
        some |= rest.isnan()
        den, coefficients = rest, torch.where(some, -share, 0)
        loss = torch.where(some.squeeze(-1), rest.squeeze(-1) - mean(p), 0)
    else:
        inside = torch.where(positive, p, -torch.inf).logsumexp(-1, keepdim=True)
        den = torch.logaddexp(rest, inside)
        if call.numerator == Numerator.MEAN:
            loss, coefficients = den.squeeze(-1) - mean(p), (p - den).exp() - share
        else:
            loss = (den - inside).squeeze(-1) - share.amax(-1).log()
            coefficients = (p - den).exp() - (p - inside).exp()
        coefficients = torch.where(positive, coefficients, 0)
    return loss, torch.where(negative & (den > -torch.inf), -den, -torch.inf), coefficients


def _log_ratio(rest, pos):
    """Return ``logaddexp(rest, pos) - pos`` without cancellation, and NaN if the positive's score is infinite."""
    return torch.nn.functional.softplus(torch.where(pos < torch.inf, rest - pos, torch.nan), threshold=80)


def _label_tables(blocks, call, labels):
    """Return the tables of ``_view_tables``, with labels."""
    tables = []
    for block, scores, queue_scores in blocks:
        same = _same_id(labels, block).repeat(1, 1, call.num_views).squeeze(1)
        flat = scores.flatten(2)

        def of_positives(values, otherwise, same=same, block=block, shape=scores.shape):
            values = values.masked_fill(~same, otherwise)
            _self(values.view(shape), block).fill_(otherwise)
            return values

        count = same.sum(-1).double() - 1
        safe = count.clamp_min(1)
        n = log_sum_exp_(flat.masked_fill(same, -torch.inf))
        if queue_scores is not None:
            n = torch.logaddexp(n, log_sum_exp_(queue_scores))
        share = torch.where(count > 0, 1 / safe, 0).expand_as(n)
        den, pivot, factor = n, n, torch.zeros_like(n)
        if call.inside == Positives.ALL:
            inside = log_sum_exp_(of_positives(flat, -torch.inf))
            pivot = den = torch.logaddexp(n, inside)
            factor = torch.ones_like(n)
        log_weights = -den
        if call.inside == Positives.ITSELF:
            rest = n.unsqueeze(-1)
            ratio = torch.where(rest.isinf(), rest.to(flat.dtype) - flat, minus(rest, flat))
            log_weights = of_positives(ratio.sigmoid(), 0).sum(-1).double().log() - n - safe.log()
            ratio = torch.where(flat < torch.inf, ratio, torch.nan)  # as in _log_ratio
            loss = of_positives(torch.nn.functional.softplus(ratio, threshold=80), 0).sum(-1).double() / safe
        elif call.numerator == Numerator.LOG_SUM:
            loss = den - inside + safe.log()
            pivot, factor = inside, -torch.expm1(inside - den)
        elif call.inside == Positives.NONE:
            some = (n > -torch.inf) | n.isnan()  # else the class has no negatives
            loss = torch.where(some, den - of_positives(flat, 0).sum(-1).double() / safe, 0)
            share = torch.where(some, share, 0)
        else:
            loss = den - of_positives(flat, 0).sum(-1).double() / safe
        # An anchor without positives has zero loss and contributes no gradient.
        loss = torch.where(count > 0, loss, 0)
        log_weights = torch.where((count > 0) & (den > -torch.inf), log_weights, -torch.inf)
        log_weights = log_weights.unsqueeze(-1).expand(-1, -1, call.columns_of_tables)
        tables.append((loss, log_weights, torch.stack([pivot, share, factor], -1)))
    return tuple(map(_join, zip(*tables, strict=True)))


def _same_id(ids, block):
    """Return (n, 1, B): whether a sample of the block and another one share an id."""
    return ids[block, None, None] == ids


def _label_pairs(of_rows, of_columns, block, log_weights, positives, g, labels, call):
    """Return G (V, n, V, B) of the rows of a block, with labels, from the scores of both as anchors."""
    same = _same_id(labels, block).repeat(1, 1, len(g)).squeeze(1)
    tables = (log_weights[..., 0], g, *positives.unbind(-1))
    as_anchors = _label_anchors(of_rows.flatten(2), same, *(t[:, block, None] for t in tables), call)
    as_columns = _label_anchors(of_columns.flatten(2), same, *(t.reshape(1, 1, -1) for t in tables), call)
    pairs = as_anchors.add_(as_columns).view(of_rows.shape)
    _self(pairs, block).fill_(0)
    return pairs


def _label_anchors(scores, same, log_weights, g, pivot, share, factor, call):
    """Return ``g d loss / d S`` of the anchors whose tables are given."""
    apart = weighted(scores, *exponents(log_weights, g, scores.dtype))
    together = (-g * share).to(scores.dtype)
    if call.numerator == Numerator.LOG_SUM:
        together = weighted(scores, *exponents(-pivot, -g * factor, scores.dtype))
    elif call.inside == Positives.ALL:
        together = weighted(scores, *exponents(-pivot, g * factor, scores.dtype)) + together
    elif call.inside == Positives.ITSELF:
        together = minus(pivot, scores).sigmoid_().mul_(together)
    return torch.where(same, together, apart)
