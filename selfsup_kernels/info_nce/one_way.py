"""InfoNCE in one direction, in eager PyTorch: N labelled anchors against M labelled columns.

Scores exist for a few anchors at a time (``_blocks``), so that memory is linear in the rows, and the backward computes
them again. Three numbers per anchor carry the objective from the forward to the backward: the derivative of
its loss by the score x of a negative is ``exp(log_weight + x)``; by that of a positive it is ``exp(log_weight + x) -
share`` (``supcon_out``) or ``-share sigmoid(pivot - x)`` (``per_positive``).

Shapes: N anchors, n of them in a block, M columns, D features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from selfsup_kernels.core import transforms
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.eager import scale_of, through_the_norm, unit_rows, without_autocast
from selfsup_kernels.core.once import once
from selfsup_kernels.core.ops import accumulation_dtype
from selfsup_kernels.info_nce.autograd import as_given
from selfsup_kernels.info_nce.exponentials import exponents, log_sum_exp_, minus, weighted

_BLOCK_BYTES = 1 << 22
"""Bytes of scores per block; up to four copies exist at a time."""
_LEAST_ANCHORS = 32
"""Anchors per block at least: each block reads all columns, so with many columns fewer anchors would be slow. Their
scores take as much memory as columns of 32 features."""


class _Call(NamedTuple):
    temperature: float
    """Ignored if the temperature is passed as a tensor."""
    per_positive: bool
    itself: bool
    normalize: bool
    eps: float


def losses(anchors, columns, labels, column_labels, itself=False, *, temperature, objective, normalize=True, eps=1e-12):
    """Return the loss of each anchor, (N,), in float32, or in float64 if the anchors or columns are.

    Columns that share the anchor's label are its positives, all others its negatives. An anchor without positives has
    loss zero and no gradient. The result is differentiable once, in anchors, columns and a tensor temperature.

    Args:
        anchors, columns: (N, D) and (M, D) floating tensors on one device, neither empty.
        labels, column_labels: (N,) and (M,) integers of one dtype on that device. The backward reads them again.
        itself: True if anchor and column i are one sample, for N = M: neither a positive nor a negative.
        temperature: a number > 0 or a tensor of one element.
        objective: ``"supcon_out"``: the log-sum-exp of all columns less the mean of the positives' scores.
            ``"per_positive"``: the mean over the positives of -log of their softmax over themselves and the negatives.
        normalize, eps: as in :func:`selfsup_kernels.info_nce_loss`, for both sides.
    """
    temperature_tensor, temperature = check.number_or_tensor("temperature", temperature, check.positive_number)
    check.near("temperature", temperature_tensor, "embeddings", anchors.device)
    call = _Call(temperature, objective == "per_positive", itself, normalize, eps)
    return transforms.apply(_OneWay, anchors, columns, temperature_tensor, labels, column_labels, call)


class _OneWay(torch.autograd.Function):
    """The losses, differentiable once. ``core.transforms.apply`` calls it."""

    @staticmethod
    def run(anchors, columns, temperature_tensor, labels, column_labels, call):
        """Return the losses, then the rows, their reciprocal norms, the scale and the tables for the backward."""
        acc = torch.promote_types(accumulation_dtype(anchors.dtype), accumulation_dtype(columns.dtype))
        with torch.autocast(anchors.device.type, enabled=False):
            scale = scale_of(temperature_tensor, call.temperature, anchors.device)
            # Copies, since a memory bank may receive new columns before the backward.
            z, rnorm = unit_rows(anchors.to(acc), call.normalize, call.eps)
            c, column_rnorm = unit_rows(columns.to(acc), call.normalize, call.eps)
            blocks = _blocks(z, c, labels, column_labels, scale, call)
            tables = [_per_positive(*b) if call.per_positive else _supcon(*b) for _, *b in blocks]
        loss, *tables = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return loss.to(acc), z, rnorm, c, column_rnorm, scale, *tables

    @staticmethod
    def save(ctx, inputs, outputs):
        anchors, columns, temperature_tensor, labels, column_labels, call = inputs
        ctx.call, ctx.device, ctx.dtypes = call, anchors.device, (anchors.dtype, columns.dtype)
        inputs = zip((anchors, columns, temperature_tensor), ctx.needs_input_grad, strict=False)
        inputs = [x for x, needed in inputs if needed]  # for `once`; a memory bank without a gradient may change
        ctx.save_for_backward(labels, column_labels, *outputs[1:], *inputs)

    @staticmethod
    def forward(ctx, *args):
        outputs = _OneWay.run(*args)
        _OneWay.save(ctx, args, outputs)
        return outputs[0]

    @staticmethod
    @once
    @without_autocast
    def backward(ctx, saved, grad):
        labels, column_labels, z, rnorm, c, column_rnorm, scale, log_weights, share, pivot, *inputs = saved
        call, (need_anchors, need_columns, need_temperature) = ctx.call, ctx.needs_input_grad[:3]
        g = grad.double()[:, None]
        high, factor = exponents(log_weights[:, None], g, z.dtype)
        share, pivot = (-g * share[:, None]).to(z.dtype), pivot[:, None]
        dz, dc = torch.zeros_like(z), torch.zeros_like(c) if need_columns else None
        for block, scores, positive in _blocks(z, c, labels, column_labels, scale, call):
            pairs = weighted(scores, high[block], factor[block])
            if call.per_positive:
                together = minus(pivot[block], scores).sigmoid_().mul_(share[block])
            else:
                together = pairs + share[block]
            pairs = torch.where(positive, together, pairs)
            if need_anchors or need_temperature:
                dz[block] = pairs @ c
            if need_columns:
                dc.addmm_(pairs.T, z[block])
        grads = [None] * 6
        if need_temperature:
            grads[2] = as_given(-scale * scale * (z.double() * dz).sum(), inputs[-1], True)
        if need_anchors:
            grads[0] = _of_rows(dz, z, rnorm, scale, call, ctx.dtypes[0])
        if need_columns:
            grads[1] = _of_rows(dc, c, column_rnorm, scale, call, ctx.dtypes[1])
        return tuple(grads)


def _blocks(z, c, labels, column_labels, scale, call):
    """Yield, for blocks of anchors: their slice, their scores (n, M), and which of them are positives. An anchor's
    score with itself is -inf."""
    scaled = z * scale.to(z.dtype)
    step = max(_LEAST_ANCHORS, _BLOCK_BYTES // (z.element_size() * len(c)))
    for start in range(0, len(z), step):
        block = slice(start, min(start + step, len(z)))
        scores = scaled[block] @ c.T
        positive = labels[block, None] == column_labels
        if call.itself:
            scores.diagonal(start).fill_(-torch.inf)
            positive.diagonal(start).fill_(False)
        yield block, scores, positive


def _supcon(scores, positive):
    """Return loss, log weight, share and pivot of each anchor, (n,) in float64; there is no pivot."""
    count, share = _count(positive)
    mean = scores.masked_fill(~positive, 0).sum(-1).double() * share
    every = log_sum_exp_(scores)
    loss = torch.where(count > 0, every - mean, 0)
    return loss, torch.where(count > 0, -every, -torch.inf), share, every


def _per_positive(scores, positive):
    """Return loss, log weight, share and pivot of each anchor, (n,) in float64; the pivot is the log-sum-exp of the
    negatives."""
    count, share = _count(positive)
    rest = log_sum_exp_(scores.masked_fill(positive, -torch.inf))
    # The softmax of an infinite score is not defined.
    ratio = torch.where(scores < torch.inf, minus(rest[:, None], scores), torch.nan)
    loss = F.softplus(ratio, threshold=80).masked_fill_(~positive, 0).sum(-1).double() * share
    log_weights = ratio.sigmoid_().masked_fill_(~positive, 0).sum(-1).double().mul_(share).log_() - rest
    # No negatives: the loss is zero. No positives: the sums are.
    return loss, torch.where((count > 0) & (rest != -torch.inf), log_weights, -torch.inf), share, rest


def _count(positive):
    """Return the number of positives of each anchor, and its reciprocal, or 0 without positives."""
    count = positive.sum(-1).double()
    return count, torch.where(count > 0, 1 / count, 0)


def _of_rows(gradient, rows, rnorm, scale, call, dtype):
    """Return the gradient of the rows in ``dtype`` from the sums of derivatives times the rows of the other side."""
    gradient = gradient * scale.to(gradient.dtype)
    return (through_the_norm(gradient, rows, rnorm[:, None], dtype) if call.normalize else gradient).to(dtype)
