"""The quadratic part of the backward for rows that are too long for an accumulator in registers. It goes in waves: one
kernel writes a block of G to a workspace, and a plain matrix product reads it."""

import triton
import triton.language as tl

from selfsup_kernels.info_nce.objectives import negative_views
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.arguments import Block, Sizes
from selfsup_kernels.tiles.pairs import masked_blocks, pair_gradient, partial_sums
from selfsup_kernels.tiles.tile import SLOW, load_tile, score_reference, tile_products


# ``width``, a multiple of 256, is no constant: it follows the size of the batch, and each would be a kernel of its own.
@triton.jit(do_not_specialize=[*Sizes._fields, "u", "v", "x_first", "y_first"])
def wave_kernel(
    source_x, source_y, saved, upstream, workspace,
    rows, batch, padded, queue, views, core_view,
    u, v, x_first, y_first, width, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """workspace[i, j] <- G of rows of view u from x_first on and rows of view v from y_first on.

    ``workspace``: (rows, width) in the dtype of the views.
    """
    sizes = Sizes(rows, batch, padded, queue, views, core_view)
    x_local = x_first + tl.program_id(1) * tile.BLOCK_M
    y_local = y_first + tl.program_id(0) * tile.BLOCK_N
    x, y = Block(u, x_local, u * padded + x_local), Block(v, y_local, v * padded + y_local)
    scale = score_reference(saved.scalars, rules.normalize)
    s = tile_products(source_x, source_y, None, None, x.row, y.row, tile)
    limit = tl.where(v == views, queue, batch)
    low, high = masked_blocks(saved.classes, x_local, sizes, rules.labelled, tile)
    block = y_local // tile.BLOCK_N
    mixed = (v != views) & (block >= low) & (block < high)
    if mixed | (tl.load(saved.scalars + SLOW) > 0):
        g = pair_gradient(s, x, y, limit, saved, upstream, scale, sizes, True, rules, tile)
    else:
        g = pair_gradient(s, x, y, limit, saved, upstream, scale, sizes, False, rules, tile)
    i = tl.program_id(1) * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    j = tl.program_id(0) * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
    tl.store(workspace + i[:, None] * width + j[None, :], g.to(workspace.dtype.element_ty))


@triton.jit(do_not_specialize=["x_row", "y_row", "x_count", "columns"])
def product_kernel(
    source_g, source_y, partial, x_row, y_row, x_count, columns, width, FIRST: tl.constexpr, tile: tl.constexpr
):
    """partial[x_row + i, d] (+)= sum over the columns j of the workspace of workspace[i, j] z[y_row + j, d].

    ``source_g``: the workspace (rows, width), as a pointer or a TMA descriptor. FIRST: overwrite ``partial``.
    """
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_K: tl.constexpr = tile.BLOCK_K
    i = tl.program_id(1) * BLOCK_M
    d = tl.program_id(0) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, columns, BLOCK_K):
        if tile.DESCRIPTOR:
            g = source_g.load([i, j])
        else:
            g = tl.load(source_g + (i + tl.arange(0, BLOCK_M))[:, None] * width + (j + tl.arange(0, BLOCK_K))[None, :])
        y = load_tile(source_y, y_row + j, d, BLOCK_K, BLOCK_N, tile)
        total = tl.dot(g, y, total, input_precision=tile.PRECISION)
    at, k = i + tl.arange(0, BLOCK_M), d + tl.arange(0, BLOCK_N)
    to = partial + (x_row + at).to(tl.int64)[:, None] * tile.STRIDE + k[None, :]
    mask = (at < x_count)[:, None] & (k < tile.STRIDE)[None, :]
    if not FIRST:
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total, mask=mask)


WORKSPACE_BYTES = 128 << 20
"""A block of G at a time. Larger than the L2 cache: its passes through memory cost less than the host's 70 us for each
launch of a smaller one. On an H100 16, 64, 128 and 256 MB take 48, 28, 27 and 26 ms for 65,536 rows of 512 bfloat16
numbers, forward and backward, and 142, 135, 113 and 106 ms for rows of 256 float32 numbers."""


def in_waves(layout, stored, tables, upstream, factor, precision):
    call = layout.call
    arch = launcher.arch_of(stored)
    pairs = configs.lookup("masked_wave" if call.labelled else "wave", arch, stored.dtype, layout.stride)
    product = configs.lookup("product", arch, stored.dtype, layout.stride)
    if pairs.block_n % product.block_k:
        raise ValueError(
            f"{configs.ENVIRONMENT}: a wave's columns must be whole pieces of the product, got {pairs}, {product}"
        )
    padded = max(layout.padded, layout.queue_padded)
    part_first, part_rows = layout.part
    # Enough rows for one tile of the product per SM.
    filling = launcher.sms_of(stored) // launcher.cdiv(layout.stride, product.block_n) * product.block_m
    height, width = wave_shape(padded, part_rows, stored.element_size(), filling)
    partial = partial_sums(layout, 1, int(layout.call.queue_rows > 0), stored)
    workspace = launcher.empty((height, width), stored.dtype, stored.device)
    x, y = launcher.tile_sources(stored, pairs)
    # Rows are too wide to stay loaded.
    wave_tile = configs.tile(pairs, layout.stride, precision, factor=factor)._replace(RESIDENT=False)
    product_tile = configs.tile(product, layout.stride, precision)
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
                    tables,
                    upstream,
                    workspace,
                    *layout.sizes,
                    u,
                    v,
                    x_first,
                    y_first,
                    width,
                    rules=layout.rules,
                    tile=wave_tile,
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
                    width,
                    FIRST=bool(first),
                    tile=product_tile,
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
