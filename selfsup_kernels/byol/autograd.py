"""The autograd Function of the BYOL loss."""

import torch

import selfsup_kernels.byol.ops  # noqa: F401  defines the ops
from selfsup_kernels.core import ops
from selfsup_kernels.core.once import once


class BYOL(torch.autograd.Function):
    """Once differentiable in the predictions; targets receive no gradient. Called through ``core.transforms.apply``."""

    @staticmethod
    def run(impl: str, eps: float, reduction: int, stacked: bool, num: int, *tensors: torch.Tensor):
        """Return the loss and the row statistics that the backward needs."""
        predictions, targets = _split(tensors, stacked, num)
        return ops.overload("byol_forward", impl)(predictions, targets, eps, reduction)

    @staticmethod
    def save(ctx, inputs, outputs):
        impl, _, reduction, stacked, num, *tensors = inputs
        ctx.save_for_backward(outputs[1], *tensors)
        ctx.arguments = (impl, reduction, stacked, num)

    @staticmethod
    def forward(ctx, *args):
        outputs = BYOL.run(*args)
        BYOL.save(ctx, args, outputs)
        return outputs[0]

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        stats, *tensors = saved
        impl, reduction, stacked, num = ctx.arguments
        predictions, targets = _split(tensors, stacked, num)
        grad_predictions = ops.overload("byol_backward", impl)(grad, predictions, targets, stats, reduction)
        grads = (grad_predictions,) if stacked else grad_predictions.unbind(0)
        return (*[None] * 5, *grads, *[None] * (len(tensors) - num))


def _split(tensors, stacked, num):
    """Return predictions and targets, each as a list of (B, D) matrices."""
    predictions, targets = tensors[:num], tensors[num:]
    if stacked:
        return list(predictions[0].unbind(0)), list(targets[0].unbind(0))
    return list(predictions), list(targets)
