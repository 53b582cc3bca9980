"""Changing an installed library in place, so that code which imports it needs no change, and changing it back."""

import functools
import importlib
import importlib.util
import re
import sys
import threading
import types

import torch

from selfsup_kernels.compat._calls import record
from selfsup_kernels.compat._common import Unsupported, is_own, overridden
from selfsup_kernels.compat._table import TABLE, TESTED

_lock = threading.RLock()
_handles: dict[str, list["Patch"]] = {}
"""By library, the patches that hold it: it is changed back when the last one is undone."""


def patch(name: str) -> "Patch":
    """Compute an installed library's losses and averages by our kernels, until undone.

    ::

        selfsup_kernels.compat.patch("lightly")            # from here on; .undo() of what it returns ends it
        with selfsup_kernels.compat.patch("lightly"):      # or within a block
            ...

    The library's classes stay what they are, with their constructors, attributes and subclasses. Those of their methods
    that compute the loss or the average are replaced, for objects that exist already too. A replaced method calls the
    drop-in. It calls the original instead for what the drop-in does not serve: arguments or settings that it refuses,
    and objects whose class, or that themselves, replace a method that the original calls and the drop-in does not.
    Each class and reason is warned of once, and :func:`selfsup_kernels.compat.report` counts them.

    A function is replaced in every global name of every imported module that refers to it, and in names that later
    imports make. Other references to it (a local variable, a default argument, an entry of a dictionary) keep it.

    ``undo`` turns all of it back. A library may be patched several times over: the last undo counts.

    Args:
        name: ``"lightly"``, ``"pytorch_metric_learning"`` or another library of ``selfsup_kernels.compat._table``.

    Returns:
        A handle with ``undo()``, which is a context manager too.

    Raises:
        ValueError: we have no drop-ins for a library of this name.
        RuntimeError: the library is not installed, does not import, or lacks a name that a drop-in is for. Nothing has
            changed then.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a library's name, got {type(name).__name__}")
    library = name.replace("-", "_")
    if library not in TABLE:
        raise ValueError(f"name: expected one of {', '.join(TABLE)}, as in an import, got {name!r}")
    with _lock:
        handles = _handles.setdefault(library, [])
        changes = handles[0].changes if handles else _changes(library)
        # Again for a library that is patched already: a module may have got hold of an original since.
        for change in changes:
            change.make()
        handle = Patch(library, changes)
        handles.append(handle)
    return handle


class Patch:
    """What :func:`patch` returns."""

    def __init__(self, library, changes):
        self.library = library
        self.changes = changes

    def undo(self) -> None:
        """Change the library back, unless it is patched by others still. A second undo does nothing."""
        with _lock:
            handles = _handles.get(self.library, [])
            if self not in handles:
                return
            handles.remove(self)
            if not handles:
                for change in self.changes:
                    change.undo()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()

    def __repr__(self):
        names = ", ".join(change.name for change in self.changes)
        return f"<{'active' if self in _handles.get(self.library, []) else 'undone'} patch of {names}>"


def _changes(library):
    """What patching the library consists of; nothing has changed yet."""
    if importlib.util.find_spec(library) is None:
        raise RuntimeError(f"name: expected an installed library, but {library} is not installed here")
    drop_ins = importlib.import_module(f"selfsup_kernels.compat.{library}")
    changes = []
    for swap in TABLE[library]:
        name = f"{swap.module}.{swap.attribute}"
        try:
            module = importlib.import_module(swap.module)
            if swap.optional and not hasattr(module, swap.attribute):
                continue
            original, ours = getattr(module, swap.attribute), getattr(drop_ins, swap.ours)
            if not isinstance(original, type):
                changes.append(_Function(name, original, ours))
            for method in swap.methods:
                changes.append(_Method(f"{name}.{method}", library, original, method, ours))
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"name: {name} cannot be patched in the installed {library}"
                f" ({type(error).__name__}: {error}); the drop-ins follow version {TESTED[library]}"
            ) from error
    return changes


class _Method:
    """A method of a library's class, and what stands in for it."""

    def __init__(self, name, library, cls, method, ours):
        self.name, self.cls, self.method = name, cls, method
        self.original = getattr(cls, method)
        self.inherited = method not in vars(cls)
        hooks = {hook: getattr(cls, hook) for hook in getattr(ours, "hooks", ())}
        # What a user has put into the library's class before this, which is not to be undone.
        changed = [hook for hook, function in {method: self.original, **hooks}.items() if not is_own(library, function)]
        self.replacement = self._dispatch(getattr(ours, method), hooks, changed)

    def make(self):
        setattr(self.cls, self.method, self.replacement)

    def undo(self):
        if vars(self.cls).get(self.method) is not self.replacement:
            return  # somebody else has replaced it since
        if self.inherited:
            delattr(self.cls, self.method)
        else:
            setattr(self.cls, self.method, self.original)

    def _dispatch(self, ours, hooks, changed):
        cls, name, original, inherited = self.cls, self.method, self.original, self.inherited

        @functools.wraps(original)
        def method(module, *args, **kwargs):
            following = original
            if inherited and type(module) is not cls:  # a mixin may come between the class and the one it inherits from
                following = getattr(super(cls, type(module)), name)
            replaced = changed or overridden(module, hooks) or ([] if following is original else [name])
            if replaced:
                reason = f"its own {', '.join(replaced)}"
            else:
                reason, result = _attempt(ours, module, *args, **kwargs)
            record(f"{type(module).__module__}.{type(module).__qualname__}", reason)
            return result if reason is None else following(module, *args, **kwargs)

        return method


class _Function:
    """A library's function, and what stands in for it."""

    def __init__(self, name, original, ours):
        self.name, self.original = name, original

        @functools.wraps(original)
        def function(*args, **kwargs):
            reason, result = _attempt(ours, *args, **kwargs)
            record(name, reason)
            return result if reason is None else original(*args, **kwargs)

        self.replacement = function

    def make(self):
        _swap(self.original, self.replacement)

    def undo(self):
        _swap(self.replacement, self.original)


def _attempt(ours, *args, **kwargs):
    """``(None, what ours returns)``, or ``(why it does not serve the call, None)``."""
    try:
        return None, ours(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, Unsupported):
            return error.args[-1], None
        # Without this call's values and shapes, so that further calls have the same reason.
        return re.sub(r"\(\d+,[\d, ]*\)", "(...)", str(error).partition(", got ")[0]), None


def _swap(first, second) -> None:
    """Make every module's global name that refers to the first refer to the second.

    Through the dictionaries: asking a module for an attribute may import things, and lazy modules have odd ones.
    """
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):
            continue
        names = vars(module)
        for name in [name for name, value in list(names.items()) if value is first]:
            names[name] = second
