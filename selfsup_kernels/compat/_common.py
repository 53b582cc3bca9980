"""What the drop-ins share."""

import contextlib

import torch

from selfsup_kernels import _validate as check
from selfsup_kernels.functional import info_nce_loss


def unsupported(original: str, feature: str, instead: str = "") -> RuntimeError:
    """The error for what the original can do and its drop-in cannot; for ``raise unsupported(...)``.

    Args:
        original: the name of the original, ``"lightly.loss.DCLLoss"``.
        feature: what was asked for, ``"reducer=ThresholdReducer"``.
        instead: what to do, a clause; by default, to use the original.
    """
    instead = instead or f"use {original} itself for it"
    return RuntimeError(f"{feature}: the drop-in for {original} does not support this; {instead}")


def pair(first_name: str, first, second_name: str, second) -> None:
    """Two ``(B, D)`` tensors of one shape, or a ValueError or TypeError that names the one that is not."""
    for name, tensor in ((first_name, first), (second_name, second)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a (B, D) tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected a (B, D) tensor, got shape {tuple(tensor.shape)}")
    if first.shape != second.shape:
        raise ValueError(
            f"{second_name}: expected the shape of {first_name}, {tuple(first.shape)}, got {tuple(second.shape)}"
        )


def wide_loss(views, **arguments):
    """:func:`selfsup_kernels.info_nce_loss`, its value in float32 at least: for losses that are computed with further.

    Under autocast the value is float32 for views of any dtype, which are read as they are.
    """
    arguments["group"] = arguments.get("group") or "local"  # the original says whose samples count: no warning
    device, dtype = views[0].device.type, views[0].dtype
    low = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(device, dtype) if low else contextlib.nullcontext():
        return info_nce_loss(views, **arguments)


def narrow(loss, like):
    """``loss`` in the dtype of ``like``, as PyTorch's own losses return it; as it is under autocast."""
    return loss if check.autocasts(like.device) else loss.to(like.dtype)
