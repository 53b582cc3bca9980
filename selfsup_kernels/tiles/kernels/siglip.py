"""The pairwise sigmoid loss. Its quadratic part goes in waves: one kernel makes a block of G, the derivatives of the
pairs, and the sums over its rows; plain matrix products of the workspace read it. Positive pairs are no part of it: a
pass over the rows computes them in float32."""

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import PairedRows, SiglipWave
from selfsup_kernels.tiles.kernels.rows import through_the_norm
from selfsup_kernels.tiles.kernels.tile import softplus_and_sigmoid, tile_products


@triton.jit(
    do_not_specialize=["scale_is_tensor", "bias_is_tensor"],
    do_not_specialize_on_alignment=["scale_tensor", "bias_tensor"],
)
def siglip_scalars_kernel(
    scalars, scale_tensor, bias_tensor, scale: tl.float64, bias: tl.float64, scale_is_tensor, bias_is_tensor
):
    """scalars (2,) <- scale and bias, each from its tensor or its number."""
    scale = tl.where(scale_is_tensor != 0, tl.load(scale_tensor, mask=scale_is_tensor != 0).to(tl.float64), scale)
    bias = tl.where(bias_is_tensor != 0, tl.load(bias_tensor, mask=bias_is_tensor != 0).to(tl.float64), bias)
    tl.store(scalars, scale.to(tl.float32))
    tl.store(scalars + 1, bias.to(tl.float32))


