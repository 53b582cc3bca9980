"""From the sums over negatives to the losses and the weights of the backward, for the objectives by views.

Weights are stored relative to the score reference r of the kernels, as ``w = exp(logw + r)``: a pair's gradient is then
``exp(S - r) (w_i + w_j)``, one exponential for both directions. Where a weight is out of range for that (temperatures
below 0.013) a flag sends the backward to a path that adds the logarithms.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import Sizes
from selfsup_kernels.tiles.kernels.objectives import anchor_tables
from selfsup_kernels.tiles.kernels.tile import (
    FINISHED,
    SLOW,
    finite_or_zero,
    load_ids,
    negatives_meet,
    score_reference,
)

FAST_WEIGHT = tl.constexpr(60.0)
"""All scores of a row with a weight above exp(60) lie below reference - 60: exp(S - reference) would flush terms to
zero that are 1e-12 of the sum."""

LOST_SHARE = tl.constexpr(1.2e-31)
"""float32 flushes terms below 1.2e-38 to zero, so a sum of n terms has a relative error below 1e-7 above n times this.
"""


class Anchors(NamedTuple):
    """Made in a kernel: BLOCK rows. All fields are (BLOCK,)."""

    row: int
    own: int
    """The sample of each row, or its id, or with labels its class: negatives differ in it."""
    valid: bool


class Column(NamedTuple):
    """Made in a kernel: the rows that hold the negatives of one column of the tables."""

    number: int
    first_row: int
    length: int
    exclude: bool
    """An anchor's own sample is among them and does not count, nor does one with its id, or with labels its class."""


@triton.jit
def block_scores(saved, row, other, limit, scale, stride, tile: tl.constexpr):
    """Return the scores of BLOCK stored rows as anchors with BLOCK others; rows from ``limit`` on are not read."""
    BLOCK: tl.constexpr = tile.BLOCK
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    k = tl.arange(0, tile.BLOCK_K)
    at_x = saved.rows + row.to(tl.int64)[:, None] * stride
    at_y = saved.rows + other.to(tl.int64)[:, None] * stride
    for start in range(0, stride, tile.BLOCK_K):
        inside = (start + k < stride)[None, :]
        x = tl.load(at_x + (start + k)[None, :], mask=inside, other=0.0)
        y = tl.load(at_y + (start + k)[None, :], mask=(other < limit)[:, None] & inside, other=0.0)
        s = tl.dot(x, tl.trans(y), s, input_precision=tile.PRECISION)
    s *= scale.factor
    if saved.logq is not None:
        s -= tl.load(saved.logq + other, mask=other < limit, other=0.0)[None, :]
    return s


@triton.jit
def running_log_sum(saved, anchors, column, ids, scale, stride, tile: tl.constexpr):
    """Return the log-sum-exp, with a running maximum, of the scores of anchors with the negatives of a column."""
    BLOCK: tl.constexpr = tile.BLOCK
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, column.length, BLOCK):
        other = start + tl.arange(0, BLOCK)
        s = block_scores(
            saved, anchors.row, column.first_row + other, column.first_row + column.length, scale, stride, tile
        )
        theirs = other
        if ids is not None:
            theirs = load_ids(ids, other, (other < column.length) & column.exclude)
        keep = (other < column.length)[None, :] & ((not column.exclude) | (anchors.own[:, None] != theirs[None, :]))
        high = tl.maximum(top, tl.max(tl.where(keep, s, float("-inf")), 1))
        safe = finite_or_zero(high)
        part = tl.sum(tl.where(keep, tl.exp(s - safe[:, None]), 0.0), 1)
        total = total * tl.exp(tl.where(top == high, 0.0, top - safe)) + part
        top = high
    return tl.log(total.to(tl.float64)) + finite_or_zero(top).to(tl.float64)


@triton.jit
def negatives(sums, saved, anchors, column, ids, scale, sizes, stride, tile: tl.constexpr):
    """Return the log-sum-exp N of the anchors' negatives of a column, in float64. Sums that are too small to be
    accurate are computed again with a running maximum: relative to the reference that all rows share, the scores of a
    row may all underflow. ``ids``: what ``anchors.own`` is compared with, or None for the sample."""
    total = tl.load(sums + column.number * sizes.rows + anchors.row, mask=anchors.valid, other=1.0)
    n = tl.log(total.to(tl.float64)) + scale.reference.to(tl.float64)
    doubtful = anchors.valid & (total < tl.maximum(column.length * LOST_SHARE, 1e-30))
    if tl.sum(doubtful.to(tl.int32), 0) > 0:
        n = tl.where(doubtful, running_log_sum(saved, anchors, column, ids, scale, stride, tile), n)
    return n


