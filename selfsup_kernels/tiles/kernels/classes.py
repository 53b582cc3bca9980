"""InfoNCE with labels: the pairs of one class, which are positives of each other.

Rows are sorted by class, so that those of a block's classes are neighbours: a program visits these columns alone. The
class of a row is named by the row where it begins.
"""

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import SampleIds, Sizes
from selfsup_kernels.tiles.kernels.objectives import ALL_INSIDE, ITSELF, LOG_SUM, MEAN, NONE_INSIDE
from selfsup_kernels.tiles.kernels.tables import (
    PARTS_BLOCK,
    Anchors,
    Column,
    block_scores,
    negatives,
    store_weights,
    total_loss,
)
from selfsup_kernels.tiles.kernels.tile import LOG2E, finite_or_zero, log_add, log_ratio, score_reference, sigmoid
from selfsup_kernels.tiles.layout import PADDING


@triton.jit
def _count(below, up_to, labels, start, own, stride, samples, STEP: tl.constexpr):
    """Count in the tables (BLOCK, STEP) the labels of STEP samples that lie below, or not above, ``own``."""
    j = start + tl.arange(0, STEP)
    other = tl.load(labels + j.to(tl.int64) * stride, mask=j < samples, other=0)[None, :]
    inside = (j < samples)[None, :]
    below += (inside & (other < own[:, None])).to(tl.int32)
    up_to += (inside & (other <= own[:, None])).to(tl.int32)
    return below, up_to


