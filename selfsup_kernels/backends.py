"""What this machine can run, and the one place that chooses an implementation."""

import functools
import importlib
import importlib.util

import torch

from selfsup_kernels import ops

CHOICES = ("auto", "reference", "cpu", "triton", "cuda")

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
"""The command that builds the C++ extension against the installed torch, run from a checkout."""


@functools.cache
def load_extension():
    """Load the C++ extension. Returns ``(module, None)`` or ``(None, why it cannot be used)``; never raises."""
    from selfsup_kernels import _build

    if importlib.util.find_spec("selfsup_kernels._C") is None:
        return None, f"the C++ extension was not built: {_build.recorded_failure()}"
    reason = _build.mismatch()
    if reason is not None:
        return None, reason
    try:
        return importlib.import_module("selfsup_kernels._C"), None
    except (ImportError, OSError) as error:
        return None, f"the C++ extension does not load ({error}). {_build.built_for()}"


_reasons: dict[str, str | None] = {}


def unavailable(impl: str) -> str | None:
    """None where ``impl`` can run on this machine, else the reason and what to do about it."""
    if impl not in _reasons:
        _reasons[impl] = _find_reason(impl)
    return _reasons[impl]


def _find_reason(impl):
    if impl == "reference":
        return None
    if impl == "cpu":
        _, reason = load_extension()
        return None if reason is None else f"{reason} To mend it, run: {REBUILD}"
    return f"impl={impl!r} is not part of this version. Use impl='auto', 'cpu' or 'reference'."


# Asked once here, so that torch.compile, which cannot follow the loading of a library, only ever finds the answers.
for _impl in CHOICES[1:]:
    unavailable(_impl)


def select(impl: str, tensor: torch.Tensor) -> str:
    """The implementation that ``impl`` stands for on ``tensor``'s device.

    Raises:
        ValueError: ``impl`` is not one of :data:`CHOICES`.
        RuntimeError: this machine, or the tensor's device, cannot use it.
    """
    if impl == "auto":
        return "cpu" if tensor.device.type == "cpu" and unavailable("cpu") is None else "reference"
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(CHOICES)}, got {impl!r}")
    reason = unavailable(impl)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot be used here: {reason}")
    if impl == "cpu" and tensor.device.type != "cpu":
        raise RuntimeError(f"impl='cpu' takes CPU tensors, got a tensor on {tensor.device}; use impl='auto'")
    return impl


def op(name: str, impl: str):
    """The dispatcher op ``name`` of an implementation that :func:`select` returned."""
    return ops.get(name, impl)
