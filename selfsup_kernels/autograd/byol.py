"""The autograd Function of the BYOL loss."""

import torch

from selfsup_kernels import backends
from selfsup_kernels.autograd._once import once


class BYOL(torch.autograd.Function):
    """Differentiable, once, in the predictions; the targets receive no gradient."""

    @staticmethod
    def forward(ctx, impl: str, eps: float, reduction: int, stacked: bool, num: int, *tensors: torch.Tensor):
        predictions, targets = _split(tensors, stacked, num)
        loss, stats = backends.op("byol_forward", impl)(predictions, targets, eps, reduction)
        ctx.save_for_backward(stats, *tensors)
        ctx.arguments = (impl, reduction, stacked, num)
        return loss

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        stats, *tensors = saved
        impl, reduction, stacked, num = ctx.arguments
        predictions, targets = _split(tensors, stacked, num)
        grad_predictions = backends.op("byol_backward", impl)(grad, predictions, targets, stats, reduction)
        grads = (grad_predictions,) if stacked else grad_predictions.unbind(0)
        return (*[None] * 5, *grads, *[None] * (len(tensors) - num))


def _split(tensors, stacked, num):
    """The predictions, then the targets, each as a list of (B, D) matrices."""
    predictions, targets = tensors[:num], tensors[num:]
    if stacked:
        return list(predictions[0].unbind(0)), list(targets[0].unbind(0))
    return list(predictions), list(targets)
