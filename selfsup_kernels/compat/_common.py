"""What the drop-ins share."""

import contextlib
import types

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from selfsup_kernels.core import validate as check
from selfsup_kernels.core.lazy import constant
from selfsup_kernels.info_nce.api import info_nce_loss


class Unsupported(RuntimeError):
    """What an original can do and its drop-in cannot: ``(message, feature)``, the latter what was asked for."""

    def __str__(self):
        return self.args[0]


def unsupported(original: str, feature: str, instead: str = "") -> Unsupported:
    """The error for what the original can do and its drop-in cannot; for ``raise unsupported(...)``.

    Args:
        original: the name of the original, ``"lightly.loss.DCLLoss"``.
        feature: what was asked for, ``"reducer=ThresholdReducer"``.
        instead: what to do, a clause; by default, to use the original.
    """
    instead = instead or f"use {original} itself for it"
    return Unsupported(f"{feature}: the drop-in for {original} does not support this; {instead}", feature)


class DropIn(nn.Module):
    """A drop-in for a class that is made to be subclassed.

    A hook that the drop-in has works as in the original. A subclass, or an assignment to an object, that replaces
    another one is refused: the drop-in would not call it.
    """

    original: str
    """The full name of the original."""
    hooks: tuple[str, ...] = ()
    """The original's methods that the replaced ones call on ``self``."""
    constructor_hooks: tuple[str, ...] = ()
    """Those that its constructor alone calls or sets."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in cls.hooks + cls.constructor_hooks:
            if hasattr(cls, name) and not _has(cls, name):
                raise unsupported(cls.original, f"{cls.__qualname__}.{name}")

    def __setattr__(self, name, value):
        if name in self.hooks + self.constructor_hooks and not _has(type(self), name):
            raise unsupported(self.original, f"{type(self).__qualname__}.{name}")
        super().__setattr__(name, value)


def _has(cls, name):
    """Whether a drop-in among the bases of ``cls`` has the method ``name`` itself."""
    return any(name in vars(base) for base in cls.__mro__ if base.__module__.startswith("selfsup_kernels."))


def overridden(module, methods) -> list[str]:
    """The names of those methods (name -> function) that the class of ``module``, or the object itself, replaces."""
    kind, own = type(module), module.__dict__
    return [name for name, method in methods.items() if name in own or getattr(kind, name, None) is not method]


def is_from(library: str, value, names) -> bool:
    """Whether ``value``, a function or class, has one of these names in the library or in this package.

    A wrapper is not: ``functools.wraps`` gives it the name and the module of what it wraps.
    """
    if getattr(value, "__name__", None) not in names or hasattr(value, "__wrapped__"):
        return False
    return _package(value) in (library, "selfsup_kernels")


def is_own(library: str, function) -> bool:
    """Whether a method is the library's or ours, bare or in decorators of torch or its own: no user's."""
    while hasattr(function, "__wrapped__"):
        where = getattr(function, "__globals__", {}).get("__name__", "")
        if where.partition(".")[0] not in (library, "selfsup_kernels", "torch"):
            return False
        function = function.__wrapped__
    return _package(function) in (library, "selfsup_kernels")


def _package(value):
    return (getattr(value, "__module__", None) or "").partition(".")[0]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_methods_of: dict[type, dict] = {}


def altered(module, part, library: str) -> list[str]:
    """What makes a part of ``module`` compute something else than its class in ``library`` does.

    The originals call their parts and the drop-ins do not. These are the names of methods that somebody has replaced in
    the part or its class, and ``"hooks"``: those of the part, and under ``compat.patch`` those of all modules.
    """
    found = overridden(part, _methods_of.get(type(part)) or _methods(type(part), library))
    every = not isinstance(module, DropIn) and torch_module._has_any_global_hook()
    if every or any(getattr(part, name, None) for name in _HOOKS):
        found.append("hooks")
    return found


@constant
def _methods(kind, library):
    """name -> function of a class's methods but nn.Module's; None in place of one that is not the library's."""
    methods = {}
    for base in kind.__mro__:
        if base not in (nn.Module, object):
            methods |= {name: getattr(kind, name, None) for name in vars(base)}
    methods = {
        name: method if is_own(library, method) else None
        for name, method in methods.items()
        if (name == "__call__" or not name.startswith("__"))
        and callable(method)
        and not isinstance(method, (types.MethodType, type))
    }
    if None not in methods.values():
        _methods_of[kind] = methods
    return methods


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
