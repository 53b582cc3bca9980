"""The forward's quadratic part: sums over negatives of exp(score - r), each pair of rows computed once.

Tile (x, y) of the symmetric matrix gives its row sums to the rows of x and its column sums to those of y. A program
keeps the rows of y and the column sums, streams blocks x past them, and adds row sums to memory atomically. Blocks are
paired round a circle, block J with J, J + 1, ..., J + n / 2 (mod n), so that every block has the same work.

With ``SYMMETRIC = False`` (``torch.use_deterministic_algorithms``) a program sees all columns of its rows, at twice the
work, and each sum is added to memory once: no order to depend on.
"""

import triton
import triton.language as tl

from selfsup_kernels.triton import _launch
from selfsup_kernels.triton._tiles import LOG2E, classes_overlap, load_tile, score_reference, tile_scores


@triton.jit
def _decode(item, blocks, VIEWS, CORE, QUEUE_BLOCKS, CHUNK, SYMMETRIC: tl.constexpr, CROSS: tl.constexpr):
    """Work item -> (view u of the rows that stay, view v of those that stream by (VIEWS: the queue), block of u, first and
    last offset, whether row sums count)."""
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
            # An even circle has its opposite block once, not twice.
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
        u = item // blocks % VIEWS
        v = item // blocks // VIEWS
        chunk = 0
        length = tl.where(v == VIEWS, QUEUE_BLOCKS, blocks)
        meets = (CORE < 0) | (u == v) | (u == CORE) | (v == CORE) | (v == VIEWS)
        if CROSS:
            meets = meets & (u != v)
        length = tl.where(meets, length, 0)
        y_block = item % blocks
    return u, v, y_block, chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)


@triton.jit(do_not_specialize=["rows", "BATCH", "PADDED", "QUEUE", "VIEWS", "CORE", "CHUNK", "items"])
def sums_kernel(
    source_x,
    source_y,
    sums,
    state,
    classes,
    rows,
    BATCH,
    PADDED,
    QUEUE,
    VIEWS,
    CORE,
    CHUNK,
    items,
    LABELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CROSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[c, i] += sum of exp(S_ij - r) over the negatives j of row i in view c (the queue is the last column).

    Rows of one view follow each other, PADDED apart from those of the next; the rows of the queue come last.
    """
    STEPS: tl.constexpr = BLOCK_N // BLOCK_M
    blocks = tl.cdiv(BATCH, BLOCK_N)
    queue_blocks = tl.cdiv(QUEUE, BLOCK_N)
    scale, reference = score_reference(state, NORMALIZE)
    scale2, reference2 = scale * LOG2E, reference * LOG2E
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        u, v, y_block, first, last = _decode(item, blocks, VIEWS, CORE, queue_blocks, CHUNK, SYMMETRIC, CROSS)
        y_local = y_block * BLOCK_N
        y_row = u * PADDED + y_local
        limit = tl.where(v == VIEWS, QUEUE, BATCH)
        count = tl.where(v == VIEWS, queue_blocks, blocks)
        ys = y_local + tl.arange(0, BLOCK_N)
        y = load_tile(source_y, y_row, 0, STRIDE, BLOCK_N, BLOCK_K, DESCRIPTOR) if RESIDENT else None
        column_sums = tl.zeros((BLOCK_N,), tl.float32)
        for t in range(first * STEPS, last * STEPS):
            x_block = y_block + t // STEPS
            x_block = tl.where(v == VIEWS, t // STEPS, tl.where(x_block >= count, x_block - count, x_block))
            x_local = x_block * BLOCK_N + t % STEPS * BLOCK_M
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
            e = tl.exp2(s * scale2 - reference2)
            xs = x_local + tl.arange(0, BLOCK_M)
            if LABELS:
                mixed = v != VIEWS
                if mixed:
                    mixed = classes_overlap(classes, x_local, y_local, BATCH, BLOCK_M, BLOCK_N)
            else:
                mixed = (x_block == y_block) & (v != VIEWS)
            if mixed | (x_local + BLOCK_M > limit):
                keep = (xs < limit)[:, None]
                if LABELS:
                    if mixed:
                        x_class = tl.load(classes + xs, mask=xs < BATCH, other=-1)
                        y_class = tl.load(classes + ys, mask=ys < BATCH, other=-2)
                        keep = keep & (x_class[:, None] != y_class[None, :])
                else:
                    keep = keep & ((xs[:, None] != ys[None, :]) | (v == VIEWS))
                e = tl.where(keep, e, 0.0)
            column_sums += tl.sum(e, 0)
            if SYMMETRIC:
                # On the diagonal the tile holds each pair twice, and the column sums have them all.
                if (v != u) | (x_block != y_block):
                    if v != VIEWS:
                        if y_local + BLOCK_N > BATCH:
                            e = tl.where((ys < BATCH)[None, :], e, 0.0)
                        tl.atomic_add(sums + u * rows + x_row + tl.arange(0, BLOCK_M), tl.sum(e, 1), mask=xs < BATCH)
        tl.atomic_add(sums + v * rows + y_row + tl.arange(0, BLOCK_N), column_sums, mask=ys < BATCH)


def pair_sums(layout, config, stored, sums, state, classes, objective_is_cross, core, normalize, precision):
    symmetric = not _launch.deterministic()
    processors = _launch.processors_of(stored)
    programs = processors * config.programs
    n = triton.cdiv(layout.batch, config.block_n)
    q = triton.cdiv(layout.queue, config.block_n)
    if symmetric:
        pairs = layout.views * (layout.views - 1) // 2 if core < 0 else layout.views - 1
        own = 0 if objective_is_cross else layout.views
        tiles = n * (own * (n // 2 + 1) + pairs * n + layout.views * q)
        # Long enough to load a block of rows once for many tiles, short enough for eight rounds of work a program.
        chunk = max(1, min(64, tiles // (8 * programs)))
        items = n * (
            own * triton.cdiv(n // 2 + 1, chunk) + pairs * triton.cdiv(n, chunk) + layout.views * triton.cdiv(q, chunk)
        )
    else:
        chunk = max(n, q)
        items = n * layout.views * (layout.views + (q > 0))
    resident = config.block_k >= layout.stride
    x, y = _launch.tile_sources(stored, config)
    _launch.launch(
        sums_kernel,
        (min(items, programs),),
        x,
        y,
        sums,
        state,
        classes,
        layout.rows,
        layout.batch,
        layout.padded,
        layout.queue,
        layout.views,
        core,
        chunk,
        items,
        LABELS=layout.labels,
        SYMMETRIC=symmetric,
        CROSS=objective_is_cross,
        NORMALIZE=normalize,
        STRIDE=layout.stride,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        RESIDENT=resident,
        DESCRIPTOR=config.descriptor,
        PRECISION=precision,
        **config.options,
    )
