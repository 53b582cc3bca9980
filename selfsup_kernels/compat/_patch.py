"""Changing an installed library in place, so that code which imports it needs no change, and changing it back."""

import functools
import importlib
import importlib.util
import sys
import threading
import types

from selfsup_kernels.compat._table import TABLE, TESTED

_lock = threading.RLock()
_handles: dict[str, list["Patch"]] = {}
"""By library, the patches that hold it: it is changed back when the last one is undone."""


def patch(name: str) -> "Patch":
    """Put our drop-ins in the place of a library's own classes and functions, until undone.

    ::

        selfsup_kernels.compat.patch("lightly")            # from here on; .undo() of what it returns ends it
        with selfsup_kernels.compat.patch("lightly"):      # or within a block
            ...

    The library is imported, and every global name of every imported module that refers to one of its originals (the
    library's own modules, and a script's ``from lightly.loss import NTXentLoss`` that came before) refers to the
    drop-in afterwards; so do the names that later imports make. ``undo`` turns all of them back. A library may be
    patched several times over: the last undo counts.

    What is not reached: objects that exist already and subclasses that are defined already keep the original class,
    and so do references that are not global names of a module (a local variable, a default argument, an entry of a
    dictionary). ``isinstance`` against a patched name knows the objects that were made while it was patched. Those can
    be pickled, and keep working after the undo.

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
        raise ValueError(f"name: expected one of {', '.join(TABLE)}, got {name!r}")
    originals = _originals(library)
    with _lock:
        # Again for a library that is patched already: a module may have got hold of an original since.
        _swap([(original, _replacement(library, swap)) for swap, original in originals.items()])
        handle = Patch(library, originals)
        _handles.setdefault(library, []).append(handle)
    return handle


class Patch:
    """What :func:`patch` returns."""

    def __init__(self, library, originals):
        self.library = library
        self._originals = originals

    def undo(self) -> None:
        """Change the library back, unless it is patched by others still. A second undo does nothing."""
        with _lock:
            handles = _handles.get(self.library, [])
            if self not in handles:
                return
            handles.remove(self)
            if not handles:
                _swap([(_replacement(self.library, swap), original) for swap, original in self._originals.items()])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()

    def __repr__(self):
        names = ", ".join(f"{swap.module}.{swap.attribute}" for swap in self._originals)
        return f"<{'active' if self in _handles.get(self.library, []) else 'undone'} patch of {names}>"


def _originals(library):
    """The library's own objects by entry of the table, whether it is patched or not."""
    if importlib.util.find_spec(library) is None:
        raise RuntimeError(f"name: expected an installed library, but {library} is not installed here")
    with _lock:
        if _handles.get(library):
            return _handles[library][0]._originals
    found = {}
    for swap in TABLE[library]:
        try:
            module = importlib.import_module(swap.module)
            if hasattr(module, swap.attribute) or not swap.optional:
                found[swap] = getattr(module, swap.attribute)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"name: {swap.module}.{swap.attribute} cannot be patched in the installed {library}"
                f" ({type(error).__name__}: {error}); the drop-ins follow version {TESTED[library]}"
            ) from error
    return found


@functools.cache
def _replacement(library, swap):
    """What stands in for an original: our class or function under an identity of its own.

    So an undo knows which names were given by a patch, and leaves those alone that users imported from us.
    """
    ours = getattr(importlib.import_module(f"selfsup_kernels.compat.{library}"), swap.ours)
    qualname = f"{library}__{swap.attribute}"  # by which pickle finds it: __getattr__
    if isinstance(ours, type):
        where = {"__module__": __name__, "__qualname__": qualname, "__doc__": ours.__doc__}
        return type(ours)(ours.__name__, (ours,), where)

    @functools.wraps(ours)
    def function(*args, **kwargs):
        return ours(*args, **kwargs)

    function.__module__, function.__qualname__ = __name__, qualname
    return function


def __getattr__(name):
    library, _, attribute = name.partition("__")
    for swap in TABLE.get(library, []):
        if swap.attribute == attribute:
            return _replacement(library, swap)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _swap(pairs) -> None:
    """Make every module's global name that refers to the first of a pair refer to the second.

    Through the dictionaries: asking a module for an attribute may import things, and lazy modules have odd ones.
    """
    new = {id(first): second for first, second in pairs}
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):
            continue
        names = vars(module)
        for name in [name for name, value in list(names.items()) if id(value) in new]:
            names[name] = new[id(names[name])]
