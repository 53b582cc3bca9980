"""Detect the implementations that this machine can run, and choose one of them."""

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch

from selfsup_kernels.core import ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.lazy import constant

CHOICES = ("auto", *ops.IMPLS)

NO_CUDA = (
    f"this PyTorch ({torch.__version__}) was built without CUDA. Install a CUDA build of PyTorch, or use impl='auto'."
)

EMULATOR = os.environ.get("SELFSUP_KERNELS_CUDA_EMULATOR") or None
"""For tests: the path of a library with the CUDA kernels compiled for an emulator, which takes CPU tensors."""


@functools.cache
def load_extension():
    """Load the C++ extension. Returns ``(module, None)`` or ``(None, why it cannot be used)``; never raises."""
    from selfsup_kernels.core import build

    if importlib.util.find_spec("selfsup_kernels._C") is None:
        return None, build.not_built()
    reason = build.mismatch()
    if reason is not None:
        return None, reason
    try:
        return importlib.import_module("selfsup_kernels._C"), None
    except (ImportError, OSError) as error:
        return None, f"the C++ extension does not load ({error}). {build.built_for()}"


class Unavailable(NamedTuple):
    """Reason why an implementation cannot be used, and the command that fixes this, if there is one."""

    why: str
    command: str | None = None

    def __str__(self):
        return f"{self.why} Run: {self.command}" if self.command else self.why


_reasons: dict[str, Unavailable | None] = {}


def unavailable(impl: str) -> Unavailable | None:
    """Return None if ``impl`` can run on this machine, else the reason and the fix.

    Example:
        >>> print(sk.backends.unavailable("reference"))
        None
    """
    if impl not in _reasons:
        _reasons[impl] = _find_reason(impl)
    return _reasons[impl]


def _find_reason(impl):
    from selfsup_kernels.core import build

    if impl == "cpu":
        _, why = load_extension()
        return None if why is None else Unavailable(why, build.rebuild())
    if impl == "triton":
        return _no_triton()
    if impl == "cuda":
        _, why = load_cuda()
        buildable = EMULATOR is None and torch.version.cuda is not None
        return None if why is None else Unavailable(why, f"FORCE_CUDA=1 {build.rebuild()}" if buildable else None)
    return None


@functools.cache
def load_cuda():
    """Load the CUDA library. Returns ``(path, None)`` or ``(None, why it cannot be used)``; never raises."""
    from selfsup_kernels.core import build

    path = EMULATOR
    if path is None:
        if torch.version.cuda is None:
            return None, NO_CUDA
        path, reason = build.cuda_library()
        reason = reason or build.mismatch()
        if reason is not None:
            return None, reason
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, f"the CUDA library does not load ({error}). {build.built_for()}"
    return path, None


GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)


ARCHIVE = Path(__file__).resolve().parents[1] / "_kernels.zip"
"""Machine code of Triton's kernels, compiled ahead of time (:mod:`selfsup_kernels.tiles.archive`). The environment's
SELFSUP_KERNELS_ARCHIVE names another file, or is "0": Triton compiles all kernels."""


def archive_path() -> Path | None:
    """Return the archive's path; None if there is none."""
    named = os.environ.get("SELFSUP_KERNELS_ARCHIVE")
    if named == "0" or (not named and not ARCHIVE.exists()):
        return None
    return Path(named or ARCHIVE)


HAS_TRITON = importlib.util.find_spec("triton") is not None


def _no_triton():
    if not HAS_TRITON and archive_path() is None:
        return Unavailable("Triton is not installed.", "pip install 'triton>=3.6'")
    if torch.version.cuda is None and not triton_is_interpreted():
        return Unavailable(NO_CUDA)
    return None