@triton.jit(do_not_specialize=SiglipWave._fields)
def siglip_wave_kernel(
    source_x, source_y, scalars, upstream, duplicates, workspace, parts,
    rows, columns, first, x_first, y_first, width, height, stride,
    SUMS: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """workspace[i, j] <- G of rows of x from x_first on and rows of y from y_first on: ``upstream`` sigmoid(S), 0 for
    pairs that do not count as negatives. parts[k, b, i] <- sums over block b of the columns: of softplus(S), and for
    SUMS = 3 of sigmoid(S) <x_i, y_j> and of sigmoid(S).

    ``workspace``: (height, width) in the dtype of the rows, or None; ``parts``: (SUMS, blocks of this launch, height);
    ``upstream``: (N, padded), or None for 1; ``duplicates``: (M,) int64 or None.
    """
    x_row = x_first + tl.program_id(1) * tile.BLOCK_M
    y_row = y_first + tl.program_id(0) * tile.BLOCK_N
    s = tile_products(source_x, source_y, None, None, x_row, y_row, stride, tile)
    scale, bias = tl.load(scalars), tl.load(scalars + 1)
    t = s * scale + bias
    i, j = tl.arange(0, tile.BLOCK_M), tl.arange(0, tile.BLOCK_N)
    xs, ys = x_row + i, y_row + j
    # A score of -inf adds nothing. Columns past the end, zeros, would have the score ``bias``. Rows past the end need
    # no mask: nothing reads their sums, and products multiply their G by rows of zeros.
    if duplicates is not None:
        of_x = tl.load(duplicates + first + xs, mask=xs < rows, other=0)
        of_y = tl.load(duplicates + ys, mask=ys < columns, other=0)
        keep = (of_x[:, None] != of_y[None, :]) & (ys < columns)[None, :]
        t = tl.where(keep, t, float("-inf"))
    else:
        diagonal = first + x_row - y_row
        on_diagonal = (diagonal < tile.BLOCK_N) & (diagonal + tile.BLOCK_M > 0)
        if on_diagonal | (y_row + tile.BLOCK_N > columns):
            keep = ((first + xs)[:, None] != ys[None, :]) & (ys < columns)[None, :]
            t = tl.where(keep, t, float("-inf"))
    loss, g = softplus_and_sigmoid(t)
    local = tl.program_id(1) * tile.BLOCK_M + i
    at = parts + tl.program_id(0) * height + local
    size = tl.num_programs(0) * height
    tl.store(at, tl.sum(loss, 1))
    if SUMS == 3:
        tl.store(at + size, tl.sum(g * s, 1))
        tl.store(at + 2 * size, tl.sum(g, 1))
    if workspace is not None:
        if upstream is not None:
            g *= tl.load(upstream + xs)[:, None]
        to = workspace + local[:, None] * width + (tl.program_id(0) * tile.BLOCK_N + j)[None, :]
        tl.store(to, (g * tile.FACTOR).to(workspace.dtype.element_ty))


@triton.jit(do_not_specialize=["blocks", "padded", "x_first", "count"])
def siglip_row_sums_kernel(
    parts, totals, blocks, height, padded, x_first, count, FIRST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """totals[k, x_first + i] (+)= the sum over b of parts[k, b, i], in float64 and in a fixed order. Program (rows, k).

    ``parts``: (SUMS, blocks, height); ``totals``: (SUMS, padded) float64.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.arange(0, STEP)
    parts += tl.program_id(1) * blocks * height
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, blocks, STEP):
        mask = (start + b < blocks)[:, None] & (i < count)[None, :]
        part = tl.load(parts + (start + b)[:, None] * height + i[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    to = totals + tl.program_id(1) * padded + x_first + i
    if not FIRST:
        total += tl.load(to, mask=i < count, other=0.0)
    tl.store(to, total, mask=i < count)


@triton.jit(do_not_specialize=PairedRows._fields)
def siglip_finish_kernel(
    stored, inverse_norms, partial, out, totals, losses, upstream, grad_scale, scalars,
    loss_factor: tl.float64, weight: tl.float64,
    rows, padded, others, shift, dim, stride,
    SUMS: tl.constexpr, NORMALIZE: tl.constexpr, FACTOR: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Add the positive pairs, row i of ``stored[0]`` and row i + shift of ``stored[1]``, to the sums over the others.

    out (rows, D) <- the gradient of the rows of ``stored[0]``, unless it is None, from ``partial`` (rows, S), the sums
    over other pairs times FACTOR; both may be one tensor. With ``totals`` (SUMS, padded) float64, the rows' losses and
    sums: the same of all pairs, multiplied by ``loss_factor`` and by the rows' weights, 0 in the padding. ``losses``
    (rows,) <- the rows' losses. A row's weight is ``weight`` times ``grad_scale`` () times an element of ``upstream``,
    that of the row of x; both may be None.
    """
    row = tl.program_id(0) * tile.BLOCK + tl.arange(0, tile.BLOCK)
    d = tl.arange(0, tile.BLOCK_K)
    valid = row < rows
    partner = row + shift
    paired = valid & (partner >= 0) & (partner < others)
    mask = valid[:, None] & (d < dim)[None, :]
    at = row.to(tl.int64)[:, None] * stride + d[None, :]
    partner_at = partner.to(tl.int64)[:, None] * stride + d[None, :]
    z = tl.load(stored[0] + at, mask=mask, other=0.0).to(tl.float32)
    z_partner = tl.load(stored[1] + partner_at, mask=mask & paired[:, None], other=0.0).to(tl.float32)
    s = tl.sum(z * z_partner, 1)
    scale, bias = tl.load(scalars), tl.load(scalars + 1)
    loss, g = softplus_and_sigmoid(-(s * scale + bias))
    g = -g  # without a partner its row is zeros
    w = 1.0
    if upstream is not None:
        w = tl.load(upstream + (row if totals is not None else partner), mask=paired, other=0.0)
        weight *= tl.load(grad_scale).to(tl.float64)
    if totals is not None:
        total = tl.load(totals + row, mask=valid, other=0.0) + loss.to(tl.float64)
        if losses is not None:
            tl.store(losses + row, total.to(tl.float32), mask=valid)
        tl.store(totals + row, tl.where(valid, total * loss_factor, 0.0), mask=row < padded)
        if SUMS == 3:
            by_scale = tl.load(totals + padded + row, mask=valid, other=0.0) + (g * s).to(tl.float64)
            by_bias = tl.load(totals + 2 * padded + row, mask=valid, other=0.0) + g.to(tl.float64)
            tl.store(totals + padded + row, tl.where(valid, by_scale * (w * weight), 0.0), mask=row < padded)
            tl.store(totals + 2 * padded + row, tl.where(valid, by_bias * (w * weight), 0.0), mask=row < padded)
    if out is not None:
        dz = tl.load(partial + at, mask=mask, other=0.0) * (1.0 / FACTOR) + (g * w)[:, None] * z_partner
        dz *= (scale.to(tl.float64) * weight).to(tl.float32)
        if NORMALIZE:
            dz = through_the_norm(dz, z, tl.load(inverse_norms + row, mask=valid, other=1.0))
        tl.store(out + row.to(tl.int64)[:, None] * dim + d[None, :], dz, mask=mask)
