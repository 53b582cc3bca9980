"""The autograd Function of the sigmoid loss."""

import torch

import selfsup_kernels.siglip.ops  # noqa: F401  defines the ops
from selfsup_kernels.core import ops
from selfsup_kernels.core.once import once
from selfsup_kernels.siglip.call import SIZES, Call

NONE = ops.REDUCTIONS.index("none")


class SigLIP(torch.autograd.Function):
    """The loss, once differentiable in x, y and in scale and bias given as tensors. ``core.transforms.apply`` calls it.

    The gradient is linear in that of the loss, and needs no sum over all pairs first. So where it is wanted the forward
    makes it in its one pass over the pairs, and the backward multiplies by one number. The losses of single rows (the
    reduction "none") may have any upstream gradients, so their backward makes the pairs again.
    """

    @staticmethod
    def run(
        impl: str,
        wanted: tuple[bool, bool] | None,
        call: Call,
        duplicates: torch.Tensor | None,
        scale_tensor: torch.Tensor | None,
        bias_tensor: torch.Tensor | None,
        x: torch.Tensor,
        y: torch.Tensor,
    ):
        """Return the loss, then the gradients that the op returns: of x and y as ``wanted`` (None: no gradient at
        all), of the scalars."""
        arguments = x, y, duplicates, scale_tensor, bias_tensor
        record = *sizes_of(x, y), *call[SIZES:]
        if wanted is None or call.reduction == NONE:
            return ops.run("siglip_value", impl, *arguments, *record), *[x.new_empty(0) for _ in range(3)]
        return ops.run("siglip_value_and_grad", impl, *arguments, None, *record, *wanted)

    @staticmethod
    def save(ctx, inputs, outputs):
        impl, wanted, call, *tensors = inputs
        ctx.save_for_backward(*outputs[1:], *tensors)
        ctx.arguments = impl, wanted, call

    @staticmethod
    def forward(ctx, *args):
        outputs = SigLIP.run(*args)
        SigLIP.save(ctx, args, outputs)
        return outputs[0]

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        impl, wanted, call = ctx.arguments
        *grads, duplicates, scale_tensor, bias_tensor, x, y = saved
        if call.reduction == NONE:
            arguments = x, y, duplicates, scale_tensor, bias_tensor, grad.contiguous()
            record = *sizes_of(x, y), *call[SIZES:]
            _, *grads = ops.run("siglip_value_and_grad", impl, *arguments, *record, *wanted)
            grad = None
        return *[None] * 4, *as_given(ctx.needs_input_grad[4:], grads, grad, call, scale_tensor, bias_tensor, x, y)


def sizes_of(x, y):
    """Return the sizes of a call, read from the tensors: a traced graph may run with others than it was traced with."""
    return x.shape[0], y.shape[0], x.shape[1], 0


def as_given(needed, grads, factor, call, *inputs):
    """Return ``factor`` times the op's gradients, as those of the inputs scale, bias, x and y: in their dtypes and
    shapes, None where not needed. A factor of None is 1."""
    grad_x, grad_y, scalars = grads
    results = []
    if any(needed[:2]):
        scalars = scalars if factor is None else scalars * factor
        for need, value, given in zip(needed, scalars.unbind(), inputs, strict=False):
            results.append(value.to(given).view(given.shape) if need else None)
    else:
        results += None, None
    for need, value, given in zip(needed[2:], (grad_x, grad_y), inputs[2:], strict=True):
        results.append(narrow(value if factor is None else value * factor, given, call) if need else None)
    return results


def narrow(gradient, rows, call):
    """Return the gradient in the dtype of the rows. That of a row of zeros, divided by eps, may be finite in float32
    only."""
    if rows.dtype == torch.float16 and call.normalize:
        limit = torch.finfo(torch.float16).max
        short = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64) < call.eps
        gradient = torch.where(short, gradient.clamp(-limit, limit), gradient)
    return gradient.to(rows.dtype)
