"""InfoNCE with labels: the pairs of one class, which are positives of each other.

Rows are sorted by class, so that those of a block's classes are neighbours: a program visits these columns alone. The
class of a row is named by the row where it begins.
"""

import functools

import torch
import triton
import triton.language as tl

from selfsup_kernels.tiles import launcher
from selfsup_kernels.tiles.objectives import ALL_INSIDE, ITSELF, LOG_SUM, MEAN, NONE_INSIDE
from selfsup_kernels.tiles.tables import TABLE_BLOCK, block_scores, negatives, store_weights, table_width
from selfsup_kernels.tiles.tile import LOG2E, finite_or_zero, log_add, log_ratio, score_reference, sigmoid


@triton.jit(do_not_specialize=["rows", "BATCH", "QUEUE_ROWS", "SAMPLES"])
def class_tables_kernel(
    stored,
    sums,
    scalars,
    classes,
    ends,
    order,
    loss,
    weights,
    log_weights,
    positives,
    rows,
    BATCH,
    QUEUE_ROWS,
    SAMPLES,
    VIEWS: tl.constexpr,
    QUEUE: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the losses, weights, log_weights and positives (:func:`pair_coefficient`) of BLOCK anchors. SAMPLES: B. An
    anchor without positives has loss 0 and no gradient."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < BATCH
    group = tl.load(classes + row, mask=valid, other=-2)
    first = tl.load(classes + tl.program_id(0) * BLOCK)
    last = tl.load(ends + tl.minimum(tl.program_id(0) * BLOCK + BLOCK, BATCH) - 1)
    scale, reference = score_reference(scalars, NORMALIZE)
    n = tl.full((BLOCK,), float("-inf"), tl.float64)
    for c in range(1 + QUEUE):
        value = negatives(
            sums,
            stored,
            row,
            group,
            valid,
            classes,
            c,
            tl.where(c == 1, rows, 0),
            tl.where(c == 1, QUEUE_ROWS, BATCH),
            scale,
            reference,
            rows,
            c == 0,
            True,
            DIM,
            STRIDE,
            BLOCK,
            BLOCK_K,
            PRECISION,
        )
        n = log_add(n, value)
    near = n.to(tl.float32)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    exponential = tl.zeros((BLOCK,), tl.float64)
    linear = tl.zeros((BLOCK,), tl.float64)
    share = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        other = start + tl.arange(0, BLOCK)
        s = block_scores(stored, row, other, last, scale, DIM, STRIDE, BLOCK, BLOCK_K, PRECISION)
        theirs = tl.load(classes + other, mask=other < last, other=-1)
        positive = (group[:, None] == theirs[None, :]) & (row[:, None] != other[None, :])
        if POSITIVES == ITSELF:
            linear += tl.sum(tl.where(positive, log_ratio(near[:, None], s), 0.0), 1).to(tl.float64)
            share += tl.sum(tl.where(positive, sigmoid(near[:, None] - s), 0.0), 1).to(tl.float64)
        else:
            linear += tl.sum(tl.where(positive, s, 0.0), 1).to(tl.float64)
            high = tl.maximum(top, tl.max(tl.where(positive, s, float("-inf")), 1))
            safe = finite_or_zero(high)
            part = tl.sum(tl.where(positive, tl.exp(s - safe[:, None]), 0.0), 1)
            exponential = exponential * tl.exp(tl.where(top == high, 0.0, top - safe)).to(tl.float64) + part
            top = high

    count = (tl.load(ends + row, mask=valid, other=1) - group - 1).to(tl.float64)
    alone = valid & (count < 1)
    count = tl.where(alone | (row >= BATCH), 1.0, count)
    inside = tl.log(exponential) + finite_or_zero(top).to(tl.float64)
    none = float("-inf")
    ratio = sigmoid(n - inside)
    if POSITIVES == ITSELF:
        value = linear / count
        weight = tl.where(n == none, none, tl.log(share / count) - n)
        pivot, factor = n, n * 0.0
    elif POSITIVES == NONE_INSIDE:
        value = n - linear / count
        weight = tl.where(n == none, none, -n)
        pivot, factor = n, n * 0.0
    elif NUMERATOR == LOG_SUM:
        value = log_ratio(n, inside) + tl.log(count)
        weight = -log_add(n, inside)
        pivot, factor = inside, ratio
    else:
        den = log_add(n, inside)
        value = den - linear / count
        weight = -den
        pivot, factor = den, tl.where(alone, 0.0, 1.0)
    view, place = row % VIEWS, row // VIEWS
    sample = tl.load(order + place, mask=valid, other=0)
    tl.store(loss + view * SAMPLES + sample, tl.where(alone, 0.0, value).to(tl.float32), mask=valid)
    weight = tl.where(alone, none, weight)
    for c in range(1 + QUEUE):
        store_weights(weights, log_weights, scalars, weight, reference, c * rows + row, valid)
    tl.store(positives + row, tl.where(alone, 0.0, pivot).to(tl.float32), mask=valid)
    tl.store(positives + rows + row, tl.where(alone, 0.0, 1.0 / count).to(tl.float32), mask=valid)
    tl.store(positives + 2 * rows + row, tl.where(alone, 0.0, factor).to(tl.float32), mask=valid)


@triton.jit
def pair_coefficient(s, pivot, share, factor, POSITIVES: tl.constexpr, NUMERATOR: tl.constexpr):
    """Return d loss_i / d S for an anchor's positive of score ``s``, from the three numbers of ``Saved.positives``."""
    below = tl.where(s > pivot, 0.0, s - pivot)  # only rounding can put a score above the sum that it is part of
    if POSITIVES == ALL_INSIDE and NUMERATOR == MEAN:
        return factor * tl.exp2(below * LOG2E) - share
    elif NUMERATOR == LOG_SUM:
        return -factor * tl.exp2(below * LOG2E)
    elif POSITIVES == ITSELF:
        return -share * sigmoid(pivot - s)
    else:
        return -share + s * 0.0


@triton.jit
def class_gradient(
    g,
    s,
    x,
    y,
    upstream,
    classes,
    positives,
    rows,
    BATCH,
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Return ``g`` with the pairs of one class replaced: by zero for a row with itself, else by the sum of both
    anchors' coefficients. ``x``, ``y``: the rows of the tile; ``s``: its scores."""
    x_in, y_in = x < BATCH, y < BATCH
    x_class = tl.load(classes + x, mask=x_in, other=-1)
    y_class = tl.load(classes + y, mask=y_in, other=-2)
    same = x_class[:, None] == y_class[None, :]
    cx = pair_coefficient(
        s,
        tl.load(positives + x, mask=x_in, other=0.0)[:, None],
        tl.load(positives + rows + x, mask=x_in, other=0.0)[:, None],
        tl.load(positives + 2 * rows + x, mask=x_in, other=0.0)[:, None],
        POSITIVES,
        NUMERATOR,
    )
    cy = pair_coefficient(
        s,
        tl.load(positives + y, mask=y_in, other=0.0)[None, :],
        tl.load(positives + rows + y, mask=y_in, other=0.0)[None, :],
        tl.load(positives + 2 * rows + y, mask=y_in, other=0.0)[None, :],
        POSITIVES,
        NUMERATOR,
    )
    if upstream is None:
        both = (cx + cy) * FACTOR
    else:
        x_scale = FACTOR * tl.load(upstream + x, mask=x_in, other=0.0)
        y_scale = FACTOR * tl.load(upstream + y, mask=y_in, other=0.0)
        both = cx * x_scale[:, None] + cy * y_scale[None, :]
    return tl.where(same, tl.where(x[:, None] == y[None, :], 0.0, both), g)


def class_tables(layout, stored, sums, scalars, order, classes, precision):
    """Return the losses of this process's anchors (V, own samples), log_weights, weights and positives."""
    call = layout.call
    new = functools.partial(launcher.empty, dtype=torch.float32, device=stored.device)
    loss = new((layout.call.num_views, layout.call.batch))
    log_weights, weights = (new((call.columns_of_tables, layout.rows)) for _ in range(2))
    positives = new((call.positives_of_tables, layout.rows))
    launcher.launch(
        class_tables_kernel,
        (launcher.cdiv(layout.batch, TABLE_BLOCK),),
        stored,
        sums,
        scalars,
        *classes,
        order,
        loss,
        weights,
        log_weights,
        positives,
        layout.rows,
        layout.batch,
        layout.call.queue_rows,
        layout.call.batch,
        VIEWS=layout.call.num_views,
        QUEUE=int(layout.call.queue_rows > 0),
        POSITIVES=layout.call.inside,
        NUMERATOR=layout.call.numerator,
        NORMALIZE=call.normalize,
        DIM=layout.call.dim,
        STRIDE=layout.stride,
        BLOCK=TABLE_BLOCK,
        BLOCK_K=table_width(layout, stored.dtype),
        PRECISION=precision,
        num_warps=8,
    )
    own = loss[:, call.first : call.first + call.own].contiguous()
    return own, log_weights, weights, positives
