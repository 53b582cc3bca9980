"""The autograd Function of the InfoNCE loss."""

import torch

from selfsup_kernels.core import backends
from selfsup_kernels.core.once import once
from selfsup_kernels.info_nce import ops  # noqa: F401  defines the ops


class InfoNCE(torch.autograd.Function):
    """Differentiable, once, in the views and in a temperature that is a tensor. Called by ``_transforms.apply``."""

    @staticmethod
    def run(
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
        """The loss, then the tables that the backward needs."""
        return backends.op("info_nce_forward", impl)(
            list(views[0].unbind(0)) if stacked else list(views),
            labels,
            queue,
            temperature_tensor,
            temperature,
            objective,
            core_view,
            normalize,
            eps,
            reduction,
        )

    @staticmethod
    def save(ctx, inputs, outputs):
        impl, temperature, objective, core_view, normalize, _, reduction, stacked = inputs[:8]
        temperature_tensor, labels, _, *views = inputs[8:]
        ctx.save_for_backward(*outputs[1:], labels, temperature_tensor, *views)  # views: for `once`, and their sizes
        ctx.num_saved = len(outputs) - 1
        ctx.impl = impl
        ctx.stacked = stacked
        ctx.dtype = views[0].dtype
        ctx.arguments = (temperature, objective, core_view, normalize, reduction)

    @staticmethod
    def forward(ctx, *args):
        outputs = InfoNCE.run(*args)
        InfoNCE.save(ctx, args, outputs)
        return outputs[0]

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        labels, temperature_tensor = saved[ctx.num_saved : ctx.num_saved + 2]
        temperature, objective, core_view, normalize, reduction = ctx.arguments
        views = saved[ctx.num_saved + 2 :]  # sizes from here: Dynamo of torch 2.11 takes no symbolic ones kept in ctx
        sizes = views[0].shape if ctx.stacked else (len(views), *views[0].shape)
        need_temperature = ctx.needs_input_grad[8]
        grad_views, grad_temperature = backends.op("info_nce_backward", ctx.impl)(
            grad,
            *saved[: ctx.num_saved],
            labels,
            temperature_tensor,
            temperature,
            *sizes,
            objective,
            core_view,
            normalize,
            reduction,
            need_temperature,
            ctx.dtype,
        )
        grads = (grad_views,) if ctx.stacked else grad_views.unbind(0)
        grad_temperature = grad_temperature.to(temperature_tensor) if need_temperature else None
        if need_temperature and temperature_tensor.dim():  # of one element, whatever its shape
            grad_temperature = grad_temperature.view(temperature_tensor.shape)
        return (*[None] * 8, grad_temperature, None, None, *grads)
