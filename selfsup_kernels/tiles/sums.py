"""The quadratic part of the forward: sums over negatives of exp(score - reference), each pair of rows computed once.

The matrix of scores is symmetric: tile (x, y) adds its row sums to the rows of x and its column sums to the rows of y.
A program keeps the rows of y and their column sums in registers, streams blocks x past them, and adds row sums to
memory atomically. Block J meets blocks J, J + 1, ..., J + n / 2 (mod n), so that every block has the same work.

With ``SYMMETRIC = False`` (``torch.use_deterministic_algorithms``) a program computes all columns of its rows, which is
twice the work, and adds each sum once, so that the result does not depend on the order of execution. Over many
processes, a program computes a part of the columns of its process's rows.
"""

import triton
import triton.language as tl

from selfsup_kernels.info_nce.objectives import Columns
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.tile import load_tile, negatives_meet, relative_exponential, score_reference, tile_scores


@triton.jit
def _decode(
    item,
    blocks,
    first_block,
    own_blocks,
    VIEWS,
    CORE,
    QUEUE_BLOCKS,
    CHUNK,
    SYMMETRIC: tl.constexpr,
    CROSS: tl.constexpr,
):
    """Return, for a work item: the view u of the rows that stay, the view v of those that stream (VIEWS: the queue),
    the block of u, and the first offset on the circle and the one past the last."""
    if SYMMETRIC:
        own_length = blocks // 2 + 1
        own_chunks = tl.cdiv(own_length, CHUNK)
        own = 0 if CROSS else VIEWS * blocks * own_chunks
        pairs = tl.where(CORE < 0, VIEWS * (VIEWS - 1) // 2, VIEWS - 1)
        cross_chunks = tl.cdiv(blocks, CHUNK)
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
            u = tl.where(CORE < 0, pair % VIEWS, CORE)
            v = (u + tl.where(CORE < 0, pair // VIEWS, pair) + 1) % VIEWS
            chunk = (item - own) % per // blocks
            length = blocks
        else:
            per = blocks * tl.cdiv(QUEUE_BLOCKS, CHUNK)
            u = (item - own - cross) // per
            v = VIEWS
            chunk = (item - own - cross) % per // blocks
            length = QUEUE_BLOCKS
        y_block = item % blocks
    else:
        chunks = tl.cdiv(tl.maximum(blocks, QUEUE_BLOCKS), CHUNK)
        u = item // own_blocks % VIEWS
        chunk = item // own_blocks // VIEWS % chunks
        v = item // own_blocks // VIEWS // chunks
        length = tl.where(v == VIEWS, QUEUE_BLOCKS, blocks)
        length = tl.where(negatives_meet(u, v, v == VIEWS, CORE, CROSS), length, 0)
        y_block = first_block + item % own_blocks
    return u, v, y_block, chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)


@triton.jit
def _stream(
    source_x,
    source_y,
    y,
    sums,
    classes,
    scale,
    reference,
    u,
    v,
    y_block,
    y_local,
    y_row,
    start,
    skip,
    skipped,
    steps,
    limit,
    count,
    rows,
    BATCH,
    PADDED,
    VIEWS,
    MASKED: tl.constexpr,
    LABELS: tl.constexpr,
    PAIRED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    RESIDENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stream blocks of view v past the rows of y, at offsets start, start + 1, ... on the circle, without ``skipped``
    of them from ``skip`` on. Add the row sums to memory; return the column sums.

    Without MASKED every pair of a tile counts, except rows past the end. Nearly all tiles are of that kind, and their
    loop has no registers to spare for masks.
    """
    STEPS: tl.constexpr = SPAN // BLOCK_M
    if PAIRED:
        column_sums = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    else:
        column_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, steps * STEPS):
        offset = start + t // STEPS
        if MASKED:
            offset = tl.where(offset < skip, offset, offset + skipped)
        x_block = y_block + offset
        x_block = tl.where(v == VIEWS, offset, tl.where(x_block >= count, x_block - count, x_block))
        x_local = x_block * SPAN + t % STEPS * BLOCK_M
        x_row = v * PADDED + x_local
        x = load_tile(source_x, x_row, 0, STRIDE, BLOCK_M, BLOCK_K, DESCRIPTOR) if RESIDENT else None
        s = tile_scores(
            source_x,
            source_y,
            x,
            y,
            x_row,
            y_row,
            STRIDE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            RESIDENT,
            DESCRIPTOR,
            PRECISION,
        )
        e = relative_exponential(s, scale, reference, NORMALIZE)
        xs = x_local + tl.arange(0, BLOCK_M)
        if x_local + BLOCK_M > limit:
            e = tl.where((xs < limit)[:, None], e, 0.0)
        if MASKED:
            ys = y_local + tl.arange(0, BLOCK_N)
            if LABELS:
                x_class = tl.load(classes + xs, mask=xs < BATCH, other=-1)
                y_class = tl.load(classes + ys, mask=ys < BATCH, other=-2)
                keep = x_class[:, None] != y_class[None, :]
            else:
                keep = xs[:, None] != ys[None, :]
            e = tl.where(keep | (v == VIEWS), e, 0.0)
        # Add what one thread holds; across threads only once per work item.
        if PAIRED:
            column_sums += tl.sum(tl.reshape(e, (BLOCK_M // 16, 2, 8, BLOCK_N)), 1)
        else:
            column_sums += e
        if SYMMETRIC:
            # A tile on the diagonal holds each pair twice: its column sums are complete.
            if (v != VIEWS) & ((v != u) | (x_block != y_block)):
                if MASKED:
                    e = tl.where((ys < BATCH)[None, :], e, 0.0)
                # No thread of this launch reads a sum. Triton's default memory order would add a fence of the whole
                # device, which also empties the L1 cache, to every tile.
                at = sums + u * rows + x_row + tl.arange(0, BLOCK_M)
                tl.atomic_add(at, tl.sum(e, 1), mask=xs < BATCH, sem="relaxed")
    if PAIRED:
        column_sums = tl.sum(column_sums, 1)
    return tl.sum(column_sums, 0)


@triton.jit(
    do_not_specialize=[
        "rows",
        "BATCH",
        "PADDED",
        "QUEUE",
        "VIEWS",
        "CORE",
        "CHUNK",
        "items",
        "first_block",
        "own_blocks",
    ]
)
def sums_kernel(
    source_x,
    source_y,
    sums,
    scalars,
    classes,
    ends,
    rows,
    BATCH,
    PADDED,
    QUEUE,
    VIEWS,
    CORE,
    CHUNK,
    items,
    first_block,
    own_blocks,
    PART: tl.constexpr,
    LABELS: tl.constexpr,
    PAIRED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CROSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    RESIDENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[c, i] += sum of exp(S_ij - reference) over the negatives j of row i in column c (the queue is the last one).

    PART: "clean" computes the tiles in which every pair counts, "masked" the others, "all" all of them with masks. The
    circle consists of spans, the blocks of the clean launch; a program's own block is a span or a piece of one. The
    views follow each other at a distance of PADDED rows, then the queue. PAIRED: a thread holds rows r and r + 8 of a
    tile's product (mma and wgmma; with tcgen05 it holds one row).
    """
    PIECES: tl.constexpr = SPAN // BLOCK_N
    blocks = tl.cdiv(BATCH, SPAN)
    queue_blocks = tl.cdiv(QUEUE, SPAN)
    scale, reference = score_reference(scalars, NORMALIZE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        u, v, y_block, first, last = _decode(
            item // PIECES, blocks, first_block, own_blocks, VIEWS, CORE, queue_blocks, CHUNK, SYMMETRIC, CROSS
        )
        span = y_block * SPAN
        y_local = span + item % PIECES * BLOCK_N
        y_row = u * PADDED + y_local
        limit = tl.where(v == VIEWS, QUEUE, BATCH)
        count = tl.where(v == VIEWS, queue_blocks, blocks)
        # At offsets [clean, dirty) of the circle every pair counts.
        if v == VIEWS:
            clean, dirty = first, last
        else:
            if LABELS:
                clean = tl.cdiv(tl.load(ends + tl.minimum(span + SPAN, BATCH) - 1), SPAN) - y_block
                dirty = blocks + tl.load(classes + span) // SPAN - y_block
            else:
                clean, dirty = 1, blocks
            if SYMMETRIC & (span + SPAN > BATCH):
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
            y = load_tile(source_y, y_row, 0, STRIDE, BLOCK_N, BLOCK_K, DESCRIPTOR) if RESIDENT else None
            column_sums = _stream(
                source_x,
                source_y,
                y,
                sums,
                classes,
                scale,
                reference,
                u,
                v,
                y_block,
                y_local,
                y_row,
                start,
                clean,
                skipped,
                steps,
                limit,
                count,
                rows,
                BATCH,
                PADDED,
                VIEWS,
                PART != "clean",
                LABELS,
                PAIRED,
                SYMMETRIC,
                NORMALIZE,
                STRIDE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SPAN,
                RESIDENT,
                DESCRIPTOR,
                PRECISION,
            )
            ys = y_local + tl.arange(0, BLOCK_N)
            at = sums + v * rows + y_row + tl.arange(0, BLOCK_N)
            tl.atomic_add(at, column_sums, mask=ys < BATCH, sem="relaxed")


def pair_sums(layout, stored, sums, scalars, classes, precision):
    """Launch :func:`sums_kernel` over all tiles. ``classes``: ``Saved.classes``."""
    call, cross = layout.call, layout.call.columns == Columns.OTHER
    begins, ends = classes if call.labelled else (None, None)
    clean, masked = (
        configs.lookup(k, launcher.arch_of(stored), stored.dtype, layout.stride) for k in ("sums", "masked_sums")
    )
    processors = launcher.processors_of(stored)
    deterministic = launcher.deterministic()
    symmetric = not (deterministic or layout.partial)
    pairs = layout.views * (layout.views - 1) // 2 if call.core_view < 0 else layout.views - 1
    own = 0 if cross else layout.views

    def blocks(config):
        return launcher.cdiv(layout.batch, config.block_n), launcher.cdiv(layout.call.queue_rows, config.block_n)

    def tiles(config):
        n, q = blocks(config)
        if not symmetric:
            return layout.own_blocks(config.block_n)[1] * layout.views * (layout.views * n + q)
        return n * (own * (n // 2 + 1) + pairs * n + layout.views * q)

    # Few tiles take one launch with masks. Of many tiles only a small share needs masks.
    many = not deterministic and tiles(clean) >= launcher.MANY_TILES * processors * clean.programs
    for part, config in (("clean", clean), ("masked", masked)) if many else (("all", masked),):
        circle = clean if many else config  # both launches divide the work along the same blocks
        configs.check_divides("sums", circle, config)
        n, q = blocks(circle)
        first_block, own_blocks = layout.own_blocks(circle.block_n)
        programs = processors * config.programs
        # Long enough to load a block of rows once for many tiles, short enough for eight rounds of work per program. In
        # the masked part nearly all items are empty, and finding that out takes loads and divisions: so fewer items,
        # but enough that several programs share the last block's row, which is masked throughout.
        chunk = max(4, min(64, n // 8)) if part == "masked" else max(1, min(64, tiles(circle) // (8 * programs)))
        if symmetric:
            rounds = (own * launcher.cdiv(n // 2 + 1, chunk), pairs * launcher.cdiv(n, chunk))
            items = n * (sum(rounds) + layout.views * launcher.cdiv(q, chunk))
        else:
            chunk = max(n, q) if deterministic else chunk
            items = own_blocks * layout.views * (layout.views + (q > 0)) * launcher.cdiv(max(n, q), chunk)
        items *= circle.block_n // config.block_n
        x, y = launcher.tile_sources(stored, config)
        launcher.launch(
            sums_kernel,
            (min(items, programs),),
            x,
            y,
            sums,
            scalars,
            begins,
            ends,
            layout.rows,
            layout.batch,
            layout.padded,
            layout.call.queue_rows,
            layout.views,
            call.core_view,
            chunk,
            items,
            first_block,
            own_blocks,
            PART=part,
            LABELS=layout.call.labelled,
            PAIRED=launcher.arch_of(stored) // 10 != 10,
            SYMMETRIC=symmetric,
            CROSS=cross,
            NORMALIZE=call.normalize,
            STRIDE=layout.stride,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SPAN=circle.block_n,
            RESIDENT=config.block_k >= layout.stride,
            DESCRIPTOR=config.descriptor,
            PRECISION=precision,
            **config.options,
        )
