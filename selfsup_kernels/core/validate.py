"""Argument checks. Every message names the argument, the expected value and the actual one.

No check reads values of a tensor on an accelerator, since that would stall the stream.
"""

import math
import numbers
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from selfsup_kernels.core import shards


def views(name: str, value, minimum: int, hint: str = "") -> tuple[list[torch.Tensor], tuple[int, int, int]]:
    """Check a ``(V, B, D)`` tensor or a sequence of V ``(B, D)`` tensors; ``hint`` ends the message about too few.

    Returns:
        The tensors as they are, one or V, and ``(V, B, D)``.
    """
    stacked = isinstance(value, torch.Tensor)
    if stacked:
        if value.dim() != 3:
            got = f"got a tensor of shape {tuple(value.shape)}"
            if name == "views" and value.dim() == 2:
                got += "; as one view: [views]" * (minimum == 1) + "; as two: views.chunk(2)" * (len(value) % 2 == 0)
            raise ValueError(f"{name}: expected {VIEWS}, {got}")
        tensors = [value]
        num_views, *shape = value.shape
    else:
        tensors = sequence(name, value, VIEWS)
        num_views, shape = len(tensors), tensors[0].shape if tensors else ()
    if num_views < minimum:
        raise ValueError(f"{name}: expected at least {minimum} views, got {num_views}{hint}")
    for i, tensor in enumerate(tensors):
        if not stacked and (tensor.shape != shape or len(shape) != 2):
            if tensor.dim() == 2:
                more = i > 1 and name == "views" and tensor.shape[1:] == shape[1:]
                raise ValueError(
                    f"{name}[{i}]: expected the shape of {name}[0], {tuple(shape)}, got {tuple(tensor.shape)}"
                    f"{'; further negatives are passed by name, queue=' if more else ''}"
                )
            labels = "; labels are passed by name, labels=" if tensor.dim() == 1 and tensor.dtype in LABELS else ""
            raise ValueError(f"{name}[{i}]: expected a (B, D) tensor, got shape {tuple(tensor.shape)}{labels}")
        plain(f"{name}[{i}]", tensor)
    batch, dim = shape
    some(name, shape)
    return tensors, (num_views, batch, dim)


def rows(name: str, tensor: torch.Tensor) -> None:
    """Raise unless a tensor with two dimensions is floating, plain, and has rows and features."""
    plain(name, tensor)
    some(name, tensor.shape)


def plain(name: str, tensor: torch.Tensor) -> None:
    """Raise for a tensor of other numbers, another layout, or a DTensor."""
    if type(tensor) is not torch.Tensor:
        own(name, tensor)
    if tensor.dtype not in FLOATING or tensor.layout is not torch.strided:
        floating(name, tensor)


def some(name: str, shape) -> None:
    batch, dim = shape
    if batch == 0:
        raise ValueError(f"{name}: expected a non-empty batch, got shape {tuple(shape)}")
    if dim == 0:
        raise ValueError(f"{name}: expected at least one feature, got shape {tuple(shape)}")


def pair(first_name: str, first, second_name: str, second) -> None:
    """Raise a ValueError or TypeError unless both are ``(B, D)`` tensors of one shape."""
    for name, tensor in ((first_name, first), (second_name, second)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a (B, D) tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected a (B, D) tensor, got shape {tuple(tensor.shape)}")
    if first.shape != second.shape:
        raise ValueError(
            f"{second_name}: expected the shape of {first_name}, {tuple(first.shape)}, got {tuple(second.shape)}"
        )


def sequence(name: str, value, expected: str) -> list[torch.Tensor]:
    """Return the tensors in ``value`` as a list."""
    if not isinstance(value, (list, tuple)) and (isinstance(value, (str, bytes)) or not isinstance(value, Sequence)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, torch.Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(item).__name__}")
    return list(value)


VIEWS = "a (V, B, D) tensor or a sequence of (B, D) tensors"
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def own(name: str, tensor: torch.Tensor) -> None:
    """Raise for a DTensor: the losses combine samples of several processes through ``group=``."""
    if shards.is_dtensor(tensor):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass its to_local(), with group=mesh.get_group() where"
            " the samples of all processes are negatives, or its full_tensor()"
        )


def same_dtype_and_device(tensors, name: Callable[[int], str], check_dtype: bool = True) -> None:
    """Raise unless all tensors share one device and, with ``check_dtype`` (no autocast), one dtype.

    Args:
        name: a function from a tensor's position to its name for the message.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    for i, tensor in enumerate(tensors):
        if tensor.device != device:
            raise ValueError(f"{name(i)}: expected the device of {name(0)}, {device}, got {tensor.device}")
        if check_dtype and tensor.dtype != dtype:
            raise TypeError(f"{name(i)}: expected the dtype of {name(0)}, {dtype}, got {tensor.dtype}")


def autocasts(device: torch.device) -> bool:
    # The cheap question first. The meta device has no autocast, and asking for it is an error.
    return torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def samples(batch: int, where: str = "") -> None:
    """Raise unless there are two samples: without a queue a single sample has no negatives."""
    if batch < 2:
        raise ValueError(
            f"views: expected at least 2 samples{where} (one sample has no negatives), got {batch};"
            " a DataLoader with drop_last=True leaves out such a last batch"
        )


def choice(name: str, value, allowed: Sequence[str], hint: str = "") -> int:
    """Return the index of ``value`` in ``allowed``; raise if it is missing, with ``hint`` at the end of the message."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{hint}")
    return allowed.index(value)


