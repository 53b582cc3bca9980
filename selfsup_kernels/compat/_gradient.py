"""Functions that change a gradient but not the value."""

import torch


class ScaleGradient(torch.autograd.Function):
    """The identity; its backward multiplies the gradient by a number."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class AverageGradient(torch.autograd.Function):
    """The identity; its backward averages the gradient over the processes of a group."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad / ctx.group.size()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None
