"""The losses under ``torch.func``: grad, vjp, vmap, jacrev, and compositions of them."""

import functools

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of ``torch.func`` runs, or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def apply(function, *args):
    """``function.apply(*args)``; the form of ``function`` that ``torch.func`` takes where one of its transforms runs.

    Both forms have the same ``run``, ``save`` and ``backward``. The one for transforms is slower to call, since every
    saved tensor is an output of its forward.
    """
    if not active():
        return function.apply(*args)
    if torch.compiler.is_compiling():
        # Dynamo differentiates the forward instead of calling the backward: zeros, for ours (torch 2.11 to 2.13).
        torch._dynamo.graph_break(
            msg="selfsup_kernels: torch.compile cannot trace a loss under torch.func;"
            " compile the function without the transform, or drop fullgraph=True"
        )
    return _for_transforms(function).apply(*args)[0]


@functools.cache
def _for_transforms(function):
    class ForTransforms(torch.autograd.Function):
        # Under vmap, forward and backward call the ops, which have batching rules (`selfsup_kernels.core.ops`).
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
