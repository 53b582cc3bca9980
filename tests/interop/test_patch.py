"""compat.patch on installed libraries, and a whole training script with and without it."""

import importlib.machinery
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import lightly.loss
import lightly.loss.ntx_ent_loss
import lightly.models.utils
import pytest
import pytorch_metric_learning.losses
import torch
from interop.helpers import assert_near, views
from lightly.loss import NTXentLoss as imported_before

import selfsup_kernels as sk
from selfsup_kernels.compat import _table
from selfsup_kernels.compat.lightly import NTXentLoss as OursImportedBefore

ORIGINALS = {"NTXentLoss": imported_before}  # in a dictionary, where no patch finds it
ROOT = Path(__file__).resolve().parents[2]


def global_names():
    """Every global name of every imported module that refers to what may be patched or what stands in for it."""
    kinds = (type, types.FunctionType)
    return {
        (module_name, name): value
        for module_name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        for name, value in list(vars(module).items())
        if isinstance(value, kinds)
    }


@pytest.fixture
def solo(monkeypatch):
    """The losses of solo-learn 1.0.2 under their names; the package itself imports what is not installed here."""
    folder = Path(importlib.util.find_spec("solo").origin).parent
    for name, path in (("solo", folder), ("solo.losses", folder / "losses")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("simclr", "byol"):
        monkeypatch.delitem(sys.modules, f"solo.losses.{name}", raising=False)
        function = getattr(importlib.import_module(f"solo.losses.{name}"), f"{name}_loss_func")
        setattr(sys.modules["solo.losses"], function.__name__, function)
    yield
    for name in ("simclr", "byol"):
        sys.modules.pop(f"solo.losses.{name}")


@pytest.mark.parametrize("library", list(_table.TABLE))
def test_every_entry_is_swapped_and_restored(library, solo):
    originals = {s: getattr(importlib.import_module(s.module), s.attribute, None) for s in _table.TABLE[library]}
    assert [swap.ours for swap, original in originals.items() if original is None] == (
        ["mocov3_loss_func"] if library == "solo" else []
    )
    originals = {swap: original for swap, original in originals.items() if original is not None}
    sk.compat.patch(library).undo()  # what it imports is imported from here on
    before = global_names()
    with sk.compat.patch(library):
        ours = importlib.import_module(f"selfsup_kernels.compat.{library}")
        for swap, original in originals.items():
            now = getattr(sys.modules[swap.module], swap.attribute)
            assert now is not original
            assert now.__name__ == getattr(ours, swap.ours).__name__
            if isinstance(now, type):
                assert issubclass(now, getattr(ours, swap.ours))
            assert pickle.loads(pickle.dumps(now)) is now
        changed = {where for where, value in global_names().items() if before.get(where) is not value}
        held = {where for where, value in before.items() if any(value is o for o in originals.values())}
        # Wherever an original was a global name, this module's own among them, and nowhere else.
        assert changed == held
    after = global_names()
    assert after.keys() == before.keys()
    assert all(after[where] is before[where] for where in before)


def test_names_imported_before_and_while():
    original = lightly.loss.ntx_ent_loss.NTXentLoss
    with sk.compat.patch("lightly"):
        assert imported_before is lightly.loss.NTXentLoss is lightly.loss.ntx_ent_loss.NTXentLoss
        assert imported_before is not original
        assert isinstance(imported_before(), OursImportedBefore)
        assert isinstance(imported_before(), lightly.loss.NTXentLoss)
        assert isinstance(lightly.loss.DCLWLoss(), lightly.loss.DCLLoss.__mro__[1])
        imported_while = types.ModuleType("imported_while")
        sys.modules["imported_while"] = imported_while
        exec("from lightly.loss import NTXentLoss\nfrom selfsup_kernels.compat import lightly", vars(imported_while))
        assert imported_while.NTXentLoss is lightly.loss.NTXentLoss
    try:
        assert imported_before is imported_while.NTXentLoss is lightly.loss.NTXentLoss is original
        assert imported_while.lightly.NTXentLoss is OursImportedBefore  # asked for by our name: left alone
    finally:
        del sys.modules["imported_while"]


def test_nested_and_repeated():
    original = lightly.loss.NTXentLoss
    outer = sk.compat.patch("lightly")
    inner = sk.compat.patch("lightly")
    swapped = lightly.loss.NTXentLoss
    assert "active" in repr(outer)
    inner.undo()
    inner.undo()
    assert lightly.loss.NTXentLoss is swapped
    with sk.compat.patch("lightly"), sk.compat.patch("pytorch-metric-learning"):
        assert lightly.loss.NTXentLoss is swapped
        assert pytorch_metric_learning.losses.SupConLoss.__module__.startswith("selfsup_kernels")
    assert lightly.loss.NTXentLoss is swapped
    outer.undo()
    assert lightly.loss.NTXentLoss is original
    assert "undone" in repr(outer)
    assert pytorch_metric_learning.losses.SupConLoss.__module__.startswith("pytorch_metric_learning")


def test_an_exception_undoes():
    original = lightly.loss.NTXentLoss
    with pytest.raises(KeyError), sk.compat.patch("lightly"):
        raise KeyError
    assert lightly.loss.NTXentLoss is original


def test_objects_outlive_the_patch():
    """What was made while patched is pickled and works afterwards; what was made before keeps its class."""
    made_before = lightly.loss.NTXentLoss(0.3, memory_bank_size=(8, 5))
    with sk.compat.patch("lightly"):
        made = lightly.loss.NTXentLoss(0.3, memory_bank_size=(8, 5))
        made.memory_bank.bank.copy_(made_before.memory_bank.bank)
        assert type(made_before) is ORIGINALS["NTXentLoss"]
    again = pickle.loads(pickle.dumps(made))
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=False)
    for criterion in (made, again, saved):
        assert type(criterion) is type(made)
        assert_near("value", criterion(*views(4, 5)), made_before(*views(4, 5)))


