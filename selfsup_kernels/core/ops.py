"""How an op is defined: its schema, its fake kernel, its implementations.

One op per hot call. An op has one overload for each implementation (``info_nce_forward.cpu``,
``info_nce_forward.reference``), all of the same signature, so that the layer above picks one by name and the tests can
drive each of them. Schemas and fakes are Python, so that importing the package never needs a compiler: the C++
libraries only add implementations to what is defined here.

The ops are not differentiable; each op's folder has the autograd Function that wraps them.
"""

from collections.abc import Callable

import torch

NAMESPACE = "selfsup_kernels"
IMPLS = ("reference", "cpu", "triton", "cuda")
REDUCTIONS = ("none", "mean", "sum")
"""The position of a reduction in this tuple is its number in the ops."""

SCHEMAS: dict[str, str] = {}
"""What :func:`define` was called with, by the op's name."""
_gpu: dict[str, str] = {}

_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str,
    schema: str,
    *,
    gpu: str,
    reference: Callable,
    fake: Callable | dict[str, Callable],
    launcher: Callable | None = None,
    batched: bool = False,
) -> None:
    """Define the op ``name``, with overloads ``reference``, ``cpu`` and ``gpu``.

    Args:
        gpu: what its GPU kernels are written in, ``"triton"`` or ``"cuda"``.
        reference: the implementation in eager PyTorch, for every device.
        fake: gives the shapes and dtypes of the results; by implementation where they differ.
        launcher: the GPU implementation where that is Python.
        batched: whether ``torch.vmap`` may run it, one call for each element.
    """
    SCHEMAS[name], _gpu[name] = schema, gpu
    for impl in ("reference", "cpu", gpu):
        _library.define(f"{name}.{impl}{schema}")
        chosen = fake[impl] if isinstance(fake, dict) else fake
        torch.library.register_fake(f"{NAMESPACE}::{name}.{impl}", chosen, lib=_library)
        if batched:
            torch.library.register_vmap(f"{NAMESPACE}::{name}.{impl}", _loop(get(name, impl)), lib=_library)
    _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    if launcher is not None:
        # For CPU tensors too: those of Triton's interpreter in the tests. `backends.select` lets no others through.
        _library.impl(f"{name}.{gpu}", launcher, "CompositeExplicitAutograd")


def impls_of(op: str) -> tuple[str, ...]:
    """The implementations of an op, or of both ways of a loss ("byol"); the last one is the GPU's."""
    return ("reference", "cpu", next(gpu for name, gpu in _gpu.items() if name.startswith(op)))


def get(name: str, impl: str):
    """The op ``name`` as implemented by ``impl``."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), impl)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _take(argument, dims, i):
    """Element ``i`` of the batch of an op's argument: a tensor, a list of them, or what vmap does not see."""
    if isinstance(argument, list):
        return [_take(item, dim, i) for item, dim in zip(argument, dims, strict=True)]
    return argument if dims is None else argument.select(dims, i)


def _loop(op):
    """The rule of ``op`` under ``torch.vmap``: a call for each element. A batch of batches has no larger product to
    gain from; each call uses all threads, or the whole GPU, already."""

    def rule(info, in_dims, *arguments):
        if info.batch_size == 0:
            raise ValueError("torch.vmap: expected at least one element of the batch, got 0")
        calls = [
            op(*(_take(argument, dims, i) for argument, dims in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule
