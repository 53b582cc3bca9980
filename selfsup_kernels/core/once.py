"""A backward that can run but cannot be differentiated."""

import functools

import torch


class _Refuse(torch.autograd.Function):
    """Return the first ``count`` tensors as functions of all tensors; the backward raises."""

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
            "selfsup_kernels: the losses are differentiable once, and a second derivative was requested"
            " (a gradient taken with create_graph=True was differentiated again)"
        )


def once(backward):
    """Make differentiating the results of a Function's ``backward(ctx, saved_tensors, *grads)`` raise.

    PyTorch's ``once_differentiable`` raises only if the incoming gradient requires grad. Under ``create_graph=True`` it
    usually does not, and the second derivative would silently be zero. Here the results depend on the saved inputs in
    the graph, so a Function must save every input that it is differentiable in.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        saved = ctx.saved_tensors  # read once: activation checkpointing allows only one access
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if torch.compiler.is_compiling():
            return results  # compiled graphs already refuse a second derivative
        inputs = [x for x in (*saved, *grads) if x is not None]
        if not torch._C._are_functorch_transforms_active():  # requires_grad is innermost-only there
            inputs = [x for x in inputs if x.requires_grad]
        return _Refuse.apply(len(results), *results, *inputs)

    return wrapper
