"""The quadratic part of the backward for rows that are too long for an accumulator in registers. It goes in waves: one
kernel writes a block of G to a workspace, and a plain matrix product reads it."""

import triton
import triton.language as tl

from selfsup_kernels.info_nce.objectives import negative_views
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.pairs import masked_blocks, pair_gradient, partial_sums
from selfsup_kernels.tiles.tile import SLOW, load_tile, score_reference, tile_scores


# WIDTH, a multiple of 256, is no constant: it follows the size of the batch, and each would be a kernel of its own.
@triton.jit(
    do_not_specialize=["rows", "BATCH", "PADDED", "QUEUE", "VIEWS", "x_first", "y_first", "u", "v"],
    do_not_specialize_on_alignment=["ends"],  # as in ``gradient_kernel``
)
def wave_kernel(
    source_x,
    source_y,
    weights,
    log_weights,
    upstream,
    scalars,
    classes,
    ends,
    positives,
    workspace,
    rows,
    BATCH,
    PADDED,
    QUEUE,
    VIEWS,
    u,
    v,
    x_first,
    y_first,
    WIDTH,
    LABELS: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """workspace[i, j] <- G of rows of view u from x_first on and rows of view v from y_first on.

    ``workspace``: (rows, WIDTH) in the dtype of the views.
    """
    x_local = x_first + tl.program_id(1) * BLOCK_M
    y_local = y_first + tl.program_id(0) * BLOCK_N
    x_row, y_row = u * PADDED + x_local, v * PADDED + y_local
    scale, reference = score_reference(scalars, NORMALIZE)
    s = tile_scores(
        source_x,
        source_y,
        None,
        None,
        x_row,
        y_row,
        STRIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        False,
        DESCRIPTOR,
        PRECISION,
    )
    limit = tl.where(v == VIEWS, QUEUE, BATCH)
    low, high = masked_blocks(classes, ends, x_local, BATCH, BLOCK_M, BLOCK_N, BLOCK_N, LABELS)
    block = y_local // BLOCK_N
    mixed = (v != VIEWS) & (block >= low) & (block < high)
    if mixed | (tl.load(scalars + SLOW) > 0):
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
            True,
            LABELS,
            POSITIVES,
            NUMERATOR,
            NORMALIZE,
            BLOCK_M,
            BLOCK_N,
            FACTOR,
        )
    else:
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
            False,
            LABELS,
            POSITIVES,
            NUMERATOR,
            NORMALIZE,
            BLOCK_M,
            BLOCK_N,
            FACTOR,
        )
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(workspace + i[:, None] * WIDTH + j[None, :], g.to(workspace.dtype.element_ty))


