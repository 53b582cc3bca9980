"""Code shared by the drop-ins."""

import contextlib
import types

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from selfsup_kernels.core import validate as check
from selfsup_kernels.core.lazy import constant
from selfsup_kernels.info_nce.api import info_nce_loss


class Unsupported(RuntimeError):
    """Raised for a feature of the original that the drop-in lacks; the arguments are ``(message, feature)``."""

    def __str__(self):
        return self.args[0]


def unsupported(original: str, feature: str, instead: str = "") -> Unsupported:
    """Return the error for a feature of the original that the drop-in lacks: ``raise unsupported(...)``.

    Args:
        original: the name of the original, ``"lightly.loss.DCLLoss"``.
        feature: the requested feature, ``"reducer=ThresholdReducer"``.
        instead: a clause that says what to do; by default, to use the original.
    """
    instead = instead or f"use {original} itself for it"
    return Unsupported(f"{feature}: the drop-in for {original} does not support this; {instead}", feature)


class DropIn(nn.Module):
    """Base class of drop-ins for classes that users subclass.

    Hooks that the drop-in has work as in the original. A subclass or an object that replaces another hook raises: the
    drop-in would not call it.
    """

    original: str
    """The full name of the original."""
    hooks: tuple[str, ...] = ()
    """The original's methods that the replaced methods call on ``self``."""
    constructor_hooks: tuple[str, ...] = ()
    """The original's methods that only its constructor calls or sets."""

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
    """Return True if a drop-in among the bases of ``cls`` defines the method ``name``."""
    return any(name in vars(base) for base in cls.__mro__ if base.__module__.startswith("selfsup_kernels."))


def overridden(module, methods) -> list[str]:
    """Return the names of ``methods`` (name -> function) that ``module`` or its class replaces."""
    kind, own = type(module), module.__dict__
    return [name for name, method in methods.items() if name in own or getattr(kind, name, None) is not method]


def is_from(library: str, value, names) -> bool:
    """Return True if ``value`` is a function or class of the library or of this package with one of these names.

    Wrappers are excluded: ``functools.wraps`` gives them the name and module of the wrapped function.
    """
    if getattr(value, "__name__", None) not in names or hasattr(value, "__wrapped__"):
        return False
    return _package(value) in (library, "selfsup_kernels")


def is_own(library: str, function) -> bool:
    """Return True if a method is the library's or ours, undecorated or decorated only by torch, the library or us."""
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
    """Return what makes a part of ``module`` compute something other than its class in ``library`` does.

    The originals call their parts; the drop-ins do not. The result lists the methods replaced in the part or its class,
    and ``"hooks"`` if the part has any or, under ``compat.patch``, if there are hooks of all modules.
    """
    kind = type(part)
    if (methods := _methods_of.get(kind)) is not None:
        found = overridden(part, methods)
    else:
        names, foreign = _method_names(kind, library)
        found = [name for name in names if name in foreign or name in part.__dict__]
        if not foreign and not torch.compiler.is_compiling():
            _methods_of[kind] = {name: getattr(kind, name) for name in names}
    every = not isinstance(module, DropIn) and torch_module._has_any_global_hook()
    if every or any(getattr(part, name, None) for name in _HOOKS):
        found.append("hooks")
    return found


@constant
def _method_names(kind, library) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a class's methods except nn.Module's, and which of them are not the library's.

    Names, not functions: torch.compile cannot guard a function that a constant contains.
    """
    methods = {}
    for base in kind.__mro__:
        if base not in (nn.Module, object):
            methods |= {name: getattr(kind, name, None) for name in vars(base)}
    methods = {
        name: method
        for name, method in methods.items()
        if (name == "__call__" or not name.startswith("__"))
        and callable(method)
        and not isinstance(method, (types.MethodType, type))
    }
    return tuple(methods), tuple(name for name, method in methods.items() if not is_own(library, method))


def wide_loss(views, **arguments):
    """Return :func:`selfsup_kernels.info_nce_loss` in float32 or float64, for further computations.

    Views of 16 bits run under autocast, which reads them as they are and returns float32.
    """
    arguments["group"] = arguments.get("group") or "local"  # the original defines whose samples count: no warning
    device, dtype = views[0].device.type, views[0].dtype
    low = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(device, dtype) if low else contextlib.nullcontext():
        return info_nce_loss(views, **arguments)


def narrow(loss, like):
    """Return ``loss`` in the dtype of ``like``, as PyTorch's losses do; unchanged under autocast."""
    return loss if check.autocasts(like.device) else loss.to(like.dtype)
