"""Patch an installed library in place, so that code which imports it needs no change, and undo the patch."""

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
"""The active patches of each library: undoing the last one restores it."""


def patch(name: str) -> "Patch":
    """Compute an installed library's losses and averages with our kernels, until undone.

    ::

        selfsup_kernels.compat.patch("lightly")            # from here on, until .undo() of the returned handle
        with selfsup_kernels.compat.patch("lightly"):      # or within a block
            ...

    The library keeps its classes, with their constructors, attributes and subclasses. Only the methods that compute the
    loss or the average are replaced, for existing objects too. A replaced method calls the drop-in. It calls the
    original instead if the drop-in refuses the arguments or settings, or if the object or its class replaces a method
    that the original calls and the drop-in does not. Each class and reason causes one warning, and
    :func:`selfsup_kernels.compat.report` counts the calls.

    A function is replaced in every global name, of every imported module, that refers to it, and in names that later
    imports create. Other references (a local variable, a default argument, a dictionary entry) keep the original.

    ``undo`` restores everything. If a library is patched several times, the last undo restores it.

    Args:
        name: ``"lightly"``, ``"pytorch_metric_learning"`` or another library in ``selfsup_kernels.compat._table``.

    Returns:
        A handle with ``undo()``, which is also a context manager.

    Raises:
        ValueError: there are no drop-ins for a library of this name.
        RuntimeError: the library is not installed, cannot be imported, or lacks a name that a drop-in replaces; nothing
            has changed.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a library's name, got {type(name).__name__}")
    library = name.replace("-", "_")
    if library not in TABLE:
        raise ValueError(f"name: expected one of {', '.join(TABLE)}, as in an import, got {name!r}")
    with _lock:
        handles = _handles.setdefault(library, [])
        changes = handles[0].changes if handles else _changes(library)
        # Also for a library that is already patched: a module may have stored an original since.
        for change in changes:
            change.make()
        handle = Patch(library, changes)
        handles.append(handle)
    return handle


class Patch:
    """Handle that :func:`patch` returns."""

    def __init__(self, library, changes):
        self.library = library
        self.changes = changes

    def undo(self) -> None:
        """Restore the library, unless other patches of it are active. A second undo does nothing."""
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
    """Return the changes that patch the library, without making them."""
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
    """A method of a library's class and its replacement."""

    def __init__(self, name, library, cls, method, ours):
        self.name, self.cls, self.method = name, cls, method
        self.original = getattr(cls, method)
        self.inherited = method not in vars(cls)
        hooks = {hook: getattr(cls, hook) for hook in getattr(ours, "hooks", ())}
        # Methods that a user replaced in the library's class before this patch; undo must keep them.
        changed = [hook for hook, function in {method: self.original, **hooks}.items() if not is_own(library, function)]
        self.replacement = self._dispatch(getattr(ours, method), hooks, changed)

    def make(self):
        setattr(self.cls, self.method, self.replacement)

    def undo(self):
        if vars(self.cls).get(self.method) is not self.replacement:
            return  # other code has replaced it since
        if self.inherited:
            delattr(self.cls, self.method)
        else:
            setattr(self.cls, self.method, self.original)

    def _dispatch(self, ours, hooks, changed):
        cls, name, original, inherited = self.cls, self.method, self.original, self.inherited

        @functools.wraps(original)
        def method(module, *args, **kwargs):
            following = original
            if inherited and type(module) is not cls:  # a mixin may come before the class that defines the method
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
    """A library's function and its replacement."""

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
    """Return ``(None, result of ours)``, or ``(reason why ours refuses the call, None)``."""
    try:
        return None, ours(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, Unsupported):
            return error.args[-1], None
        # Drop this call's values and shapes, so that similar calls share one reason.
        return re.sub(r"\(\d+,[\d, ]*\)", "(...)", str(error).partition(", got ")[0]), None


def _swap(first, second) -> None:
    """Rebind every module's global name that refers to ``first`` to ``second``.

    Uses the modules' dictionaries: attribute access may trigger imports in lazy modules.
    """
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):
            continue
        names = vars(module)
        for name in [name for name, value in list(names.items()) if value is first]:
            names[name] = second
