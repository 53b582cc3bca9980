"""Support for the losses under ``torch.func``: grad, vjp, vmap, jacrev, and their compositions."""

import functools

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Return True if a ``torch.func`` transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def apply(function, *args):
    """Call ``function.apply(*args)``; if a ``torch.func`` transform is active, with a form that supports it.

    Both forms share ``run``, ``save`` and ``backward``. The one for transforms is slower to call, since its forward
    returns every saved tensor.
    """
    if not active():
        return function.apply(*args)
    if torch.compiler.is_compiling():
        # Dynamo differentiates the forward instead of calling the backward, which gives zeros (torch 2.11 to 2.13).
        torch._dynamo.graph_break(
            msg="selfsup_kernels: torch.compile cannot trace a loss under torch.func;"
            " compile the function without the transform, or drop fullgraph=True"
        )
    return _for_transforms(function).apply(*args)[0]


@functools.cache
def _for_transforms(function):
    class ForTransforms(torch.autograd.Function):
        # Under vmap, forward and backward call the ops, whose batching rules are in `selfsup_kernels.core.ops`.
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return tuple(function.run(*args))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
            function.save(ctx, inputs, output)

        @staticmethod
        def backward(ctx, grad, *_):
            return function.backward(ctx, grad)

        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(
                "selfsup_kernels: the losses have no forward-mode derivative (jvp, jacfwd, hessian, linearize);"
                " torch.func.grad, vjp and jacrev give the first derivative"
            )

    ForTransforms.__name__ = ForTransforms.__qualname__ = function.__name__
    return ForTransforms
