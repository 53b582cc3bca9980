"""Code that all launchers share: the one call that starts a kernel, the device it starts on, tensor descriptors."""

import contextlib
import functools
import importlib
import sys
import threading

import torch

from selfsup_kernels.core import backends
from selfsup_kernels.tiles import archive, code
from selfsup_kernels.tiles.code import Descriptor

INTERPRETED = backends.triton_is_interpreted()
"""Kernels run in Triton's interpreter, on CPU tensors. Decided once, when the kernels are decorated."""


ALWAYS = {"enable_fp_fusion": True}
"""Triton's options of every kernel: Triton 3.9 warns that later versions will not fuse a product and a sum unless told
to."""


class _Recording(threading.local):
    recorder = None


recording = _Recording()
"""``recorder``: what this thread tells its launches and allocations, a :class:`selfsup_kernels.tiles.tape.Recorder`."""


def launch(kernel: str, grid: tuple, *args, **options):
    """Launch a kernel of :mod:`selfsup_kernels.tiles.kernels`: its machine code from the archive, else Triton's
    ``kernel[grid](*args, **options)``. ``options`` are the kernel's constants, and Triton's own options.

    Every launch of the package goes through here, so that tools can watch it (``launch`` is looked up in this module at
    each call, and may be replaced)."""
    found, recorder = _from_archive(kernel, args, options), recording.recorder
    if found is None:
        compiled = kernel_of(kernel)[grid](*map(for_triton, args), **options, **ALWAYS)
        if recorder is not None:
            recorder.launched_by_triton(compiled, grid, args)
    elif 0 not in grid:
        extension, _ = backends.load_extension()
        tensor, number = _first_tensor(args), next((float(x) for x in args if isinstance(x, code.Input)), 0.0)
        made = code.launch_of(found, grid, args, _absolute)
        extension.tape.start(made, number, tensor.device.index or 0, tensor.is_cuda)
        if recorder is not None:
            recorder.launched(found, grid, args)


def _from_archive(kernel, args, options):
    """Return the code of a launch, or None if Triton is to make it."""
    if INTERPRETED or hooked() or (opened := archive.opened()) is None:
        return None
    tensor = _first_tensor(args)
    return opened.find(kernel, arch_of(tensor), tensor.device, args, options)


def _first_tensor(args):
    """Return a tensor of a launch: each has one among its first argument."""
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    return first.base if isinstance(first, Descriptor) else first


def _absolute(tensor):
    return code.Address(0, tensor.data_ptr())


def kernel_of(name):
    """Return a kernel as Triton's decorator makes it, given its name; a tool's own kernel comes as it is.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not isinstance(name, str):
        return name
    try:
        kernels = importlib.import_module("selfsup_kernels.tiles.kernels")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"impl='triton': this package has no machine code of {name} for this call and this GPU, and Triton, which"
            " compiles it, is not installed. Run: pip install 'triton>=3.6'"
        ) from None
    return getattr(kernels, name)


def for_triton(value):
    """Return an argument as Triton takes it."""
    if not isinstance(value, Descriptor):
        return value
    from triton.tools.tensor_descriptor import TensorDescriptor

    base = value.base
    return TensorDescriptor(base, list(base.shape), [base.stride(0), 1], list(value.block))


def hooked() -> bool:
    """Return whether a tool has set one of Triton's hooks, which only its own launches call."""
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    if knobs is None:
        return False
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)  # a chain of hooks, or as in older versions one, or None


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


def partial_sums(layout, splits, queues, stored):
    """Allocate ``partial`` (splits + queues, own rows, S), which ``finish_rows`` adds up."""
    return empty((splits + queues, layout.views * layout.part[1], layout.stride), torch.float32, stored.device)


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
    shapes = ((rows, config.block_k) for rows in (config.block_m, config.block_n))
    return tuple(Descriptor(stored, shape) for shape in shapes)


def product_sources(left, right, config, transposed=False):
    """Return the operands of a product as kernels take them, in blocks (block_m, block_k) of ``left``, or of its
    transpose, and (block_k, block_n) of ``right``."""
    if not config.descriptor:
        return left, right
    of_left = (config.block_k, config.block_m) if transposed else (config.block_m, config.block_k)
    shapes = of_left, (config.block_k, config.block_n)
    return tuple(Descriptor(t, shape) for t, shape in zip((left, right), shapes, strict=True))
