"""Launches of the first and the last pass over the rows (:mod:`selfsup_kernels.tiles.kernels.rows`)."""

import torch

from selfsup_kernels.info_nce.call import LONGEST, Saved
from selfsup_kernels.tiles import launcher
from selfsup_kernels.tiles.arguments import Finish, RowTile, Source, only

UPSTREAM_BLOCK = 8192


def upstream_of_rows(grad, order, padded, rows):
    """Return ``upstream`` (rows,) and ``grad_scale`` for the gradients (V, B) of all samples: G then has the size of
    probabilities whatever the loss is multiplied by. ``order``: ``Saved.order``, or None; ``padded``, ``rows``: as in
    :class:`selfsup_kernels.tiles.arguments.Sizes`."""
    upstream = launcher.empty(rows, torch.float32, grad.device)
    views, samples = grad.shape
    grad_scale = launcher.empty((), torch.float32, grad.device)
    launcher.launch(
        "upstream_kernel",
        (1,),
        grad,
        order,
        upstream,
        grad_scale,
        *grad.stride(),
        samples,
        padded,
        rows,
        views,
        BLOCK=UPSTREAM_BLOCK,
        num_warps=16,
    )
    return upstream, grad_scale


SUM_BLOCK = 8192


def sum_to(values, out):
    """Write the sums over the last dimension of ``values`` to ``out``."""
    count = values.shape[-1]
    launcher.launch("sum_kernel", (values.numel() // count,), values, out, count, BLOCK=SUM_BLOCK, num_warps=16)


def row_tile(stride):
    """Return (blocks of rows, warps): about 4096 numbers in registers, whole rows."""
    width = max(16, launcher.next_power_of_2(stride))
    rows = max(1, min(64, 4096 // width))
    return RowTile(rows, width), 4 if width <= 4096 else 16


def contiguous_rows(rows):
    """Return the rows (N, D) as kernels take them: the numbers of a row follow each other."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def fill_rows(
    sources, order, to, sums, temperature_tensor, temperature, eps, source, dim, stride, normalize, logq=None
):
    """Launch ``load_rows_kernel`` for the user's rows ``sources``, V matrices (B, D)."""
    tile, warps = row_tile(stride)
    launcher.launch(
        "load_rows_kernel",
        (launcher.cdiv(source.rows, tile.BLOCK),),
        tuple(sources),
        tuple(s.stride(0) for s in sources),
        order,
        logq,
        to,
        sums,
        temperature_tensor,
        temperature,
        eps,
        *source,
        dim,
        stride,
        NUM_VIEWS=len(sources),
        NORMALIZE=normalize,
        tile=tile,
        num_warps=warps,
    )


def load_rows(layout, views, logq, queue, order, classes, temperature_tensor):
    """Return what a call's ``Saved`` has by then, its tables not yet written, and the sums (C, M), zeros."""
    call, temperature = layout.call, layout.call.temperature
    device = views[0].device

    def new(*shape, dtype=torch.float32):
        return launcher.empty(shape, dtype, device)

    views = [contiguous_rows(v) for v in views]
    columns = call.columns_of_tables
    saved = Saved(
        rows=new(layout.stored_rows, layout.stride, dtype=views[0].dtype),
        inverse_norms=new(layout.rows + call.queue_rows),
        log_weights=new(columns, layout.rows),
        weights=new(columns, layout.rows),
        positives=new(call.positives_of_tables, layout.rows),
        scalars=new(4),
        order=order,
        classes=classes,
        logq=new(0 if logq is None else layout.rows),
    )
    sums = new(columns, layout.rows)
    if not call.normalize:
        launcher.launch("clear_kernel", (1,), saved.scalars[LONGEST:])  # a maximum is taken in it
    if temperature_tensor is not None and temperature_tensor.device != device:
        temperature, temperature_tensor = float(temperature_tensor), None  # on the CPU: no synchronisation
    to = only(saved, "rows", "inverse_norms", "scalars", *(() if logq is None else ("logq",)))
    is_tensor = int(temperature_tensor is not None)
    given = temperature_tensor if is_tensor else saved.scalars  # which is not read: one kernel for both

    def fill(sources, order, source, logq=None):
        size = call.dim, layout.stride, call.normalize
        fill_rows(sources, order, to, sums, given, temperature, call.eps, source, *size, logq)

    if queue is not None and call.queue_rows:
        source = Source(layout.queue_padded, call.queue_rows, layout.queue_padded, layout.rows, 0, is_tensor)
        fill([contiguous_rows(queue)], None, source)
    by_class = order if call.labelled else None
    fill(views, by_class, Source(layout.padded, call.batch, layout.rows, 0, columns, is_tensor), logq)
    return saved, sums


def finish_rows(layout, partial, splits, saved, upstream, grad_scale, constant, need_temperature, factor, dtype):
    """Return the gradient of the views (V, own samples, D), that of the temperature (), 0 unless it is needed, and
    (M,) float64 parts of the latter, whose sum is to be written to it, or None."""
    call, device = layout.call, saved.rows.device
    out = launcher.empty((call.num_views, call.own, call.dim), dtype, device)
    grad_temperature = launcher.empty((), torch.float64, device)
    parts = launcher.empty(layout.rows, torch.float64, device) if need_temperature else None
    tile, warps = row_tile(layout.stride)
    views, queues = call.num_views, partial.shape[0] - splits
    order = ("order",) if call.labelled else ()
    launcher.launch(
        "finish_rows_kernel",
        (launcher.cdiv(layout.rows, tile.BLOCK),),
        partial,
        only(saved, "rows", "inverse_norms", "positives", "scalars", *order),
        upstream,
        grad_scale,
        out,
        grad_temperature,
        parts,
        constant,
        *Finish(layout.padded, call.batch, layout.rows, splits, call.first, call.own, *layout.part, views, queues),
        call.dim,
        layout.stride,
        LABELLED=call.labelled,
        NORMALIZE=call.normalize,
        FACTOR=factor,
        LIMIT=65504.0 if dtype == torch.float16 else 0.0,
        tile=tile,
        num_warps=warps,
    )
    return out, grad_temperature, parts