@triton.jit(do_not_specialize=["stride", "samples", "rows", "views"], do_not_specialize_on_alignment=["labels"])
def sort_kernel(
    labels, order, classes, stride, samples, rows, views,
    BY_SAMPLE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """order, classes <- those of ``Saved``, from ``labels`` (samples,): samples with one label keep their order.
    BY_SAMPLE: ``classes`` are those of the samples, not of the rows in that order; ``views`` is 1.

    A program finds the places of BLOCK samples by comparing their labels with all others, STEP at a time, which takes
    far fewer operations than the products of the samples' rows. BLOCK divides STEP.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < samples
    own = tl.load(labels + i.to(tl.int64) * stride, mask=valid, other=0)
    below = tl.zeros((BLOCK, STEP), tl.int32)
    up_to = tl.zeros((BLOCK, STEP), tl.int32)
    here = tl.program_id(0) * BLOCK // STEP * STEP
    for start in range(0, here, STEP):
        below, up_to = _count(below, up_to, labels, start, own, stride, samples, STEP)
    before = tl.sum(up_to - below, 1)  # samples with the same label and a smaller number
    for start in range(here, samples, STEP):
        below, up_to = _count(below, up_to, labels, start, own, stride, samples, STEP)
    j = here + tl.arange(0, STEP)
    near = tl.load(labels + j.to(tl.int64) * stride, mask=j < samples, other=0)
    before += tl.sum(((near[None, :] == own[:, None]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
    first, end = tl.sum(below, 1), tl.sum(up_to, 1)
    place = first + before
    tl.store(order + place, i.to(tl.int64), mask=valid)
    for view in range(views):
        row = i if BY_SAMPLE else place * views + view
        tl.store(classes.first + row, first * views, mask=valid)
        tl.store(classes.end + row, end * views, mask=valid)
    if tl.program_id(0) == 0:
        padding = samples * views + tl.arange(0, PADDED)
        zero = tl.zeros((PADDED,), tl.int32)
        tl.store(classes.first + padding, zero, mask=padding < rows)
        tl.store(classes.end + padding, zero, mask=padding < rows)


PADDED = tl.constexpr(PADDING)
"""More rows than the padding of the last block."""


@triton.jit(do_not_specialize=[*Sizes._fields, "first_sample", "own", "num_views"])
def class_tables_kernel(
    sums, saved, loss, parts, loss_factor: tl.float64,
    rows, batch, padded, queue, views, core_view, columns, first_sample, own, num_views, stride,
    rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Write weights, log_weights and positives (:func:`pair_coefficient`) of BLOCK anchors, and the losses of those of
    this process, from ``first_sample`` on. An anchor without positives has loss 0 and no gradient. ``loss``: (V, own),
    or () for loss_factor times the sum, with ``parts`` (:func:`selfsup_kernels.tiles.kernels.tables.total_loss`)."""
    BLOCK: tl.constexpr = tile.BLOCK
    sizes = Sizes(rows, batch, padded, queue, views, core_view, columns)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < batch
    group = tl.load(saved.classes.first + row, mask=valid, other=-2)
    first = tl.load(saved.classes.first + tl.program_id(0) * BLOCK)
    last = tl.load(saved.classes.end + tl.minimum(tl.program_id(0) * BLOCK + BLOCK, batch) - 1)
    scale = score_reference(saved.scalars, rules.normalize)
    n = tl.full((BLOCK,), float("-inf"), tl.float64)
    for c in range(1 + (queue > 0).to(tl.int32)):
        column = Column(c, tl.where(c == 1, rows, 0), tl.where(c == 1, queue, batch), c == 0)
        anchors = Anchors(row, group, valid)
        ids = SampleIds(saved.classes.first, 1)
        n = log_add(n, negatives(sums, saved, anchors, column, ids, scale, sizes, stride, tile))
    near = n.to(tl.float32)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    exponential = tl.zeros((BLOCK,), tl.float64)
    linear = tl.zeros((BLOCK,), tl.float64)
    share = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        other = start + tl.arange(0, BLOCK)
        s = block_scores(saved, row, other, last, scale, stride, tile)
        theirs = tl.load(saved.classes.first + other, mask=other < last, other=-1)
        positive = (group[:, None] == theirs[None, :]) & (row[:, None] != other[None, :])
        if rules.inside == ITSELF:
            linear += tl.sum(tl.where(positive, log_ratio(near[:, None], s), 0.0), 1).to(tl.float64)
            share += tl.sum(tl.where(positive, sigmoid(near[:, None] - s), 0.0), 1).to(tl.float64)
        else:
            linear += tl.sum(tl.where(positive, s, 0.0), 1).to(tl.float64)
            high = tl.maximum(top, tl.max(tl.where(positive, s, float("-inf")), 1))
            safe = finite_or_zero(high)
            part = tl.sum(tl.where(positive, tl.exp(s - safe[:, None]), 0.0), 1)
            exponential = exponential * tl.exp(tl.where(top == high, 0.0, top - safe)).to(tl.float64) + part
            top = high

    count = (tl.load(saved.classes.end + row, mask=valid, other=1) - group - 1).to(tl.float64)
    alone = valid & (count < 1)
    count = tl.where(alone | (row >= batch), 1.0, count)
    inside = tl.log(exponential) + finite_or_zero(top).to(tl.float64)
    none = float("-inf")
    ratio = sigmoid(n - inside)
    if rules.inside == ITSELF:
        value = linear / count
        weight = tl.where(n == none, none, tl.log(share / count) - n)
        pivot, factor = n, n * 0.0
    elif rules.inside == NONE_INSIDE:
        alone |= n == none  # without negatives there is no loss
        value = n - linear / count
        weight = tl.where(n == none, none, -n)
        pivot, factor = n, n * 0.0
    elif rules.numerator == LOG_SUM:
        value = log_ratio(n, inside) + tl.log(count)
        weight = -log_add(n, inside)
        pivot, factor = inside, ratio
    else:
        den = log_add(n, inside)
        value = den - linear / count
        weight = -den
        pivot, factor = den, tl.where(alone, 0.0, 1.0)
    view, place = row % num_views, row // num_views
    sample = tl.load(saved.order + place, mask=valid, other=0)
    sample -= first_sample
    mine = valid & (sample >= 0) & (sample < own)
    value = tl.where(alone, 0.0, value)
    if parts is None:
        tl.store(loss + view * own + sample, value.to(tl.float32), mask=mine)
    else:
        total_loss(tl.sum(tl.where(mine, value, 0.0), 0), parts, loss, saved.scalars, loss_factor, PARTS_BLOCK)
    weight = tl.where(alone, none, weight)
    for c in range(1 + (queue > 0).to(tl.int32)):
        store_weights(saved, weight, scale, c * rows + row, valid)
    tl.store(saved.positives + row, tl.where(alone, 0.0, pivot).to(tl.float32), mask=valid)
    tl.store(saved.positives + rows + row, tl.where(alone, 0.0, 1.0 / count).to(tl.float32), mask=valid)
    tl.store(saved.positives + 2 * rows + row, tl.where(alone, 0.0, factor).to(tl.float32), mask=valid)


@triton.jit
def pair_coefficient(s, positives, at, mask, sizes, COLUMNS: tl.constexpr, rules: tl.constexpr):
    """Return d loss_i / d S of the anchors ``at`` for positives of scores ``s``, from the three numbers of
    ``Saved.positives``. COLUMNS: the anchors are the columns of ``s``."""
    pivot = tl.load(positives + at, mask=mask, other=0.0)
    share = tl.load(positives + sizes.rows + at, mask=mask, other=0.0)
    factor = tl.load(positives + 2 * sizes.rows + at, mask=mask, other=0.0)
    if COLUMNS:
        pivot, share, factor = pivot[None, :], share[None, :], factor[None, :]
    else:
        pivot, share, factor = pivot[:, None], share[:, None], factor[:, None]
    below = tl.where(s > pivot, 0.0, s - pivot)  # only rounding can put a score above the sum that it is part of
    if rules.inside == ALL_INSIDE and rules.numerator == MEAN:
        return factor * tl.exp2(below * LOG2E) - share
    elif rules.numerator == LOG_SUM:
        return -factor * tl.exp2(below * LOG2E)
    elif rules.inside == ITSELF:
        return -share * sigmoid(pivot - s)
    else:
        return -share + s * 0.0


@triton.jit
def class_gradient(g, of_x, of_y, x, y, saved, upstream, sizes, rules: tl.constexpr, tile: tl.constexpr):
    """Return ``g`` with the pairs of one class replaced: by zero for a row with itself, else by the sum of both
    anchors' coefficients. ``x``, ``y``: the rows of the tile; ``of_x``, ``of_y``: its scores for rows and for columns
    as anchors."""
    x_in, y_in = x < sizes.batch, y < sizes.batch
    x_class = tl.load(saved.classes.first + x, mask=x_in, other=-1)
    y_class = tl.load(saved.classes.first + y, mask=y_in, other=-2)
    same = x_class[:, None] == y_class[None, :]
    cx = pair_coefficient(of_x, saved.positives, x, x_in, sizes, False, rules)
    cy = pair_coefficient(of_y, saved.positives, y, y_in, sizes, True, rules)
    if upstream is None:
        both = (cx + cy) * tile.FACTOR
    else:
        x_scale = tile.FACTOR * tl.load(upstream + x, mask=x_in, other=0.0)
        y_scale = tile.FACTOR * tl.load(upstream + y, mask=y_in, other=0.0)
        both = cx * x_scale[:, None] + cy * y_scale[None, :]
    return tl.where(same, tl.where(x[:, None] == y[None, :], 0.0, both), g)
