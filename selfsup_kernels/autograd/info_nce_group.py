"""The autograd Function of the InfoNCE loss over the batch of many processes."""

import functools

import torch

from selfsup_kernels import _tables, backends
from selfsup_kernels import distributed as group
from selfsup_kernels.autograd._once import once
from selfsup_kernels.ops import REDUCTIONS, accumulation_dtype


def without_autocast(function):
    """Autocast would change the dtypes of what is put together here, or refuse to put it together."""

    @functools.wraps(function)
    def wrapper(*args):
        device = next(x for x in reversed(args) if isinstance(x, torch.Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return function(*args)

    return wrapper


class GroupInfoNCE(torch.autograd.Function):
    """As ``InfoNCE``, for this process's share of the samples. The gradient is that of the sum over the processes of
    what each makes of its result: both directions communicate, in the same order everywhere."""

    @staticmethod
    @without_autocast
    def forward(
        ctx,
        shares: group.Shares,
        impl: str,
        temperature: float,
        objective: int,
        core_view: int,
        normalize: bool,
        eps: float,
        reduction: int,
        stacked: bool,
        temperature_tensor: torch.Tensor | None,
        labels: torch.Tensor | None,
        queue: torch.Tensor | None,
        *views: torch.Tensor,
    ):
        own = views[0] if stacked else torch.stack(views)
        if labels is not None:
            labels = group.gather_samples(labels.to(torch.int64).view(1, -1, 1), shares).view(-1)
        loss, *saved = backends.op("info_nce_forward", impl)(
            list(group.gather_samples(own, shares).unbind(0)),
            labels,
            queue,
            temperature_tensor,
            temperature,
            objective,
            core_view,
            normalize,
            eps,
            0,
            shares.first,
            shares.count,
        )
        ctx.save_for_backward(*saved, labels, temperature_tensor, *views)  # views: for `once` alone
        ctx.num_saved = len(saved)
        ctx.shares = shares
        ctx.impl = impl
        ctx.stacked = stacked
        ctx.sizes = (len(own), shares.batch, own.shape[2])
        ctx.dtype = own.dtype
        ctx.arguments = (temperature, objective, core_view, normalize, reduction)
        if REDUCTIONS[reduction] == "none":
            return loss
        total = group.sum_over(loss.double().sum(), shares)
        return (total / (len(own) * shares.batch) if REDUCTIONS[reduction] == "mean" else total).to(loss.dtype)

    @staticmethod
    @once
    @without_autocast
    def backward(ctx, saved, grad):
        *saved, labels, temperature_tensor = saved[: ctx.num_saved + 2]
        temperature, objective, core_view, normalize, reduction = ctx.arguments
        shares, labelled = ctx.shares, labels is not None
        num_views, batch, _ = ctx.sizes
        own = _tables.own_rows(ctx.impl, saved, labelled, normalize, num_views, batch, shares.first, shares.count)
        upstream = grad.to(own.dtype).expand(num_views, shares.count).unsqueeze(-1)
        rows = group.gather_samples(torch.cat([own, upstream], -1), shares)
        rows, upstream = rows[..., :-1], rows[..., -1]
        if REDUCTIONS[reduction] != "none":
            # Every process has the same loss of all anchors, and may weigh it as it likes.
            each = torch.stack([part[0, 0] for part in upstream.split(shares.sizes, 1)])
            share = 1 / (num_views * batch) if REDUCTIONS[reduction] == "mean" else 1
            upstream = (each.sum() * share).expand(num_views, batch)
        upstream = upstream.to(accumulation_dtype(ctx.dtype)).contiguous()
        need_temperature = ctx.needs_input_grad[9]
        grad_views, grad_temperature = backends.op("info_nce_backward", ctx.impl)(
            upstream,
            *_tables.with_all_rows(ctx.impl, saved, labelled, normalize, rows),
            labels,
            temperature_tensor,
            temperature,
            *ctx.sizes,
            objective,
            core_view,
            normalize,
            0,
            need_temperature,
            ctx.dtype,
            shares.first,
            shares.count,
        )
        grads = (grad_views,) if ctx.stacked else grad_views.unbind(0)
        grad_temperature = grad_temperature.to(temperature_tensor) if need_temperature else None
        if need_temperature and temperature_tensor.dim():  # of one element, whatever its shape
            grad_temperature = grad_temperature.view(temperature_tensor.shape)
        return (*[None] * 9, grad_temperature, None, None, *grads)
