"""A backward that can be run, but not differentiated."""

import functools

import torch


class _Refuse(torch.autograd.Function):
    """The first ``count`` tensors, as functions of all of them; the backward is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tensors[:count]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "selfsup_kernels: the losses are differentiable once, and a second derivative was asked for"
            " (a gradient taken with create_graph=True was differentiated again)"
        )


def once(backward):
    """Decorates a Function's ``backward(ctx, saved_tensors, *grads)``: differentiating its results raises.

    PyTorch's ``once_differentiable`` refuses only where the incoming gradient requires grad. Under
    ``create_graph=True`` it mostly does not, and the second derivative would silently be zero. Here the results depend
    on the saved inputs in the graph (a Function has to save those that it is differentiable in).
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results  # a compiled graph refuses a second derivative by itself
        inputs = [x for x in (*saved, *grads) if x is not None]
        if not torch._C._are_functorch_transforms_active():  # there a tensor tells of the innermost transform alone
            inputs = [x for x in inputs if x.requires_grad]
        return _Refuse.apply(len(results), *results, *inputs)

    return wrapper
