"""Code that all launchers share: the one call that starts a kernel, the device it starts on, tensor descriptors."""

import contextlib
import functools
import threading

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors. Decided once, when the kernels are decorated."""

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Input(float):
    """A number that may differ in each replay of a tape; any other is the same for all calls with one signature."""


class _Recording(threading.local):
    recorder = None


recording = _Recording()
"""``recorder``: what this thread tells its launches and allocations, a :class:`selfsup_kernels.tiles.tape.Recorder`."""


def launch(kernel, grid, *args, **options):
    """``kernel[grid](*args, **options)``. Every launch of the package goes through here, so that tools can watch it
    (``launch`` is looked up in this module at each call, and may be replaced)."""
    compiled = kernel[grid](*args, **options)
    if recording.recorder is not None:
        recording.recorder.launched(kernel, grid, args, options, compiled)


def on_device_of(tensor):
    """Return a context in which ``tensor``'s device is current: Triton launches on the current device and stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def empty(shape, dtype, device):
    """Allocate memory that a kernel writes. All of it comes from here, so that tests can put a fence behind it."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if recording.recorder is not None:
        recording.recorder.made.append(tensor)
    return tensor


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv`` for the host: Triton's own takes longer, since kernels can call it too."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """``triton.next_power_of_2`` for the host; ``n`` is positive."""
    return 1 << (n - 1).bit_length()


_launch, _empty = launch, empty


def watched() -> bool:
    """Return whether a tool has replaced :func:`launch` or :func:`empty`."""
    return launch is not _launch or empty is not _empty


MANY_TILES = 16
"""From this many tiles per resident program on, tiles without masks have a launch of their own."""


def deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


@functools.cache
def architecture(index: int) -> int:
    """Return the compute capability of a CUDA device as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch_of(tensor) -> int:
    """Return the architecture that kernels on ``tensor`` run on; the interpreter counts as Hopper."""
    return architecture(tensor.device.index) if tensor.is_cuda else 90


def sms_of(tensor) -> int:
    return multiprocessors(tensor.device.index) if tensor.is_cuda else 4


def tile_sources(stored, config):
    """Return the stored rows as kernels take them, for blocks of ``block_m`` and of ``block_n`` rows: two tensor
    descriptors, or the tensor itself twice."""
    if not config.descriptor:
        return stored, stored
    shapes = ([rows, config.block_k] for rows in (config.block_m, config.block_n))
    return tuple(TensorDescriptor(stored, list(stored.shape), [stored.stride(0), 1], shape) for shape in shapes)


def product_sources(left, right, config):
    """Return the operands of a product as kernels take them, in blocks (block_m, block_k) of ``left`` and
    (block_k, block_n) of ``right``."""
    if not config.descriptor:
        return left, right
    shapes = ([config.block_m, config.block_k], [config.block_k, config.block_n])
    return tuple(
        TensorDescriptor(t, list(t.shape), [t.stride(0), 1], s) for t, s in zip((left, right), shapes, strict=True)
    )
