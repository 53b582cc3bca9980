"""The launchers of the ops ``siglip_value.triton`` and ``siglip_value_and_grad.triton``.

load rows -> waves over the pairs: G and its sums over rows, products of G with the rows -> positives, normalisation

S: the numbers from one stored row to the next, a multiple of 64, whatever D is: the kernels of pairs are one for all
widths.
"""

import torch

from selfsup_kernels.core.ops import REDUCTIONS
from selfsup_kernels.siglip.call import Call
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.arguments import NOTHING, PairedRows, SiglipWave, Source
from selfsup_kernels.tiles.gradient import MOST_COLUMNS
from selfsup_kernels.tiles.layout import PADDING, half_factor, round_up
from selfsup_kernels.tiles.rows import contiguous_rows, fill_rows, row_tile, sum_to, upstream_of_rows
from selfsup_kernels.tiles.waves import wave_shape

SUMS_BLOCK, SUMS_STEP = 64, 16


def value(x, y, duplicates, scale_tensor, bias_tensor, *call):
    loss, *_ = _run(x, y, duplicates, scale_tensor, bias_tensor, None, Call(*call), False, False, sums=1)
    return loss


def value_and_grad(x, y, duplicates, scale_tensor, bias_tensor, upstream, *rest):
    *call, need_x, need_y = rest
    return _run(x, y, duplicates, scale_tensor, bias_tensor, upstream, Call(*call), need_x, need_y, sums=3)


def _run(x, y, duplicates, scale_tensor, bias_tensor, upstream, call, need_x, need_y, sums):
    check_size(call)
    device, reduction = x.device, REDUCTIONS[call.reduction]
    average = 1 / call.rows if reduction == "mean" else 1.0

    def new(*shape, dtype=torch.float32):
        return launcher.empty(shape, dtype, device)

    with launcher.on_device_of(x):
        scalars = _scalars(call, scale_tensor, bias_tensor, device)
        stored_x, norms_x = _load(x, call)
        stored_y, norms_y = _load(y, call)
        padded, stride = stored_x.shape
        weights, grad_scale = None, None
        if upstream is not None:
            weights, grad_scale = upstream_of_rows(upstream[None], None, padded, padded)
        grad_x, grad_y = new(call.rows if need_x else 0, call.dim), new(call.columns if need_y else 0, call.dim)
        totals = new(sums, padded, dtype=torch.float64)
        # Rows without padding are summed where their gradient will be.
        partials = [
            (grad if call.dim == stride else new(len(grad), stride)) if needed else None
            for grad, needed in ((grad_x, need_x), (grad_y, need_y))
        ]
        if duplicates is not None:
            duplicates = duplicates.contiguous()
        factor = half_factor(stored_x.dtype)
        _in_waves(call, stored_x, stored_y, scalars, weights, duplicates, partials, totals, factor)

        loss = new(call.rows) if reduction == "none" else new()
        losses = loss if reduction == "none" else None
        tile, warps = row_tile(stride)
        sides = [(stored_x, stored_y, norms_x, partials[0], grad_x, totals, losses, call.first)]
        if need_y:
            sides.append((stored_y, stored_x, norms_y, partials[1], grad_y, None, None, -call.first))
        for own, other, norms, partial, grad, sums_of_rows, losses_of_rows, shift in sides:
            rows, others = norms.shape[0], (norms_y if own is stored_x else norms_x).shape[0]
            covered = rows if sums_of_rows is None else padded
            launcher.launch(
                "siglip_finish_kernel",
                (launcher.cdiv(covered, tile.BLOCK),),
                (own, other),
                norms if partial is not None else None,
                partial,
                grad if partial is not None else None,
                sums_of_rows,
                losses_of_rows,
                weights,
                grad_scale,
                scalars,
                average,
                average if upstream is None else 1.0,
                *PairedRows(rows, own.shape[0], others, shift),
                call.dim,
                stride,
                SUMS=sums,
                NORMALIZE=call.normalize,
                FACTOR=factor,
                tile=tile,
                num_warps=warps,
            )
        if losses is None:
            sum_to(totals[0], loss)
        if sums == 1:
            return (loss,)
        grad_scalars = new(2, dtype=torch.float64)
        sum_to(totals[1:], grad_scalars)
    return loss, grad_x, grad_y, grad_scalars


def check_size(call):
    if (most := 3 * round_up(max(call.rows, call.columns), PADDING)) >= 2**31:
        raise RuntimeError(
            f"impl='triton' takes fewer than 2^31 sums, three for each row, got {most}; use impl='reference'"
        )


