"""The backward's quadratic part: for every row i, the sum over its pairs of G_ij z_j.

A program owns a block of rows, visits all columns, and makes the scores, G and the product with the columns' rows on
the way: no two programs add to one sum, and the bits are the same every time. Rows too long for the accumulator go in
waves (:mod:`selfsup_kernels.tiles.waves`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.arguments import Block, Sizes, only
from selfsup_kernels.tiles.pairs import masked_blocks, pair_gradient, partial_sums
from selfsup_kernels.tiles.tile import SLOW, load_tile, negatives_meet, score_reference
from selfsup_kernels.tiles.waves import in_waves

MOST_COLUMNS = 65536
"""The columns of one launch, at most. Tensor cores truncate when they add: a sum of numbers of one sign loses 4e-9 of
itself per column (tests/test_accumulators.py simulates it). So several launches sum over more columns, and their sums
are added in float32."""


class Work(NamedTuple):
    """One launch's part of the sums, and where it writes them."""

    shares: int
    """The number of programs that share the columns of a block of rows."""
    slot: int
    """The first slot of ``partial`` for pairs of the batch."""
    queue_slot: int
    """The slot for pairs with the queue."""
    first_block: int
    """The first block of this process's rows in each view."""
    own_blocks: int
    """The number of its blocks in each view."""
    part_first: int
    """The first row of each view that ``partial`` has."""
    part_rows: int
    begin: int
    """The first block of each view that a launch visits, counted in visiting order, and the one after the last."""
    end: int


