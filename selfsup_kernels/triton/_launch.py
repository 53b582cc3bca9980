"""What every launcher shares: the one call that starts a kernel, the device it starts on, and the interpreter's rules."""

import contextlib
import functools

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors. Decided once, when the kernels are decorated."""

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(kernel, grid, *args, **options):
    """``kernel[grid](*args, **options)``. Every launch of the package goes through here, so that tools can watch it
    (``launch`` is looked up in this module at each call, and may be replaced)."""
    kernel[grid](*args, **options)


def on_device_of(tensor):
    """A context in which ``tensor``'s device is the current one: Triton launches on that, and on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def architecture(index: int) -> int:
    """The compute capability of a CUDA device as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch_of(tensor) -> int:
    """The architecture that the kernels of ``tensor`` run on; the interpreter stands for the newest Hopper."""
    return architecture(tensor.device.index) if tensor.is_cuda else 90


def processors_of(tensor) -> int:
    return multiprocessors(tensor.device.index) if tensor.is_cuda else 4