def _scalars(call, scale_tensor, bias_tensor, device):
    """Return scale and bias (2,) float32 in the memory of ``device``. Only a tensor on the CPU is read by the host."""
    scalars = launcher.empty((2,), torch.float32, device)
    numbers, tensors = [], []
    for number, tensor in ((call.scale, scale_tensor), (call.bias, bias_tensor)):
        if tensor is not None and tensor.device != device:
            number, tensor = float(tensor), None
        numbers.append(number)
        tensors.append(tensor)
    given = [scalars if tensor is None else tensor for tensor in tensors]  # unread without one: a kernel for all cases
    are_tensors = [int(tensor is not None) for tensor in tensors]
    launcher.launch("siglip_scalars_kernel", (1,), scalars, *given, *numbers, *are_tensors)
    return scalars


def _load(rows, call):
    """Return the rows (N, D) as they are stored, (N, S) with padding, and their ``inverse_norms`` (N,)."""
    rows = contiguous_rows(rows)
    (count, dim), device = rows.shape, rows.device
    padded, stride = round_up(count, PADDING), round_up(dim, 64)
    to = NOTHING._replace(
        rows=launcher.empty((padded, stride), rows.dtype, device),
        inverse_norms=launcher.empty((count,), torch.float32, device),
    )
    source = Source(padded, count, padded, 0, 0, 0)
    fill_rows([rows], None, to, None, None, 0.0, call.eps, source, dim, stride, call.normalize)
    return to.rows, to.inverse_norms


def _in_waves(call, stored_x, stored_y, scalars, upstream, duplicates, partials, totals, factor):
    """Write the sums over negative pairs: ``totals`` (SUMS, N padded), and ``partials`` of x (N, S) and y (M, S), each
    unless it is None."""
    (padded, stride), dtype, device = stored_x.shape, stored_x.dtype, stored_x.device
    partial_x, partial_y = partials
    products = partial_x is not None or partial_y is not None
    arch, precision = launcher.arch_of(stored_x), configs.precision_of(dtype)
    pairs, product = (configs.lookup(kernel, arch, dtype, configs.LONG) for kernel in ("wave", "product"))
    if pairs.block_n % product.block_k or pairs.block_m % product.block_k:
        raise ValueError(
            f"{configs.ENVIRONMENT}: a wave's tiles must be whole pieces of the product, got {pairs}, {product}"
        )
    # Of a pair: its element of G, and its part of the sums over its block.
    size = 4 * len(totals) / pairs.block_n
    highest, filling = padded, padded
    if products:
        size += stored_x.element_size()
        # The product with rows of x sums over the rows of a wave, in tensor cores.
        highest = min(padded, MOST_COLUMNS)
        # Enough rows for one tile of the product per SM.
        filling = launcher.sms_of(stored_x) // launcher.cdiv(stride, product.block_n) * product.block_m
    height, width = wave_shape(len(stored_y), highest, size, filling)
    workspace = launcher.empty((height, width), dtype, device) if products else None
    parts = launcher.empty((len(totals), launcher.cdiv(width, pairs.block_n), height), torch.float32, device)
    # The kernel's rows are those of x, its columns those of y: each side in blocks of its own.
    x, y = launcher.tile_sources(stored_x, pairs)[0], launcher.tile_sources(stored_y, pairs)[1]
    wave_tile = configs.tile(pairs, stride, precision, factor=factor)._replace(RESIDENT=False)
    product_tile = configs.tile(product, product.block_k, precision)  # its pieces are of rows of G

    def multiply(rows, partial, to_row, from_row, count, terms, first, transposed):
        launcher.launch(
            "product_kernel",
            (launcher.cdiv(stride, product.block_n), launcher.cdiv(count, product.block_m)),
            *launcher.product_sources(workspace, rows, product, transposed),
            partial,
            to_row,
            from_row,
            count,
            terms,
            width,
            stride,
            FIRST=first,
            tile=product_tile,
            TRANSPOSED=transposed,
            **product.options,
        )

    for x_first in range(0, call.rows, height):
        x_count = min(height, call.rows - x_first)
        for y_first in range(0, call.columns, width):
            y_count = min(width, call.columns - y_first)
            blocks = launcher.cdiv(y_count, pairs.block_n)
            launcher.launch(
                "siglip_wave_kernel",
                (blocks, launcher.cdiv(x_count, pairs.block_m)),
                x,
                y,
                scalars,
                upstream,
                duplicates,
                workspace,
                parts,
                *SiglipWave(call.rows, call.columns, call.first, x_first, y_first),
                width,
                height,
                stride,
                SUMS=len(totals),
                tile=wave_tile,
                **pairs.options,
            )
            launcher.launch(
                "siglip_row_sums_kernel",
                (launcher.cdiv(x_count, SUMS_BLOCK), len(totals)),
                parts,
                totals,
                blocks,
                height,
                padded,
                x_first,
                x_count,
                FIRST=y_first == 0,
                BLOCK=SUMS_BLOCK,
                STEP=SUMS_STEP,
            )
            if partial_x is not None:
                multiply(stored_y, partial_x, x_first, y_first, x_count, y_count, y_first == 0, False)
            if partial_y is not None:
                multiply(stored_x, partial_y, y_first, x_first, y_count, x_count, x_first == 0, True)
