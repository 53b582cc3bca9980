"""compat.patch on a library made up here: values that it gives and takes, and what it refuses."""

import importlib.machinery
import pickle
import subprocess
import sys
import types

import pytest

import selfsup_kernels as sk
from selfsup_kernels.compat import _patch, _table


@pytest.fixture
def library(monkeypatch):
    """A library of the name of a real one, with two modules, and the table's entries for it."""

    class Original:
        pass

    def original_function():
        return "original"

    package, losses, user = types.ModuleType("lightly"), types.ModuleType("lightly.loss"), types.ModuleType("user")
    package.__path__ = []
    package.__spec__ = importlib.machinery.ModuleSpec("lightly", None)  # find_spec asks for one
    package.loss, losses.NTXentLoss, losses.update = losses, Original, original_function
    user.Renamed, user.update, user.listed = Original, original_function, [Original]
    for module in (package, losses, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    entries = [
        _table.Swap("lightly.loss", "NTXentLoss", "NTXentLoss"),
        _table.Swap("lightly.loss", "update", "update_momentum"),
    ]
    monkeypatch.setitem(_table.TABLE, "lightly", entries)
    return types.SimpleNamespace(losses=losses, user=user, originals=[Original, original_function])


def test_patch_and_undo(library):
    before = dict(vars(library.losses)), dict(vars(library.user))
    handle = sk.compat.patch("lightly")
    assert library.user.Renamed is library.losses.NTXentLoss
    assert isinstance(library.user.Renamed(), sk.compat.lightly.NTXentLoss)
    assert library.user.Renamed is not sk.compat.lightly.NTXentLoss
    assert library.user.update is library.losses.update
    assert library.user.update.__wrapped__ is sk.compat.lightly.update_momentum
    assert library.user.listed == library.originals[:1]  # no global name
    handle.undo()
    assert (vars(library.losses), vars(library.user)) == before
    handle.undo()
    assert (vars(library.losses), vars(library.user)) == before


def test_nested(library):
    with sk.compat.patch("lightly") as outer:
        first = library.losses.NTXentLoss
        with sk.compat.patch("lightly"):
            assert library.losses.NTXentLoss is first
        assert library.losses.NTXentLoss is first
        other = sk.compat.patch("lightly")
        outer.undo()
        assert library.losses.NTXentLoss is first
        other.undo()
        assert library.losses.NTXentLoss is library.originals[0]


def test_a_second_patch_reaches_what_came_since(library):
    with sk.compat.patch("lightly"):
        library.user.late = library.originals[0]  # from a reference that no patch could see
        sk.compat.patch("lightly").undo()
        assert library.user.late is library.losses.NTXentLoss
    assert library.user.late is library.originals[0]


def test_names_taken_while_patched_are_given_back(library):
    with sk.compat.patch("lightly"):
        library.user.taken = library.losses.NTXentLoss
        library.user.ours = sk.compat.lightly.NTXentLoss
    assert library.user.taken is library.originals[0]
    assert library.user.ours is sk.compat.lightly.NTXentLoss


def test_what_was_made_while_patched_can_be_pickled(library):
    with sk.compat.patch("lightly"):
        made = library.losses.NTXentLoss(0.3)
    assert type(made).__name__ == "NTXentLoss"
    assert type(pickle.loads(pickle.dumps(made))) is type(made)


def test_refuses(library):
    with pytest.raises(ValueError, match=r"name: expected one of lightly, .*, got 'tensorflow'"):
        sk.compat.patch("tensorflow")
    with pytest.raises(TypeError, match="name: expected a library's name, got NoneType"):
        sk.compat.patch(None)
    del library.losses.update
    with pytest.raises(RuntimeError, match=r"lightly\.loss\.update cannot be patched"):
        sk.compat.patch("lightly")
    assert library.losses.NTXentLoss is library.originals[0]


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(_table.TABLE, "no_such_library_here", [])
    with pytest.raises(RuntimeError, match="no_such_library_here is not installed here"):
        sk.compat.patch("no_such_library_here")


def test_table():
    """Every entry names one of our drop-ins; within a library by an attribute of its own, which pickle needs."""
    assert _table.TABLE.keys() == _table.TESTED.keys()
    for library, swaps in _table.TABLE.items():
        assert len({swap.attribute for swap in swaps}) == len(swaps)
        for swap in swaps:
            assert swap.module.split(".")[0] == library
            stand_in = _patch._replacement(library, swap)
            assert stand_in.__name__ == getattr(getattr(sk.compat, library), swap.ours).__name__
            assert pickle.loads(pickle.dumps(stand_in)) is stand_in


def test_importing_the_drop_ins_imports_no_library_of_others():
    names = [name for name in sk.compat.__all__ if name != "patch"]
    others = [*names, "torchvision", "timm", "transformers"]
    code = f"""
import importlib, sys
import selfsup_kernels as sk
for name in {names}:
    importlib.import_module("selfsup_kernels.compat." + name)
sk.compat.patch
found = [m for m in sys.modules if m.split(".")[0] in {others}]
assert not found, found
assert set({names}) <= set(dir(sk.compat))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sk.compat.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="lightly__Nothing"):
        _patch.lightly__Nothing  # noqa: B018