@triton.jit(do_not_specialize=["x_row", "y_row", "x_count", "columns"])
def product_kernel(
    source_g,
    source_y,
    partial,
    x_row,
    y_row,
    x_count,
    columns,
    WIDTH,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[x_row + i, d] (+)= sum over the columns j of the workspace of workspace[i, j] z[y_row + j, d].

    ``source_g``: the workspace (rows, WIDTH), as a pointer or a TMA descriptor. FIRST: overwrite ``partial``.
    """
    i = tl.program_id(1) * BLOCK_M
    d = tl.program_id(0) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, columns, BLOCK_K):
        if DESCRIPTOR:
            g = source_g.load([i, j])
        else:
            g = tl.load(source_g + (i + tl.arange(0, BLOCK_M))[:, None] * WIDTH + (j + tl.arange(0, BLOCK_K))[None, :])
        y = load_tile(source_y, y_row + j, d, STRIDE, BLOCK_K, BLOCK_N, DESCRIPTOR)
        total = tl.dot(g, y, total, input_precision=PRECISION)
    at, k = i + tl.arange(0, BLOCK_M), d + tl.arange(0, BLOCK_N)
    to = partial + (x_row + at).to(tl.int64)[:, None] * STRIDE + k[None, :]
    mask = (at < x_count)[:, None] & (k < STRIDE)[None, :]
    if not FIRST:
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total, mask=mask)


WORKSPACE_BYTES = 128 << 20
"""A block of G at a time. Larger than the L2 cache: its passes through memory cost less than the host's 70 us for each
launch of a smaller one. On an H100 16, 64, 128 and 256 MB take 48, 28, 27 and 26 ms for 65,536 rows of 512 bfloat16
numbers, forward and backward, and 142, 135, 113 and 106 ms for rows of 256 float32 numbers."""


def in_waves(layout, stored, tables, constants):
    arch = launcher.arch_of(stored)
    pairs = configs.lookup("masked_wave" if layout.call.labelled else "wave", arch, stored.dtype, layout.stride)
    product = configs.lookup("product", arch, stored.dtype, layout.stride)
    if pairs.block_n % product.block_k:
        raise ValueError(
            f"{configs.ENVIRONMENT}: a wave's columns must be whole pieces of the product, got {pairs}, {product}"
        )
    padded = max(layout.padded, layout.queue_padded)
    part_first, part_rows = layout.part
    # Enough rows for one tile of the product per SM.
    filling = launcher.processors_of(stored) // launcher.cdiv(layout.stride, product.block_n) * product.block_m
    height, width = wave_shape(padded, part_rows, stored.element_size(), filling)
    partial = partial_sums(layout, 1, int(layout.call.queue_rows > 0), stored)
    workspace = launcher.empty((height, width), stored.dtype, stored.device)
    x, y = launcher.tile_sources(stored, pairs)
    _, x_end = layout.own_rows()
    product_sources = launcher.product_sources(workspace, stored, product)
    for u, v in visits(layout):
        slot = int(v == layout.views)
        limit = layout.call.queue_rows if slot else layout.batch
        for x_first in range(part_first, x_end, height):
            x_count = min(height, x_end - x_first)
            for y_first in range(0, limit, width):
                y_count = min(width, limit - y_first)
                launcher.launch(
                    wave_kernel,
                    (launcher.cdiv(y_count, pairs.block_n), launcher.cdiv(x_count, pairs.block_m)),
                    x,
                    y,
                    *tables,
                    workspace,
                    layout.rows,
                    layout.batch,
                    layout.padded,
                    layout.call.queue_rows,
                    layout.views,
                    u,
                    v,
                    x_first,
                    y_first,
                    BLOCK_M=pairs.block_m,
                    BLOCK_N=pairs.block_n,
                    BLOCK_K=pairs.block_k,
                    WIDTH=width,
                    DESCRIPTOR=pairs.descriptor,
                    **constants,
                    **pairs.options,
                )
                first = y_first == 0 and (slot or v == next(w for t, w in visits(layout) if t == u))
                launcher.launch(
                    product_kernel,
                    (launcher.cdiv(layout.stride, product.block_n), launcher.cdiv(x_count, product.block_m)),
                    *product_sources,
                    partial[slot],
                    u * part_rows + x_first - part_first,
                    v * layout.padded + y_first,
                    x_count,
                    y_count,
                    FIRST=bool(first),
                    STRIDE=layout.stride,
                    WIDTH=width,
                    BLOCK_M=product.block_m,
                    BLOCK_N=product.block_n,
                    BLOCK_K=product.block_k,
                    DESCRIPTOR=product.descriptor,
                    PRECISION=constants["PRECISION"],
                    **product.options,
                )
    return partial


def wave_shape(columns, rows, element_size, filling):
    """Return (rows, columns) of the workspace, multiples of 256.

    At least ``filling`` rows, so that the product keeps every SM busy; then as many columns as fit, since each pass
    over the columns reads and writes the accumulators of its rows once.
    """

    def fitting(other):
        return max(256, WORKSPACE_BYTES // (element_size * other) // 256 * 256)

    height = min(rows, fitting(256), max(256, filling // 256 * 256))
    width = min(8192, columns, fitting(height))
    if width < fitting(height):
        height = min(rows, fitting(width))
    return height, width


def visits(layout):
    """Yield the ordered pairs (u, v) of views whose rows are negatives of each other; v == views is the queue."""
    call = layout.call
    for u in range(layout.views):
        yield from ((u, v) for v in negative_views(u, layout.views, call.core_view, call.columns))
        if layout.call.queue_rows:
            yield u, layout.views