def warn_once(kind: str, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn once per process for each ``kind``, with the user's line as the location.

    Does nothing while ``torch.compile`` traces, which cannot trace warnings.
    """
    if torch.compiler.is_compiling() or kind in _warned:
        return
    _warned.add(kind)
    caller, level = sys._getframe(1), 2
    while caller.f_back and caller.f_globals.get("__name__", "").startswith(("selfsup_kernels.", "torch.nn.modules.")):
        caller, level = caller.f_back, level + 1
    warnings.warn(f"selfsup_kernels: {message}", category, stacklevel=level)


_warned: set[str] = set()


def integer(name: str, value, least: int, end: int | None = None, expected: str = "an integer") -> int:
    """Return a Python or NumPy integer in ``[least, end)`` as an int."""
    whole = isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)
    if not whole or value < least or (end is not None and value >= end):
        bounds = f">= {least}" if end is None else f"in [{least}, {end})"
        raise ValueError(f"{name}: expected {expected} {bounds}, got {value!r}")
    return int(value)


def positive_number(name: str, value) -> float:
    if type(value) is not float:
        value = real(name, value)
    if not 0 < value < math.inf:  # comparisons, since torch.compile can trace them for symbolic numbers
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return value


def finite_number(name: str, value) -> float:
    value = real(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def number_or_tensor(name: str, value, number: Callable[[str, object], float]) -> tuple[torch.Tensor | None, float]:
    """Return ``(tensor of one element or None, number)``; the number, which the function ``number`` checks, is 0 for a
    tensor that is not read."""
    if not isinstance(value, torch.Tensor):
        return None, number(name, value)
    value = scalar(name, value)
    return value, number(name, value.item()) if readable(value) else 0.0


def near(name: str, tensor: torch.Tensor | None, other: str, device: torch.device) -> None:
    """Raise unless a tensor of one element is on the device of the argument ``other``, or on the CPU."""
    if tensor is not None and tensor.device not in (device, torch.device("cpu")):
        raise ValueError(f"{name}: expected the device of {other}, {device}, got {tensor.device}")


def real(name: str, value, expected: str = "a number") -> float:
    """Return a Python or NumPy number as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > 2**1000:
        raise ValueError(f"{name}: expected a number that float64 holds, got one of {value.bit_length()} bits")
    return float(value)


def momentum(value) -> tuple[torch.Tensor | None, float]:
    """Return ``(0-dim tensor, 0)`` for a tensor of one element, ``(None, number)`` for a number in [0, 1]."""
    if isinstance(value, torch.Tensor):
        value = scalar("momentum", value).reshape(())
        number = value.item() if readable(value) else 0.0
    else:
        if isinstance(value, torch.nn.Module):
            raise TypeError(
                f"momentum: expected a number or a tensor of one element, got {type(value).__name__};"
                " an EMA's update() takes no model: it reads the one that the EMA was made of"
            )
        number = real("momentum", value, "a number or a tensor of one element")
    if not 0 <= number <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {number}")
    return (value, 0.0) if isinstance(value, torch.Tensor) else (None, number)


def scalar(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of one element, with any number of dimensions; gathers a DTensor."""
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(tensor.shape)}")
    floating(name, tensor)
    return shards.gathered(tensor)


def readable(tensor: torch.Tensor) -> bool:
    """Return True if the tensor has a value that is free to read: on the CPU, not while tracing a graph, not under a
    ``torch.func`` transform, and not a fake tensor or other subclass."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def integers(name: str, value, other: str, num_views: int, batch: int, device: torch.device) -> None:
    """Raise unless ``value`` has one integer per sample and is on the device of the argument ``other``, which has that
    many views and samples."""
    if not isinstance(value, torch.Tensor):
        many = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
        remedy = f"; torch.as_tensor({name}) makes one" if many else ""
        raise TypeError(f"{name}: expected an integer tensor, got {type(value).__name__}{remedy}")
    own(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in LABELS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in LABELS)
        raise TypeError(f"{name}: expected a tensor of {names}, got {str(value.dtype).removeprefix('torch.')}")
    shape = tuple(value.shape)
    if shape != (batch,):
        hint = ""
        if shape == (num_views,):
            hint = f"; views are (V, B, D), here {num_views} of {batch} samples"
        elif shape == (num_views * batch,):
            hint = f"; the {num_views} views of a sample share one"
        elif len(shape) == 2 and shape[0] == batch:
            hint = f"; {name}.flatten()" if shape[1] == 1 else f"; classes of one-hot rows: {name}.argmax(1)"
        raise ValueError(f"{name}: expected shape ({batch},), one per sample, got {shape}{hint}")
    if value.device != device:
        raise ValueError(f"{name}: expected the device of {other}, {device}, got {value.device}")


def logq(value, num_views: int, batch: int, device: torch.device) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"logq: expected a floating tensor, got {type(value).__name__}")
    plain("logq", value)
    if tuple(value.shape) not in ((batch,), (num_views, batch)):
        raise ValueError(
            f"logq: expected shape ({batch},), one per sample, or ({num_views}, {batch}), got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"logq: expected the device of views, {device}, got {value.device}")


def queue(value, dim: int) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"queue: expected a (K, D) tensor, got {type(value).__name__}")
    own("queue", value)
    floating("queue", value)
    if value.dim() != 2 or value.shape[0] == 0 or value.shape[1] != dim:
        columns = value.dim() == 2 and value.shape[0] == dim  # as MoCo's own code keeps them
        raise ValueError(
            f"queue: expected shape (K, {dim}) with K >= 1, got {tuple(value.shape)}{'; queue.T' if columns else ''}"
        )


def one_dtype(tensors, queue):
    """Convert operands of different dtypes to float32 (float64 if one is), as PyTorch's losses do under autocast."""
    dtypes = {x.dtype for x in tensors} | ({queue.dtype} if queue is not None else set())
    if len(dtypes) == 1:
        return tensors, queue
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return [x.to(wide) for x in tensors], None if queue is None else queue.to(wide)
