"""The backward's quadratic part: for every row i, the sum over its pairs of G_ij z_j.

A program owns a block of rows, visits all columns, and makes the scores, G and the product with the columns' rows on
the way: no two programs add to one sum, and the bits are the same every time. Rows too long for the accumulator go in
waves (:mod:`selfsup_kernels.tiles.kernels.waves`).
"""

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import Block, GradientWork, Sizes
from selfsup_kernels.tiles.kernels.pairs import masked_blocks, pair_gradient
from selfsup_kernels.tiles.kernels.tile import SLOW, load_tile, negatives_meet, score_reference


@triton.jit(do_not_specialize=[*Sizes._fields, *GradientWork._fields])
def gradient_kernel(
    source_x, source_y, saved, ids, upstream, partial,
    rows, batch, padded, queue, views, core_view, columns,
    shares, slot, queue_slot, first_block, own_blocks, part_first, part_rows, begin, end,
    PART: tl.constexpr, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """partial[slot + k, place of i, :] <- sum over share k of the columns of G_ij z_j; share ``shares`` is the queue's.

    Program (block of rows, share). Every share takes the same number of blocks from every view. PART: "clean" visits
    the blocks in which every pair counts (none if a weight is out of the fast path's range), "masked" the other blocks,
    "all" all of them.

    A launch visits blocks ``begin`` to ``end`` of each view, counted in visiting order. If ``begin`` is not 0,
    ``partial`` already holds the sums over the earlier blocks, and they are added to.
    """
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_K: tl.constexpr = tile.BLOCK_K
    sizes = Sizes(rows, batch, padded, queue, views, core_view, columns)
    u = tl.program_id(0) // own_blocks
    x_local = (first_block + tl.program_id(0) % own_blocks) * BLOCK_M
    x_row = u * padded + x_local
    share = tl.program_id(1)
    scale = score_reference(saved.scalars, rules.normalize)
    is_slow = tl.load(saved.scalars + SLOW) > 0
    low, high = masked_blocks(saved.classes, x_local, sizes, rules.labelled, tile)
    x = load_tile(source_x, x_row, 0, BLOCK_K, BLOCK_M, BLOCK_K, tile)
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
        if negatives_meet(u, v, from_queue, core_view, columns):
            for t in range(begin, end):
                block = start + t
                if PART == "clean":
                    block = tl.where(block < low, block, block + high - low)
                y_local = block * BLOCK_N
                y_row = v * padded + y_local
                y = load_tile(source_y, y_row, 0, BLOCK_K, BLOCK_N, BLOCK_K, tile)
                s = tl.dot(x, tl.trans(y), input_precision=tile.PRECISION)
                xs, ys = Block(u, x_local, x_row), Block(v, y_local, y_row)
                g = pair_gradient(s, xs, ys, limit, saved, ids, upstream, scale, sizes, PART != "clean", rules, tile)
                total = tl.dot(g.to(y.dtype), y, total, input_precision=tile.PRECISION)
    to_slot = tl.where(from_queue, queue_slot, slot + share).to(tl.int64)
    at = (to_slot * views + u) * part_rows + x_local - part_first + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    to = partial + at[:, None] * BLOCK_K + k[None, :]
    inside = (x_local + tl.arange(0, BLOCK_M) < batch)[:, None]
    if begin > 0:  # by atomics, which need no registers for the old sums; no other program adds here
        tl.atomic_add(to, total, mask=inside & (begin < end), sem="relaxed")
    else:
        tl.store(to, total, mask=inside)