@triton.jit(do_not_specialize=[*Sizes._fields, *Work._fields])
def gradient_kernel(
    source_x, source_y, saved, upstream, partial,
    rows, batch, padded, queue, views, core_view,
    shares, slot, queue_slot, first_block, own_blocks, part_first, part_rows, begin, end,
    PART: tl.constexpr, ACCUMULATE: tl.constexpr, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """partial[slot + k, place of i, :] <- sum over share k of the columns of G_ij z_j; share ``shares`` is the queue's.

    Program (block of rows, share). Every share takes the same number of blocks from every view. PART: "clean" visits
    the blocks in which every pair counts (none if a weight is out of the fast path's range), "masked" the other blocks,
    "all" all of them.

    A launch visits blocks ``begin`` to ``end`` of each view, counted in visiting order. ACCUMULATE: ``partial`` already
    holds the sums over the earlier blocks; add to it.
    """
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_K: tl.constexpr = tile.BLOCK_K
    sizes = Sizes(rows, batch, padded, queue, views, core_view)
    u = tl.program_id(0) // own_blocks
    x_local = (first_block + tl.program_id(0) % own_blocks) * BLOCK_M
    x_row = u * padded + x_local
    share = tl.program_id(1)
    scale = score_reference(saved.scalars, rules.normalize)
    is_slow = tl.load(saved.scalars + SLOW) > 0
    low, high = masked_blocks(saved.classes, x_local, sizes, rules.labelled, tile)
    x = load_tile(source_x, x_row, 0, BLOCK_M, BLOCK_K, tile)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    from_queue = share == shares
    limit = tl.where(from_queue, queue, batch)
    blocks = tl.cdiv(limit, BLOCK_N)
    per = tl.where(from_queue, blocks, tl.cdiv(blocks, shares))
    first = tl.where(from_queue, 0, share * per)
    last = tl.minimum(first + per, blocks)
    # Masked blocks of this share: [low, high), or all of them.
    if PART == "all":
        low, high = first, last
    else:
        low = tl.where(is_slow, first, tl.where(from_queue, last, tl.minimum(tl.maximum(low, first), last)))
        high = tl.where(is_slow, last, tl.where(from_queue, last, tl.minimum(tl.maximum(high, low), last)))
    if PART == "clean":
        start, steps = first, last - first - (high - low)
    else:
        start, steps = low, high - low
    end = tl.minimum(end, steps)
    for v in range(tl.where(from_queue, views, 0), tl.where(from_queue, views + 1, views)):
        if negatives_meet(u, v, from_queue, core_view, rules.columns):
            for t in range(begin, end):
                block = start + t
                if PART == "clean":
                    block = tl.where(block < low, block, block + high - low)
                y_local = block * BLOCK_N
                y_row = v * padded + y_local
                y = load_tile(source_y, y_row, 0, BLOCK_N, BLOCK_K, tile)
                s = tl.dot(x, tl.trans(y), input_precision=tile.PRECISION)
                xs, ys = Block(u, x_local, x_row), Block(v, y_local, y_row)
                g = pair_gradient(s, xs, ys, limit, saved, upstream, scale, sizes, PART != "clean", rules, tile)
                total = tl.dot(g.to(y.dtype), y, total, input_precision=tile.PRECISION)
    to_slot = tl.where(from_queue, queue_slot, slot + share).to(tl.int64)
    at = (to_slot * views + u) * part_rows + x_local - part_first + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    to = partial + at[:, None] * tile.STRIDE + k[None, :]
    inside = (x_local + tl.arange(0, BLOCK_M) < batch)[:, None] & (k < tile.STRIDE)[None, :]
    if ACCUMULATE:  # by atomics, which need no registers for the old sums; no other program adds here
        tl.atomic_add(to, total, mask=inside & (begin < end), sem="relaxed")
    else:
        tl.store(to, total, mask=inside)


def gradient(layout, saved, upstream, factor, precision):
    """Return (partial, how many of its slots hold pairs of the batch; the other slots hold pairs with the queue)."""
    stored = saved.rows
    key = launcher.arch_of(stored), stored.dtype, layout.stride
    clean, masked = (configs.lookup(kernel, *key) for kernel in ("gradient", "masked_gradient"))
    queue = int(layout.call.queue_rows > 0)
    tables = only(saved, "log_weights", "weights", "positives", "scalars", "classes")
    if clean is None or clean.block_k < layout.stride:
        return in_waves(layout, stored, tables, upstream, factor, precision), 1

    def blocks(config):
        return layout.views * layout.own_blocks(config.block_m)[1]

    def shares(config):
        """Return how many programs share the columns of a block: several if few rows would leave SMs idle."""
        programs = config.programs * launcher.sms_of(stored)
        return max(1, min(launcher.cdiv(layout.batch, config.block_n), programs // blocks(config)))

    tiles = blocks(clean) * layout.views * launcher.cdiv(layout.batch, clean.block_n)
    if tiles < launcher.MANY_TILES * clean.programs * launcher.sms_of(stored):
        # Few tiles take one launch with masks. Of many tiles only a small share needs masks.
        splits = shares(masked)
        parts = (("all", masked, splits, 0, splits),)
    else:
        splits = shares(clean) + 1
        parts = (("clean", clean, splits - 1, 0, splits), ("masked", masked, 1, splits - 1, splits + 1))
    partial = partial_sums(layout, splits, queue * len(parts), stored)
    for part, config, count, slot, queue_slot in parts:
        spans = config if part == "all" else clean
        configs.check_divides("gradient", spans, config)
        x, y = launcher.tile_sources(stored, config)
        tile = configs.tile(config, layout.stride, precision, spans, factor)
        longest = launcher.cdiv(launcher.cdiv(layout.batch, config.block_n), count)
        longest = max(longest, launcher.cdiv(layout.call.queue_rows, config.block_n))
        # Three TF32 products of a tile are added to the sum in float32, outside of the tensor cores.
        most = longest if precision == "tf32x3" else max(1, MOST_COLUMNS // (config.block_n * layout.views))
        for begin in range(0, longest, most):
            launcher.launch(
                gradient_kernel,
                (blocks(config), count + queue),
                x,
                y,
                tables,
                upstream,
                partial,
                *layout.sizes,
                *Work(count, slot, queue_slot, *layout.own_blocks(config.block_m), *layout.part, begin, begin + most),
                PART=part,
                ACCUMULATE=begin > 0,
                rules=layout.rules,
                tile=tile,
                **config.options,
            )
    return partial, splits