def test_pickles_of_the_original_load_into_ours_while_patched():
    made = lightly.loss.NTXentLoss(0.3, memory_bank_size=(8, 5))
    pickled = pickle.dumps(made)
    with sk.compat.patch("lightly"):
        loaded = pickle.loads(pickled)
        assert isinstance(loaded, OursImportedBefore)
    for step in range(3):
        inputs = views(3, 5, seed=step)
        inputs[0].requires_grad_()
        assert_near("value", loaded(*inputs).detach(), made(*inputs).detach())
        assert_near("bank", loaded.memory_bank.bank, made.memory_bank.bank)


def test_update_momentum_in_place():
    with sk.compat.patch("lightly"):
        from lightly.models.utils import update_momentum

        assert update_momentum.__wrapped__ is sk.compat.lightly.update_momentum


def test_a_library_of_another_version(monkeypatch):
    before = lightly.loss.NTXentLoss
    missing = _table.Swap("lightly.loss", "NoSuchLoss", "NTXentLoss")
    monkeypatch.setitem(_table.TABLE, "lightly", [*_table.TABLE["lightly"], missing])
    with pytest.raises(RuntimeError, match=r"lightly.loss.NoSuchLoss cannot be patched.*version 1"):
        sk.compat.patch("lightly")
    assert lightly.loss.NTXentLoss is before


@pytest.mark.parametrize(
    ("dtype", "steps", "bound"),
    # In float32, training itself doubles a difference of one rounding with every step: a few, to the drop-ins' bound.
    [("float32", 4, 2e-5), ("float64", 12, 1e-8)],
)
def test_lightly_script(tmp_path, dtype, steps, bound):
    """examples/lightly_simclr.py, and the same file without its one line: the same losses, step by step."""
    source = (ROOT / "examples" / "lightly_simclr.py").read_text()
    lines = source.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("import selfsup_kernels; ")]
    assert len(kept) == len(lines) - 1
    losses = {}
    for name, text in {"with": source, "without": "".join(kept)}.items():
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        command = [sys.executable, str(script), "--steps", str(steps), "--dtype", dtype, "--print-class"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        first, *rest = done.stdout.splitlines()
        assert ("selfsup_kernels" in first) == (name == "with")
        losses[name] = torch.tensor([float(line.split()[-1]) for line in rest], dtype=torch.float64)
        assert len(losses[name]) == steps
    assert losses["with"][-1] < losses["with"][0] - 0.5
    torch.testing.assert_close(losses["with"], losses["without"], rtol=bound, atol=0)
