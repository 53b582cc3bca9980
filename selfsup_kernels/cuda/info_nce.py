"""The ops ``info_nce_forward.cuda`` and ``info_nce_backward.cuda``. ``selfsup_kernels/ops.py`` states what goes in and
out; ``csrc/cuda/info_nce.cu`` does the work."""

import torch

from selfsup_kernels import ops
from selfsup_kernels._rows import (
    Layout,
    check_size,
    half_factor,
    sort_by_class,
    takes_tf32,
    upstream_of_rows,
)


def _deterministic():
    return torch.are_deterministic_algorithms_enabled()


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
    h = views[0]
    queued = 0 if queue is None else queue.shape[0]
    layout = Layout(len(views), *h.shape, queued, labels is not None, first, count)
    check_size("cuda", layout)
    if labels is None:
        order, begin, end = torch.empty(0, dtype=torch.int64, device=h.device), None, None
    else:
        order, begin, end = sort_by_class(labels, len(views))
    loss, stored, rnorm, weights, coef, state = ops.get("info_nce_forward_stages", "cuda")(
        views,
        queue if layout.queue else None,
        order,
        begin,
        end,
        temperature_tensor,
        temperature,
        objective,
        core_view,
        normalize,
        eps,
        layout.first,
        layout.own,
        _deterministic(),
        not takes_tf32(h.dtype),
    )
    if reduction:
        loss = loss.mean() if reduction == 1 else loss.sum()
    if labels is not None:
        order = torch.cat([order, begin.to(torch.int64), end.to(torch.int64)])
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
    if dtype != z.dtype:
        raise RuntimeError(f"impl='cuda' gives the gradient in the dtype of the views, {z.dtype}, not in {dtype}")
    layout = Layout(num_views, batch, dim, len(rnorm) - logw.shape[2], labels is not None, first, count)
    begin, end = order[batch:].to(torch.int32).chunk(2) if layout.labels else (None, None)
    upstream, grad_scale = (None, grad) if reduction else upstream_of_rows(layout, grad, order)
    grad_views, parts = ops.get("info_nce_backward_stages", "cuda")(
        grad_scale,
        upstream,
        z,
        rnorm,
        logw,
        coef,
        zq,
        order,
        begin,
        end,
        1 / (num_views * batch) if reduction == 1 else 1.0,
        num_views,
        batch,
        dim,
        layout.queue,
        layout.first,
        layout.own,
        objective,
        core_view,
        normalize,
        need_temperature,
        half_factor(z.dtype),
        not takes_tf32(z.dtype),
    )
    if need_temperature:
        return grad_views, parts.sum()
    return grad_views, torch.zeros((), dtype=torch.float64, device=z.device)
