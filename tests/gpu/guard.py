"""CPU tensors that end at an inaccessible page: reading or writing past them kills the process instead of passing."""

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a CPU tensor whose last byte is followed by an inaccessible page.

    Other devices have no such pages: the copy is a plain one, and compute-sanitizer finds accesses past its end.
    """
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size).view(
        tensor.shape
    )
    return copy.copy_(tensor.detach())
