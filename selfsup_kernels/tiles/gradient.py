"""The backward's quadratic part: for every row i, the sum over its pairs of G_ij z_j.

A program owns a block of rows, visits all columns, and makes the scores, G and the product with the columns' rows on
the way: no two programs add to one sum, and the bits are the same every time. Rows too long for the accumulator go in
waves (``info_nce_waves``).
"""

import triton
import triton.language as tl

from selfsup_kernels.info_nce.objectives import Columns
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.pairs import masked_blocks, pair_gradient, partial_sums
from selfsup_kernels.tiles.tile import SLOW, load_tile, negatives_meet, score_reference
from selfsup_kernels.tiles.waves import in_waves

MOST_COLUMNS = 65536
"""Of one launch. Tensor cores cut off what they add up: of numbers of one sign the sum loses 4e-9 of itself for each
column (tests/test_accumulators.py simulates it). So sums over more columns are made by several launches, and added up
in float32."""


@triton.jit(
    do_not_specialize=[
        "rows",
        "BATCH",
        "PADDED",
        "QUEUE",
        "VIEWS",
        "CORE",
        "SHARES",
        "SLOT",
        "QUEUE_SLOT",
        "first_block",
        "own_blocks",
        "part_first",
        "part_rows",
        "begin",
        "end",
    ],
    do_not_specialize_on_alignment=["ends"],  # half of one tensor: where it begins depends on the number of rows
)
def gradient_kernel(
    source_x,
    source_y,
    weights,
    log_weights,
    upstream,
    scalars,
    classes,
    ends,
    positives,
    partial,
    rows,
    BATCH,
    PADDED,
    QUEUE,
    VIEWS,
    CORE,
    SHARES,
    SLOT,
    QUEUE_SLOT,
    first_block,
    own_blocks,
    part_first,
    part_rows,
    begin,
    end,
    PART: tl.constexpr,
    AGAIN: tl.constexpr,
    LABELS: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    CROSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN_M: tl.constexpr,
    SPAN_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[SLOT + k, place of i, :] <- sum over share k of the columns of G_ij z_j; share SHARES is the queue's.

    Program (block of rows, share). Each share has as many blocks of every view. PART: the blocks of which no pair is
    left out ("clean"; none of them where weights are out of its range), the others ("masked"), or "all".

    Of each view's blocks only those from ``begin`` to ``end``, in the order of visits; AGAIN: other launches have left
    the sums over those before in ``partial``.
    """
    u = tl.program_id(0) // own_blocks
    x_local = (first_block + tl.program_id(0) % own_blocks) * BLOCK_M
    x_row = u * PADDED + x_local
    share = tl.program_id(1)
    scale, reference = score_reference(scalars, NORMALIZE)
    is_slow = tl.load(scalars + SLOW) > 0
    low, high = masked_blocks(classes, ends, x_local, BATCH, SPAN_M, SPAN_N, BLOCK_N, LABELS)
    x = load_tile(source_x, x_row, 0, STRIDE, BLOCK_M, BLOCK_K, DESCRIPTOR)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    from_queue = share == SHARES
    limit = tl.where(from_queue, QUEUE, BATCH)
    blocks = tl.cdiv(limit, BLOCK_N)
    per = tl.where(from_queue, blocks, tl.cdiv(blocks, SHARES))
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
    for v in range(tl.where(from_queue, VIEWS, 0), tl.where(from_queue, VIEWS + 1, VIEWS)):
        if negatives_meet(u, v, from_queue, CORE, CROSS):
            for t in range(begin, end):
                block = start + t
                if PART == "clean":
                    block = tl.where(block < low, block, block + high - low)
                y_local = block * BLOCK_N
                y_row = v * PADDED + y_local
                y = load_tile(source_y, y_row, 0, STRIDE, BLOCK_N, BLOCK_K, DESCRIPTOR)
                s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
                g = pair_gradient(
                    s,
                    x_local,
                    y_local,
                    x_row,
                    y_row,
                    u,
                    v,
                    weights,
                    log_weights,
                    upstream,
                    classes,
                    positives,
                    scale,
                    reference,
                    rows,
                    BATCH,
                    limit,
                    VIEWS,
                    PART != "clean",
                    LABELS,
                    POSITIVES,
                    NUMERATOR,
                    NORMALIZE,
                    BLOCK_M,
                    BLOCK_N,
                    FACTOR,
                )
                total = tl.dot(g.to(y.dtype), y, total, input_precision=PRECISION)
    slot = tl.where(from_queue, QUEUE_SLOT, SLOT + share).to(tl.int64)
    at = (slot * VIEWS + u) * part_rows + x_local - part_first + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    to = partial + at[:, None] * STRIDE + k[None, :]
    inside = (x_local + tl.arange(0, BLOCK_M) < BATCH)[:, None] & (k < STRIDE)[None, :]
    if AGAIN:  # by atomics, which need no registers for the other sums; nothing else adds here, so the order is one
        tl.atomic_add(to, total, mask=inside & (begin < end), sem="relaxed")
    else:
        tl.store(to, total, mask=inside)


def gradient(layout, saved, upstream, factor, precision):
    """Return (partial, how many of its slots hold pairs of the batch; the other slots hold pairs with the queue)."""
    call, stored = layout.call, saved.rows
    key = launcher.arch_of(stored), stored.dtype, layout.stride
    clean, masked = (configs.lookup(kernel, *key) for kernel in ("gradient", "masked_gradient"))
    constants = {"LABELS": call.labelled, "POSITIVES": call.inside, "NUMERATOR": call.numerator}
    constants |= {"NORMALIZE": call.normalize, "STRIDE": layout.stride, "FACTOR": factor, "PRECISION": precision}
    classes = saved.classes if call.labelled else (None, None)
    tables = (saved.weights, saved.log_weights, upstream, saved.scalars, *classes, saved.positives)
    queue = int(layout.call.queue_rows > 0)
    if clean is None or clean.block_k < layout.stride:
        return in_waves(layout, stored, tables, constants), 1

    def blocks(config):
        return layout.views * layout.own_blocks(config.block_m)[1]

    def shares(config):
        """How many programs share the columns of a block: several where few rows would leave SMs idle."""
        programs = config.programs * launcher.processors_of(stored)
        return max(1, min(launcher.cdiv(layout.batch, config.block_n), programs // blocks(config)))

    tiles = blocks(clean) * layout.views * launcher.cdiv(layout.batch, clean.block_n)
    if tiles < launcher.MANY_TILES * clean.programs * launcher.processors_of(stored):
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
        longest = launcher.cdiv(launcher.cdiv(layout.batch, config.block_n), count)
        longest = max(longest, launcher.cdiv(layout.call.queue_rows, config.block_n))
        # Three products of one are added up in float32 for each tile.
        most = longest if precision == "tf32x3" else max(1, MOST_COLUMNS // (config.block_n * layout.views))
        for begin in range(0, longest, most):
            launcher.launch(
                gradient_kernel,
                (blocks(config), count + queue),
                x,
                y,
                *tables,
                partial,
                layout.rows,
                layout.batch,
                layout.padded,
                layout.call.queue_rows,
                layout.views,
                call.core_view,
                count,
                slot,
                queue_slot,
                *layout.own_blocks(config.block_m),
                *layout.part,
                begin,
                begin + most,
                PART=part,
                AGAIN=begin > 0,
                CROSS=call.columns == Columns.OTHER,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                SPAN_M=spans.block_m,
                SPAN_N=spans.block_n,
                DESCRIPTOR=config.descriptor,
                **constants,
                **config.options,
            )
    return partial, splits
