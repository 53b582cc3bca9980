"""The quadratic part of the forward: sums over negatives of exp(score - reference), each pair of rows computed once.

The matrix of scores is symmetric: tile (x, y) adds its row sums to the rows of x and its column sums to the rows of y.
A program keeps the rows of y and their column sums in registers, streams blocks x past them, and adds row sums to
memory atomically. The n blocks of a view lie on a circle: block J meets those at offsets 0, 1, ..., n / 2 from it, so
that every block has the same work.

With ``SYMMETRIC = False`` (``torch.use_deterministic_algorithms``) a program computes all columns of its rows, which is
twice the work, and adds each sum once, so that the result does not depend on the order of execution. Over many
processes, a program computes a part of the columns of its process's rows.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import Sizes, SumsWork
from selfsup_kernels.tiles.kernels.tile import (
    OTHER,
    half_odds,
    load_ids,
    load_tile,
    negatives_meet,
    relative_exponential,
    score_reference,
    tile_products,
)


class Item(NamedTuple):
    """Made in a kernel: a work item, the blocks of view v that stream past a block of view u."""

    u: int
    v: int
    """V: the queue."""
    block: int
    """The block that stays."""
    local: int
    """Its first row, counted within the view."""
    row: int
    """Its first row, counted among the stored rows."""
    start: int
    """The first offset on the circle."""
    steps: int
    """The number of offsets that follow, without those that are skipped."""
    skip: int
    """The first offset that is skipped."""
    skipped: int
    """The number of offsets that are skipped."""
    blocks: int
    """The length of the circle of view v."""
    limit: int
    """Rows of view v."""


@triton.jit
def _decode(item, blocks, queue_blocks, sizes, work, SYMMETRIC: tl.constexpr):
    """Return, for a work item: the view u of the rows that stay, the view v of those that stream (V: the queue),
    the block of u, and the first offset on the circle and the one past the last."""
    if SYMMETRIC:
        own_length = blocks // 2 + 1
        own_chunks = tl.cdiv(own_length, work.chunk)
        own = tl.where(sizes.columns == OTHER, 0, sizes.views * blocks * own_chunks)
        pairs = tl.where(sizes.core_view < 0, sizes.views * (sizes.views - 1) // 2, sizes.views - 1)
        cross_chunks = tl.cdiv(blocks, work.chunk)
        cross = pairs * blocks * cross_chunks
        if item < own:
            per = blocks * own_chunks
            u = item // per
            v = u
            chunk = item % per // blocks
            # On an even circle two blocks that face each other meet once, not twice.
            length = tl.where((blocks % 2 == 0) & (item % blocks >= blocks // 2), own_length - 1, own_length)
        elif item < own + cross:
            per = blocks * cross_chunks
            pair = (item - own) // per
            u = tl.where(sizes.core_view < 0, pair % sizes.views, sizes.core_view)
            v = (u + tl.where(sizes.core_view < 0, pair // sizes.views, pair) + 1) % sizes.views
            chunk = (item - own) % per // blocks
            length = blocks
        else:
            per = blocks * tl.cdiv(queue_blocks, work.chunk)
            u = (item - own - cross) // per
            v = sizes.views
            chunk = (item - own - cross) % per // blocks
            length = queue_blocks
        y_block = item % blocks
    else:
        chunks = tl.cdiv(tl.maximum(blocks, queue_blocks), work.chunk)
        u = item // work.own_blocks % sizes.views
        chunk = item // work.own_blocks // sizes.views % chunks
        v = item // work.own_blocks // sizes.views // chunks
        length = tl.where(v == sizes.views, queue_blocks, blocks)
        length = tl.where(negatives_meet(u, v, v == sizes.views, sizes.core_view, sizes.columns), length, 0)
        y_block = work.first_block + item % work.own_blocks
    return u, v, y_block, chunk * work.chunk, tl.minimum(chunk * work.chunk + work.chunk, length)


@triton.jit
def _stream(
    source_x, source_y, y, item, sums, classes, ids, logq, scale, sizes, stride,
    MASKED: tl.constexpr, PAIRED: tl.constexpr, SYMMETRIC: tl.constexpr, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Stream blocks of view v past the rows of y. Add the row sums to memory; return the column sums.

    Without MASKED every pair of a tile counts, except rows past the end. Nearly all tiles are of that kind, and their
    loop has no registers to spare for masks. With ``ids`` they have one: duplicates may be anywhere.
    """
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    STEPS: tl.constexpr = tile.SPAN_N // BLOCK_M
    if PAIRED:
        column_sums = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    else:
        column_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, item.steps * STEPS):
        offset = item.start + t // STEPS
        if MASKED:
            offset = tl.where(offset < item.skip, offset, offset + item.skipped)
        x_block = item.block + offset
        x_block = tl.where(
            item.v == sizes.views, offset, tl.where(x_block >= item.blocks, x_block - item.blocks, x_block)
        )
        x_local = x_block * tile.SPAN_N + t % STEPS * BLOCK_M
        x_row = item.v * sizes.padded + x_local
        x = load_tile(source_x, x_row, 0, stride, BLOCK_M, tile.BLOCK_K, tile) if tile.RESIDENT else None
        s = tile_products(source_x, source_y, x, y, x_row, item.row, stride, tile)
        e = relative_exponential(s, scale, rules.normalize)
        xs = x_local + tl.arange(0, BLOCK_M)
        if x_local + BLOCK_M > item.limit:
            e = tl.where((xs < item.limit)[:, None], e, 0.0)
        ys = item.local + tl.arange(0, BLOCK_N)
        if ids is not None:
            x_id, y_id = load_ids(ids, xs, xs < sizes.batch), load_ids(ids, ys, ys < sizes.batch)
            e = tl.where((x_id[:, None] != y_id[None, :]) | (item.v == sizes.views), e, 0.0)
        elif MASKED:
            if rules.labelled:
                x_class = tl.load(classes.first + xs, mask=xs < sizes.batch, other=-1)
                y_class = tl.load(classes.first + ys, mask=ys < sizes.batch, other=-2)
                keep = x_class[:, None] != y_class[None, :]
            else:
                keep = xs[:, None] != ys[None, :]
                if rules.crossed:  # a class of several samples is among the terms of its own sums
                    first = tl.load(classes.first + ys, mask=ys < sizes.batch, other=0)
                    end = tl.load(classes.end + ys, mask=ys < sizes.batch, other=0)
                    keep = keep | (end - first > 1)[None, :]
            e = tl.where(keep | (item.v == sizes.views), e, 0.0)
        to_columns = e
        if logq is not None:  # of the rows, the columns of these anchors
            x_odds = half_odds(logq, x_row + tl.arange(0, BLOCK_M), xs < item.limit)[:, None]
            to_columns = e * x_odds * x_odds
        # Add what one thread holds; across threads only once per work item.
        if PAIRED:
            column_sums += tl.sum(tl.reshape(to_columns, (BLOCK_M // 16, 2, 8, BLOCK_N)), 1)
        else:
            column_sums += to_columns
        if SYMMETRIC:
            # A tile on the diagonal holds each pair twice: its column sums are complete.
            if (item.v != sizes.views) & ((item.v != item.u) | (x_block != item.block)):
                if MASKED:
                    e = tl.where((ys < sizes.batch)[None, :], e, 0.0)
                if logq is not None:
                    y_odds = half_odds(logq, item.row + tl.arange(0, BLOCK_N), ys < sizes.batch)[None, :]
                    e = e * y_odds * y_odds
                # No thread of this launch reads a sum. Triton's default memory order would add a fence of the whole
                # device, which also empties the L1 cache, to every tile.
                at = sums + item.u * sizes.rows + x_row + tl.arange(0, BLOCK_M)
                tl.atomic_add(at, tl.sum(e, 1), mask=xs < sizes.batch, sem="relaxed")
    if PAIRED:
        column_sums = tl.sum(column_sums, 1)
    return tl.sum(column_sums, 0)


@triton.jit(do_not_specialize=[*Sizes._fields, *SumsWork._fields])
def sums_kernel(
    source_x, source_y, sums, scalars, classes, ids, logq,
    rows, batch, padded, queue, views, core_view, columns,
    items, chunk, first_block, own_blocks, stride,
    PART: tl.constexpr, PAIRED: tl.constexpr, SYMMETRIC: tl.constexpr, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """sums[c, i] += sum of exp(S_ij - reference) over the negatives j of row i in column c (the queue is the last one).

    PART: "clean" computes the tiles in which every pair counts, "masked" the others, "all" all of them with masks. The
    circle consists of spans, the blocks of the clean launch; a program's own block is a span or a piece of one. The
    views follow each other at a distance of sizes.padded rows, then the queue. PAIRED: a thread holds rows r and r + 8
    of a tile's product (mma and wgmma; with tcgen05 it holds one row). ``ids``: ``SampleIds`` of duplicates, or None.
    """
    sizes = Sizes(rows, batch, padded, queue, views, core_view, columns)
    work = SumsWork(items, chunk, first_block, own_blocks)
    SPAN: tl.constexpr = tile.SPAN_N
    PIECES: tl.constexpr = SPAN // tile.BLOCK_N
    MASKED: tl.constexpr = PART != "clean"
    blocks = tl.cdiv(sizes.batch, SPAN)
    queue_blocks = tl.cdiv(sizes.queue, SPAN)
    scale = score_reference(scalars, rules.normalize)
    for number in range(tl.program_id(0), work.items, tl.num_programs(0)):
        u, v, y_block, first, last = _decode(number // PIECES, blocks, queue_blocks, sizes, work, SYMMETRIC)
        span = y_block * SPAN
        y_local = span + number % PIECES * tile.BLOCK_N
        y_row = u * sizes.padded + y_local
        limit = tl.where(v == sizes.views, sizes.queue, sizes.batch)
        count = tl.where(v == sizes.views, queue_blocks, blocks)
        # At offsets [clean, dirty) of the circle every pair counts.
        if v == sizes.views:
            clean, dirty = first, last
        else:
            if rules.labelled:
                clean = tl.cdiv(tl.load(classes.end + tl.minimum(span + SPAN, batch) - 1), SPAN) - y_block
                dirty = blocks + tl.load(classes.first + span) // SPAN - y_block
            else:
                clean, dirty = 1, blocks
            if SYMMETRIC & (span + SPAN > sizes.batch):
                clean = last  # row sums must not have columns past the end
        clean = tl.minimum(tl.maximum(clean, first), last)
        dirty = tl.minimum(tl.maximum(dirty, clean), last)
        skipped = dirty - clean
        if PART == "clean":
            start, steps = clean, skipped
        elif PART == "masked":
            start, steps = first, last - first - skipped
        else:
            start, steps, skipped = first, last - first, 0
        if steps > 0:
            y = load_tile(source_y, y_row, 0, stride, tile.BLOCK_N, tile.BLOCK_K, tile) if tile.RESIDENT else None
            item = Item(u, v, y_block, y_local, y_row, start, steps, clean, skipped, count, limit)
            column_sums = _stream(
                source_x, source_y, y, item, sums, classes, ids, logq, scale, sizes, stride,
                MASKED, PAIRED, SYMMETRIC, rules, tile,
            )  # fmt: skip
            ys = y_local + tl.arange(0, tile.BLOCK_N)
            at = sums + v * sizes.rows + y_row + tl.arange(0, tile.BLOCK_N)
            tl.atomic_add(at, column_sums, mask=ys < sizes.batch, sem="relaxed")
