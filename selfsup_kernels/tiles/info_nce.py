"""The launchers of the ops ``info_nce_forward.triton`` and ``info_nce_backward.triton``.

forward:  load rows -> sums over negatives (quadratic) -> losses and weights
backward: sums of weighted rows (quadratic) -> positives, normalisation, the user's dtype and order
"""

import torch

from selfsup_kernels.info_nce.objectives import OBJECTIVES
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.classes import class_tables
from selfsup_kernels.tiles.gradient import gradient
from selfsup_kernels.tiles.layout import Layout, check_size, half_factor, sort_by_class, upstream_of_rows
from selfsup_kernels.tiles.rows import finish_rows, load_rows
from selfsup_kernels.tiles.sums import pair_sums
from selfsup_kernels.tiles.tables import view_tables


def forward(
    views,
    labels,
    queue,
    temperature_tensor,
    temperature,
    objective,
    core_view,
    normalize,
    eps,
    reduction,
    first=0,
    count=-1,
):
    queued = 0 if queue is None else queue.shape[0]
    layout = Layout(len(views), *views[0].shape, queued, labels is not None, first, count)
    check_size("triton", layout)
    with launcher.on_device_of(views[0]):
        if labels is None:
            order = torch.empty(0, dtype=torch.int64, device=views[0].device)
            classes = ends = None
        else:
            order, classes, ends = sort_by_class(labels, len(views))
        stored, rnorm, sums, state = load_rows(
            layout, views, queue, order, temperature_tensor, temperature, normalize, eps
        )
        precision = configs.precision_of(stored.dtype)
        cross = OBJECTIVES[objective] == "cross_view"
        pair_sums(layout, stored, sums, state, classes, ends, cross, core_view, normalize, precision)
        if layout.labels:
            loss, weights, coef = class_tables(
                layout, stored, sums, state, classes, ends, order, objective, normalize, precision
            )
            order = torch.cat([order, classes.to(torch.int64), ends.to(torch.int64)])
        else:
            loss, weights, coef = view_tables(layout, stored, sums, state, objective, core_view, normalize, precision)
        if reduction:
            loss = loss.mean() if reduction == 1 else loss.sum()
    return loss, stored, rnorm, weights, coef, state, order


def backward(
    grad,
    z,
    rnorm,
    logw,
    coef,
    zq,
    order,
    labels,
    temperature_tensor,
    temperature,
    num_views,
    batch,
    dim,
    objective,
    core_view,
    normalize,
    reduction,
    need_temperature,
    dtype,
    first=0,
    count=-1,
):
    layout = Layout(num_views, batch, dim, len(rnorm) - logw.shape[2], labels is not None, first, count)
    classes, ends = order[batch:].to(torch.int32).chunk(2) if layout.labels else (None, None)
    factor = half_factor(z.dtype)
    with launcher.on_device_of(z):
        upstream, grad_scale = (None, grad) if reduction else upstream_of_rows(layout, grad, order)
        cross = OBJECTIVES[objective] == "cross_view"
        partial, splits = gradient(
            layout,
            z,
            logw,
            upstream,
            zq,
            classes,
            ends,
            coef,
            objective,
            cross,
            core_view,
            normalize,
            factor,
            configs.precision_of(z.dtype),
        )
        grad_views, parts = finish_rows(
            layout,
            partial,
            splits,
            z,
            rnorm,
            coef,
            upstream,
            grad_scale,
            1 / (num_views * batch) if reduction == 1 else 1.0,
            zq,
            order,
            normalize,
            need_temperature,
            factor,
            dtype,
        )
        if need_temperature:
            return grad_views, parts.sum()
        return grad_views, torch.zeros((), dtype=torch.float64, device=z.device)
