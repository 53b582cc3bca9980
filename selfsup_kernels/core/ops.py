"""Definition of an op: its schema, its fake kernel, its implementations.

There is one op per hot call. An op has one overload per implementation (``info_nce_forward.cpu``,
``info_nce_forward.reference``), all with the same signature: callers select one by name, and tests can run each of
them. Schemas and fakes are Python, so importing the package needs no compiler: the C++ libraries only add
implementations to these ops.

The ops are not differentiable; the autograd Function that wraps them is in each op's folder.
"""

import functools
import threading
from collections.abc import Callable

import torch

NAMESPACE = "selfsup_kernels"
IMPLS = ("reference", "cpu", "triton", "cuda")
REDUCTIONS = ("none", "mean", "sum")
"""The ops take a reduction as its index in this tuple."""

SCHEMAS: dict[str, str] = {}
"""The schema of each op, by the op's name."""
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
        gpu: the language of its GPU kernels, ``"triton"`` or ``"cuda"``.
        reference: the implementation in eager PyTorch, for every device.
        fake: a function that returns results with the right shapes and dtypes, or one per implementation.
        launcher: the GPU implementation if it is Python. Where the extension is built, ``csrc/launch`` implements the
            overload ``gpu`` too, and calls the overload ``launch``, the same launcher, for what it has no tape of.
        batched: True if ``torch.vmap`` may run the op, with one call per element.
    """
    SCHEMAS[name], _gpu[name] = schema, gpu
    for impl in ("reference", "cpu", gpu):
        _library.define(f"{name}.{impl}{schema}")
        chosen = fake[impl] if isinstance(fake, dict) else fake
        torch.library.register_fake(f"{NAMESPACE}::{name}.{impl}", chosen, lib=_library)
        if batched:
            torch.library.register_vmap(f"{NAMESPACE}::{name}.{impl}", _loop(overload(name, impl)), lib=_library)
    _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    if launcher is not None:
        # For CPU tensors too, which Triton's interpreter takes in tests; `backends.select` rejects all others.
        _library.impl(f"{name}.{gpu}", launcher, "CompositeExplicitAutograd")
        _library.define(f"{name}.launch{schema}")
        _library.impl(f"{name}.launch", _keeping_errors(launcher), "CompositeExplicitAutograd")


def impls_of(op: str) -> tuple[str, ...]:
    """Return the implementations of an op, or of both ops of a loss ("byol"); the last one is the GPU's."""
    gpu = _gpu.get(op) or _gpu.get(f"{op}_forward")
    if gpu is None:
        raise ValueError(f"op: expected one of {', '.join(_gpu)}, got {op!r}")
    return ("reference", "cpu", gpu)


def overload(name: str, impl: str):
    """Return the overload of the op ``name`` for ``impl``."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), impl)


class _Failed(threading.local):
    error = None


_failed = _Failed()
"""``error``: what a launcher has just raised. C++ between it and the caller passes on only its message."""


def _keeping_errors(launcher):
    @functools.wraps(launcher)
    def call(*arguments):
        _failed.error = None
        try:
            return launcher(*arguments)
        except BaseException as error:
            _failed.error = error
            raise

    return call


def run(name: str, impl: str, *arguments):
    """Call an op, and raise what its launcher raised: out of memory and Ctrl-C are exceptions of their own."""
    if torch.compiler.is_compiling():
        return overload(name, impl)(*arguments)
    try:
        return overload(name, impl)(*arguments)
    except RuntimeError as raised:
        error, _failed.error = _failed.error, None  # else its traceback would keep the call's tensors
        if str(error) != str(raised):
            raise
        raise error from None


def failure() -> str:
    """Return the message of what a launcher has just raised."""
    return str(_failed.error)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 inputs, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _take(argument, dims, i):
    """Return element ``i`` of an op's batched argument: a tensor, a list of tensors, or an unbatched value."""
    if isinstance(argument, list):
        return [_take(item, dim, i) for item, dim in zip(argument, dims, strict=True)]
    return argument if dims is None else argument.select(dims, i)


def _loop(op):
    """Return the ``torch.vmap`` rule of ``op``: one call per element. Merging the calls would not be faster, since each
    one already uses all threads or the whole GPU."""

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
