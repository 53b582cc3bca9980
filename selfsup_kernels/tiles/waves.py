"""Launches of the backward's quadratic part for rows that are too long for an accumulator in registers
(:mod:`selfsup_kernels.tiles.kernels.waves`)."""

from selfsup_kernels.info_nce.objectives import negative_views
from selfsup_kernels.tiles import configs, launcher

WORKSPACE_BYTES = 128 << 20
"""A block of G at a time. Larger than the L2 cache: its passes through memory cost less than the host's 70 us for each
launch of a smaller one. On an H100 16, 64, 128 and 256 MB take 48, 28, 27 and 26 ms for 65,536 rows of 512 bfloat16
numbers, forward and backward, and 142, 135, 113 and 106 ms for rows of 256 float32 numbers."""


def in_waves(layout, stored, tables, ids, upstream, factor, precision):
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
    partial = launcher.partial_sums(layout, 1, int(layout.call.queue_rows > 0), stored)
    workspace = launcher.empty((height, width), stored.dtype, stored.device)
    x, y = launcher.tile_sources(stored, pairs)
    # Rows are too wide to stay loaded.
    wave_tile = configs.tile(pairs, layout.stride, precision, factor=factor)._replace(RESIDENT=False)
    product_tile = configs.tile(product, product.block_k, precision)  # its pieces are of rows of G
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
                    "wave_kernel",
                    (launcher.cdiv(y_count, pairs.block_n), launcher.cdiv(x_count, pairs.block_m)),
                    x,
                    y,
                    tables,
                    ids,
                    upstream,
                    workspace,
                    *layout.sizes,
                    u,
                    v,
                    x_first,
                    y_first,
                    width,
                    layout.stride,
                    rules=layout.pair_rules,
                    tile=wave_tile,
                    **pairs.options,
                )
                first = y_first == 0 and (slot or v == next(w for t, w in visits(layout) if t == u))
                launcher.launch(
                    "product_kernel",
                    (launcher.cdiv(layout.stride, product.block_n), launcher.cdiv(x_count, product.block_m)),
                    *product_sources,
                    partial[slot],
                    u * part_rows + x_first - part_first,
                    v * layout.padded + y_first,
                    x_count,
                    y_count,
                    width,
                    layout.stride,
                    FIRST=bool(first),
                    tile=product_tile,
                    **product.options,
                )
    return partial


def wave_shape(columns, rows, element_size, filling):
    """Return (rows, columns) of the workspace, multiples of 256. ``element_size``: bytes per pair.

    At least ``filling`` rows, so that the product keeps every SM busy; then as many columns as fit, since each pass
    over the columns reads and writes the accumulators of its rows once.
    """

    def fitting(other):
        return max(256, int(WORKSPACE_BYTES / (element_size * other)) // 256 * 256)

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
