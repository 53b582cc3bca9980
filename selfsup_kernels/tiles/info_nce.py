"""The launchers of the ops ``info_nce_forward.triton`` and ``info_nce_backward.triton``.

forward:  load rows -> sums over negatives (quadratic) -> losses and weights
backward: sums of weighted rows (quadratic) -> positives, normalisation, the user's dtype and order
"""

import torch

from selfsup_kernels.core.ops import REDUCTIONS
from selfsup_kernels.info_nce.call import Call, unpack_backward
from selfsup_kernels.info_nce.objectives import Ids
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.arguments import Classes, SampleIds, given
from selfsup_kernels.tiles.code import Input
from selfsup_kernels.tiles.gradient import gradient
from selfsup_kernels.tiles.layout import Layout, check_size, half_factor
from selfsup_kernels.tiles.rows import finish_rows, load_rows, sum_to, upstream_of_rows
from selfsup_kernels.tiles.sums import pair_sums
from selfsup_kernels.tiles.tables import class_tables, sort_by_class, view_tables


def forward(views, ids, logq, queue, temperature_tensor, *call):
    call = Call(*call)
    layout = Layout(call._replace(temperature=Input(call.temperature)))
    check_size("triton", layout)
    with launcher.on_device_of(views[0]):
        if call.labelled:
            order, classes = sort_by_class(layout, ids)
        else:
            order = launcher.empty(0, torch.int64, views[0].device)
            classes = launcher.empty((2, 0), torch.int32, views[0].device)
        saved, sums = load_rows(layout, views, logq, queue, order, classes, temperature_tensor)
        precision = configs.precision_of(saved.rows.dtype)
        tables = given(saved, call)
        if call.crossed:  # the backward does not need them
            order, classes = sort_by_class(layout, ids)
            tables = tables._replace(order=order, classes=Classes(*classes))
        ids = SampleIds(ids, ids.stride(0)) if call.ids == Ids.DUPLICATES else None
        pair_sums(layout, tables, ids, sums, precision)
        if call.labelled:
            loss = class_tables(layout, tables, sums, precision)
        else:
            loss = view_tables(layout, tables, ids, sums, precision)
    return loss, *saved


def backward(grad, *arguments):
    saved, ids, call, (need_temperature, dtype) = unpack_backward(arguments)
    saved = given(saved, call)
    ids = None if ids is None or call.labelled else SampleIds(ids, ids.stride(0))
    layout, stored = Layout(call), saved.rows
    factor = half_factor(stored.dtype)
    reduction = REDUCTIONS[call.reduction]
    constant = 1 / (call.num_views * call.batch) if reduction == "mean" else 1.0
    with launcher.on_device_of(stored):
        upstream, grad_scale = None, grad
        if reduction == "none":
            order = saved.order if call.labelled else None
            upstream, grad_scale = upstream_of_rows(grad, order, layout.padded, layout.rows)
        partial, splits = gradient(layout, saved, ids, upstream, factor, configs.precision_of(stored.dtype))
        grad_views, grad_temperature, parts = finish_rows(
            layout, partial, splits, saved, upstream, grad_scale, constant, need_temperature, factor, dtype
        )
        if need_temperature:
            sum_to(parts, grad_temperature)
    return grad_views, grad_temperature
