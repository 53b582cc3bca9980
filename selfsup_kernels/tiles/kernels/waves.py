"""The quadratic part of the backward for rows that are too long for an accumulator in registers. It goes in waves: one
kernel writes a block of G to a workspace, and a plain matrix product reads it."""

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import Block, Sizes
from selfsup_kernels.tiles.kernels.pairs import masked_blocks, pair_gradient
from selfsup_kernels.tiles.kernels.tile import SLOW, score_reference, tile_products


# ``width``, a multiple of 256, is no constant: it follows the size of the batch, and each would be a kernel of its own.
@triton.jit(do_not_specialize=[*Sizes._fields, "u", "v", "x_first", "y_first"])
def wave_kernel(
    source_x, source_y, saved, ids, upstream, workspace,
    rows, batch, padded, queue, views, core_view, columns,
    u, v, x_first, y_first, width, stride, rules: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """workspace[i, j] <- G of rows of view u from x_first on and rows of view v from y_first on.

    ``workspace``: (rows, width) in the dtype of the views.
    """
    sizes = Sizes(rows, batch, padded, queue, views, core_view, columns)
    x_local = x_first + tl.program_id(1) * tile.BLOCK_M
    y_local = y_first + tl.program_id(0) * tile.BLOCK_N
    x, y = Block(u, x_local, u * padded + x_local), Block(v, y_local, v * padded + y_local)
    scale = score_reference(saved.scalars, rules.normalize)
    s = tile_products(source_x, source_y, None, None, x.row, y.row, stride, tile)
    limit = tl.where(v == views, queue, batch)
    low, high = masked_blocks(saved.classes, x_local, sizes, rules.labelled, tile)
    block = y_local // tile.BLOCK_N
    mixed = (v != views) & (block >= low) & (block < high)
    if mixed | (tl.load(saved.scalars + SLOW) > 0):
        g = pair_gradient(s, x, y, limit, saved, ids, upstream, scale, sizes, True, rules, tile)
    else:
        g = pair_gradient(s, x, y, limit, saved, ids, upstream, scale, sizes, False, rules, tile)
    i = tl.program_id(1) * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    j = tl.program_id(0) * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
    tl.store(workspace + i[:, None] * width + j[None, :], g.to(workspace.dtype.element_ty))


@triton.jit(do_not_specialize=["x_row", "y_row", "x_count", "columns"])
def product_kernel(
    source_g, source_y, partial, x_row, y_row, x_count, columns, width, stride,
    FIRST: tl.constexpr, tile: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """partial[x_row + i, d] (+)= sum over the columns j of the workspace of workspace[i, j] z[y_row + j, d].

    ``source_g``: the workspace (rows, width), as a pointer or a TMA descriptor. FIRST: overwrite ``partial``.
    TRANSPOSED: i is a column of the workspace, and the sum is over its rows j.
    """
    BLOCK_M: tl.constexpr = tile.BLOCK_M
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    BLOCK_K: tl.constexpr = tile.BLOCK_K
    i = tl.program_id(1) * BLOCK_M
    d = tl.program_id(0) * BLOCK_N
    k = d + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, columns, BLOCK_K):
        if tile.DESCRIPTOR:
            g = tl.trans(source_g.load([j, i])) if TRANSPOSED else source_g.load([i, j])
            y = source_y.load([y_row + j, d])
        else:
            at_i, at_j = i + tl.arange(0, BLOCK_M), j + tl.arange(0, BLOCK_K)
            if TRANSPOSED:
                g = tl.load(source_g + at_i[:, None] + at_j[None, :] * width)
            else:
                g = tl.load(source_g + at_i[:, None] * width + at_j[None, :])
            y_rows = (y_row + j + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
            y = tl.load(source_y + y_rows * stride + k[None, :], mask=(k < stride)[None, :], other=0.0)
        total = tl.dot(g, y, total, input_precision=tile.PRECISION)
    at = i + tl.arange(0, BLOCK_M)
    to = partial + (x_row + at).to(tl.int64)[:, None] * stride + k[None, :]
    mask = (at < x_count)[:, None] & (k < stride)[None, :]
    if not FIRST:
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total, mask=mask)