@triton.jit
def class_mean(saved, row, group, size, valid, first_row, limit, scale, stride, tile: tl.constexpr):
    """Return the mean of the scores of BLOCK anchors with the rows of their classes, ``group``, in the view that begins
    at ``first_row``, in float64."""
    BLOCK: tl.constexpr = tile.BLOCK
    total = tl.zeros((BLOCK,), tl.float64)
    end = tl.max(tl.where(valid, group + size, 0), 0)
    for start in range(tl.min(tl.where(valid, group, end), 0), end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        other = tl.load(saved.order + place, mask=place < end, other=0).to(tl.int32)
        s = block_scores(saved, row, first_row + other, limit, scale, stride, tile)
        theirs = tl.load(saved.classes.first + other)
        same = (group[:, None] == theirs[None, :]) & (place < end)[None, :]
        total += tl.sum(tl.where(same, s, 0.0), 1).to(tl.float64)
    return total / size.to(tl.float64)


@triton.jit
def store_weights(saved, logw, scale, at, mask):
    """Store exp(logw + reference), and logw for the path that adds logarithms."""
    relative = logw + scale.reference.to(tl.float64)
    tl.store(saved.weights + at, tl.exp(tl.where(relative > 80.0, 80.0, relative)).to(tl.float32), mask=mask)
    tl.store(saved.log_weights + at, logw.to(tl.float32), mask=mask)
    if tl.sum((mask & (relative > FAST_WEIGHT)).to(tl.int32)) > 0:
        tl.atomic_max(saved.scalars + SLOW, 1.0, sem="relaxed")


@triton.jit
def total_loss(value, parts, total, scalars, factor, BLOCK: tl.constexpr):
    """total () <- factor times the sum of the programs' ``value``, which the last program to get here adds up in the
    order of the programs. ``parts``: (programs,) float64."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(parts + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), value)
    # The one step of the launch with an order: it publishes this program's value, and shows it those of the others.
    before = tl.atomic_add(scalars + FINISHED, 1.0, sem="acq_rel")
    if before == (programs - 1).to(tl.float32):
        i = tl.arange(0, BLOCK)
        added = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, programs, BLOCK):
            added += tl.load(parts + start + i, mask=start + i < programs, other=0.0)
        tl.store(total, (factor * tl.sum(added, 0)).to(tl.float32))


@triton.jit(do_not_specialize=[*Sizes._fields, "first", "own"])
def view_tables_kernel(
    sums, saved, ids, loss, parts, loss_factor: tl.float64,
    rows, batch, padded, queue, views, core_view, columns, first, own, stride,
    WIDTH: tl.constexpr, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Program (samples of first .. first + own, view u): the losses of these anchors, and their ``weights``,
    ``log_weights`` and ``positives``, which are inner products of the rows in float32. WIDTH: C, or the power of 2
    above it. ``loss``: (V, own), or () for loss_factor times the sum, with ``parts`` (:func:`total_loss`). ``ids``:
    ``SampleIds`` of duplicates, or None.

    If ``rules.crossed``, the program has samples that follow each other in ``saved.order``, so that few classes are
    among them; those of other processes are left out."""
    BLOCK: tl.constexpr = tile.BLOCK
    BLOCK_K: tl.constexpr = tile.BLOCK_K
    sizes = Sizes(rows, batch, padded, queue, views, core_view, columns)
    has_queue = queue > 0
    u = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if rules.crossed:
        sample = tl.load(saved.order + tl.minimum(place, batch - 1)).to(tl.int32)
        valid = (place < batch) & (sample >= first) & (sample < first + own)
        place = sample - first
        group = tl.load(saved.classes.first + sample)
        size = tl.load(saved.classes.end + sample) - group
        several = size > 1
        mine = tl.where(several, -1, sample)  # a class of several samples counts in its own sums
        mean = tl.zeros((BLOCK, WIDTH), tl.float64)
    else:
        valid = place < own
        sample = first + tl.minimum(place, own - 1)  # rows past the last are read, too
        mine = sample if ids is None else load_ids(ids, sample, sample < batch)
        several, mean = None, None
    row = u * padded + sample
    column = tl.arange(0, WIDTH)
    k = tl.arange(0, BLOCK_K)
    scale = score_reference(saved.scalars, rules.normalize)
    n = tl.full((BLOCK, WIDTH), float("-inf"), tl.float64)
    p = tl.zeros((BLOCK, WIDTH), tl.float64)
    for v in range(views + has_queue.to(tl.int32)):
        is_queue = v == views
        if negatives_meet(u, v, is_queue, core_view, rules.columns):
            there = Column(v, v * padded, tl.where(is_queue, queue, batch), v != views)
            value = negatives(sums, saved, Anchors(row, mine, valid), there, ids, scale, sizes, stride, tile)
            n = tl.where((column == v)[None, :], value[:, None], n)
        if (v != u) & (v < views):
            dot = tl.zeros((BLOCK,), tl.float32)
            for at in range(0, stride, BLOCK_K):
                mask = valid[:, None] & (at + k < stride)[None, :]
                here = row.to(tl.int64)[:, None] * stride + (at + k)[None, :]
                x = tl.load(saved.rows + here, mask=mask, other=0.0)
                other = (v * padded + sample).to(tl.int64)
                y = tl.load(saved.rows + other[:, None] * stride + (at + k)[None, :], mask=mask, other=0.0)
                dot += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
            score = dot.to(tl.float64) * scale.factor.to(tl.float64)
            if saved.logq is not None:
                score -= tl.load(saved.logq + v * padded + sample).to(tl.float64)
            p = tl.where((column == v)[None, :], score[:, None], p)
            if rules.crossed:
                of_class = class_mean(saved, row, group, size, valid, v * padded, rows, scale, stride, tile)
                mean = tl.where((column == v)[None, :], of_class[:, None], mean)
    value, logw, c = anchor_tables(n, p, several, mean, u, column, core_view, views, has_queue, rules)
    if parts is None:
        tl.store(loss + u.to(tl.int64) * own + place, value.to(tl.float32), mask=valid)
    else:
        total_loss(tl.sum(tl.where(valid, value, 0.0), 0), parts, loss, saved.scalars, loss_factor, PARTS_BLOCK)
    # (BLOCK, WIDTH) tables, a few columns: element (i, v) goes to [v][i].
    at = column[None, :] * rows + row[:, None]
    mask = valid[:, None] & (column < views + has_queue.to(tl.int32))[None, :]
    store_weights(saved, logw, scale, at, mask)
    tl.store(saved.positives + at, c.to(tl.float32), mask=mask & (column < views)[None, :])
    if rules.crossed:
        share = tl.where(several, 1.0 / ((views - 1) * size), 0.0)
        tl.store(saved.positives + views * rows + row, share, mask=valid)


PARTS_BLOCK = tl.constexpr(1024)