def triton_is_interpreted() -> bool:
    """Return True if Triton kernels run in its CPU interpreter (for tests). Triton reads the variable at import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _capability(index):
    return torch.cuda.get_device_capability(index)


def _compiled_ahead(major, minor):
    return importlib.import_module("selfsup_kernels.tiles.archive").serves(10 * major + minor)


def emulated(impl: str) -> bool:
    """Return True if the GPU kernels of ``impl`` run on CPU tensors, as in tests."""
    return triton_is_interpreted() if impl == "triton" else EMULATOR is not None


@constant
def _gpu_refuses(impl: str, device_type: str, index: int | None, dtype: torch.dtype, any_dtype: bool) -> str | None:
    """Return None if the GPU kernels of ``impl`` take such tensors, else the reason. torch.compile sees a constant."""
    if not any_dtype and dtype not in GPU_DTYPES:
        return f"takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if emulated(impl):
        tool = "interpreted (TRITON_INTERPRET)" if impl == "triton" else "emulated (SELFSUP_KERNELS_CUDA_EMULATOR)"
        return None if device_type == "cpu" else f"was set to be {tool}, which needs CPU tensors"
    if device_type != "cuda":
        return f"takes CUDA tensors, got a tensor on {device_type}"
    if _capability(index) < MINIMUM_CAPABILITY:
        return "needs a GPU of compute capability 8.0 (Ampere) or later, this one has {}.{}".format(*_capability(index))
    if impl == "triton" and not HAS_TRITON and not _compiled_ahead(*_capability(index)):
        return "has no kernels for this GPU compiled ahead of time, and Triton, which compiles them, is not installed"
    return None


# Cache the answers now: torch.compile cannot trace the loading of a library.
for _impl in CHOICES[1:]:
    unavailable(_impl)


def require(impl: str, op: str) -> None:
    """Raise like :func:`select` if ``impl``, not ``"auto"``, cannot be used on this machine for any tensor.

    Example:
        >>> sk.backends.require("reference", "info_nce")
    """
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(CHOICES)}, got {impl!r}")
    if impl not in ops.impls_of(op):
        raise RuntimeError(f"impl={impl!r} has no {op}, which {', '.join(ops.impls_of(op))} have; use impl='auto'")
    reason = unavailable(impl)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot be used here: {reason}")


def select(impl: str, tensor: torch.Tensor, op: str = "info_nce", any_dtype: bool = False) -> str:
    """Return the implementation of ``op`` that ``impl`` selects for ``tensor``'s device and dtype.

    ``any_dtype``: every implementation of the op takes every floating dtype.

    Raises:
        ValueError: ``impl`` is not one of :data:`CHOICES`.
        RuntimeError: this machine, or the tensor's device, cannot use ``impl``.

    Example:
        >>> sk.backends.select("reference", torch.randn(2, 3))
        'reference'
    """
    if impl in ("auto", "cpu") and tensor.is_cpu and unavailable("cpu") is None:
        return "cpu"
    device = tensor.device
    if impl == "auto":
        if device.type == "cpu" and not torch.compiler.is_compiling():
            why = "CPU tensors go through eager PyTorch (impl='reference'), not through the kernels:"
            check.warn_once("fallback", f"{why} {unavailable('cpu')}", RuntimeWarning)
        if device.type == "cuda":
            *_, choice = ops.impls_of(op)
            if not (unavailable(choice) or _gpu_refuses(choice, "cuda", device.index, tensor.dtype, any_dtype)):
                return choice
        return "reference"
    require(impl, op)
    if impl == "cpu" and device.type != "cpu":
        raise RuntimeError(f"impl='cpu' takes CPU tensors, got a tensor on {device}; use impl='auto'")
    if impl in ("triton", "cuda"):
        refusal = _gpu_refuses(impl, device.type, device.index, tensor.dtype, any_dtype)
        if refusal is not None:
            raise RuntimeError(f"impl={impl!r} {refusal}; use impl='auto'")
    return impl


def or_auto(impl: str, op: str) -> str:
    """Return ``impl`` if ``op`` has it, else ``"auto"``: for methods that run several ops with one ``impl``."""
    check.choice("impl", impl, CHOICES)
    return impl if impl in ops.impls_of(op) else "auto"
