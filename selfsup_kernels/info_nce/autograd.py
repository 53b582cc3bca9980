"""The autograd Function of the InfoNCE loss."""

import torch

import selfsup_kernels.info_nce.ops  # noqa: F401  defines the ops
from selfsup_kernels.core import ops
from selfsup_kernels.core.once import once
from selfsup_kernels.info_nce.call import SIZES, Call, Saved, sizes_of

SAVED = len(Saved._fields)


class InfoNCE(torch.autograd.Function):
    """The loss, differentiable once in the views and in a tensor temperature. ``core.transforms.apply`` calls it."""

    @staticmethod
    def run(
        impl: str,
        stacked: bool,
        call: Call,
        temperature_tensor: torch.Tensor | None,
        ids: torch.Tensor | None,
        logq: torch.Tensor | None,
        queue: torch.Tensor | None,
        *views: torch.Tensor,
    ):
        """Return the loss, then the fields of ``Saved``.

        Per-anchor losses have the shape (V B,): with (V, B), Dynamo would derive B from a stride of the upstream
        gradient, which is 0 if the gradient is expanded.
        """
        sizes = sizes_of(views, stacked, 0 if queue is None else queue.shape[0])
        views = list(views[0].unbind(0)) if stacked else list(views)
        tensors = views, ids, logq, queue, temperature_tensor
        loss, *saved = ops.run("info_nce_forward", impl, *tensors, *sizes, *call[SIZES:])
        return loss.flatten() if loss.dim() else loss, *saved

    @staticmethod
    def save(ctx, inputs, outputs):
        impl, stacked, call, temperature_tensor, ids, _, _, *views = inputs
        ctx.save_for_backward(*outputs[1:], ids, temperature_tensor, *views)  # views: for `once`, and their sizes
        ctx.arguments = (impl, stacked, call[SIZES:], views[0].dtype)

    @staticmethod
    def forward(ctx, *args):
        outputs = InfoNCE.run(*args)
        InfoNCE.save(ctx, args, outputs)
        return outputs[0]

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        impl, stacked, constants, dtype = ctx.arguments
        ids, temperature_tensor, *views = saved[SAVED:]
        saved = Saved(*saved[:SAVED])
        queue_rows = saved.inverse_norms.shape[0] - saved.log_weights.shape[1]
        sizes = sizes_of(views, stacked, queue_rows)
        grad = grad.reshape(sizes[0], -1) if grad.dim() else grad
        need_temperature = ctx.needs_input_grad[3]
        grad_views, grad_temperature = ops.run(
            "info_nce_backward", impl, grad, *saved, ids, *sizes, *constants, need_temperature, dtype
        )
        grads = (grad_views,) if stacked else grad_views.unbind(0)
        return (*[None] * 3, as_given(grad_temperature, temperature_tensor, need_temperature), None, None, None, *grads)


def as_given(grad, temperature, needed):
    """Return the gradient in the dtype and shape of the temperature, or None if it is not needed."""
    if not needed:
        return None
    grad = grad.to(temperature)
    return grad.view(temperature.shape) if temperature.dim() else grad
