"""Test compat.patch on installed libraries, and a whole training script with and without it."""

import ast
import contextlib
import copy
import importlib.machinery
import importlib.util
import inspect
import io
import os
import pickle
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import lightly.loss
import lightly.loss.ntx_ent_loss
import lightly.models.utils
import open_clip.loss
import pytest
import timm.utils
import torch
import torch.nn.functional as F
from interop.helpers import assert_near, views
from lightly.loss import NTXentLoss as imported_before
from sentence_transformers import sentence_transformer as sentence_transformers

import selfsup_kernels as sk
from selfsup_kernels.compat import _calls, _table

ROOT = Path(__file__).resolve().parents[2]


def global_names():
    """Return the classes and functions by (module, global name) of all imported modules."""
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
    """Provide the losses of solo-learn 1.0.2 under their names, without its other imports, which are not installed."""
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
def test_every_entry_is_changed_and_restored(library, solo):
    originals = {s: getattr(importlib.import_module(s.module), s.attribute, None) for s in _table.TABLE[library]}
    assert [swap.ours for swap, original in originals.items() if original is None] == (
        ["mocov3_loss_func"] if library == "solo" else []
    )
    originals = {swap: original for swap, original in originals.items() if original is not None}
    functions = [original for original in originals.values() if not isinstance(original, type)]
    methods = {swap: dict(vars(original)) for swap, original in originals.items() if isinstance(original, type)}
    sk.compat.patch(library).undo()  # imports everything that a patch imports
    before = global_names()
    with sk.compat.patch(library):
        for swap, original in originals.items():
            now = getattr(sys.modules[swap.module], swap.attribute)
            assert (now is original) == isinstance(original, type)
            changed = {name for name, value in vars(now).items() if methods.get(swap, vars(now)).get(name) is not value}
            assert changed == set(swap.methods)
        changed = {where for where, value in global_names().items() if before.get(where) is not value}
        held = {where for where, value in before.items() if any(value is function for function in functions)}
        # Exactly the global names that held an original function have changed, including this module's.
        assert changed == held
    after = global_names()
    assert after.keys() == before.keys()
    assert all(after[where] is before[where] for where in before)
    assert all(dict(vars(originals[swap])) == attributes for swap, attributes in methods.items())


def calls_on_self(cls, method, seen):
    """Add to ``seen`` the methods of the class that a method calls on ``self``, recursively, and return it."""
    source = ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, method))))
    for node in ast.walk(source):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        if node.attr not in seen and inspect.isfunction(getattr(cls, node.attr, None)):
            seen.add(node.attr)
            calls_on_self(cls, node.attr, seen)
    return seen


@pytest.mark.parametrize("library", [name for name in _table.TABLE if name != "solo"])
def test_the_hooks_are_what_the_originals_call_on_self(library):
    for swap in _table.TABLE[library]:
        if swap.methods:
            original = getattr(importlib.import_module(swap.module), swap.attribute)
            ours = getattr(importlib.import_module(f"selfsup_kernels.compat.{library}"), swap.ours)
            # pytorch-metric-learning calls one of these as ``self.loss_method``.
            through_an_attribute = {name for name in ("mat_based_loss", "pair_based_loss") if hasattr(original, name)}
            found = set(through_an_attribute)
            for method in (*swap.methods, *through_an_attribute):
                calls_on_self(original, method, found)
            found = {name for name in found if not hasattr(torch.nn.Module, name)}
            assert found == set(getattr(ours, "hooks", ()))


@pytest.fixture
def counted(monkeypatch):
    """Empty the report, and return a function that gives (calls of ours, calls of the original) by short name."""
    monkeypatch.setattr(_calls, "_calls", {})
    return lambda: {name.rpartition(".")[2]: calls[:2] for name, calls in sk.compat.report().items()}


def test_objects_are_the_librarys_own(counted):
    """Objects made before, during and after a patch use ours while patched, and can be pickled at any time."""
    before = lightly.loss.NTXentLoss(0.3, memory_bank_size=(8, 5))
    with sk.compat.patch("lightly"):
        assert lightly.loss.NTXentLoss is imported_before is lightly.loss.ntx_ent_loss.NTXentLoss
        made = lightly.loss.NTXentLoss(0.3, memory_bank_size=(8, 5))
        made.memory_bank.bank.copy_(before.memory_bank.bank)
        before(*views(4, 5))
        pickled = pickle.dumps(made)
    assert counted() == {"NTXentLoss": (1, 0)}
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    for criterion in (made, pickle.loads(pickled), torch.load(stream, weights_only=False)):
        assert type(criterion) is imported_before
        assert_near("value", criterion(*views(4, 5)), before(*views(4, 5)))
    assert counted() == {"NTXentLoss": (1, 0)}


def test_a_memory_bank_under_a_patch_that_comes_and_goes():
    """Steps with and without the patch share one bank, and all losses equal the original's."""
    torch.manual_seed(0)
    mixed = lightly.loss.NTXentLoss(0.3, memory_bank_size=(8, 5))
    plain = copy.deepcopy(mixed)
    for step in range(4):
        inputs = views(3, 5, seed=step)
        inputs[0].requires_grad_()
        with sk.compat.patch("lightly") if step % 2 else contextlib.nullcontext():
            got = mixed(*inputs)
        assert_near("value", got.detach(), plain(*inputs).detach())
        assert_near("bank", mixed.memory_bank.bank, plain.memory_bank.bank)
        assert torch.equal(mixed.memory_bank.bank_ptr, plain.memory_bank.bank_ptr)


def test_update_momentum_in_place():
    original = lightly.models.utils.update_momentum
    with sk.compat.patch("lightly"):
        from lightly.models.utils import update_momentum

        assert update_momentum.__wrapped__ is original
    assert lightly.models.utils.update_momentum is original


def test_lightly_beyond_what_the_kernels_serve(counted):
    """Negative temperatures, one sample and other cross entropies give the original's values and errors."""
    x, y = views(4, 5)

    def values():
        smooth = lightly.loss.NTXentLoss()
        smooth.cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        losses = [lightly.loss.NTXentLoss(-0.5), lightly.loss.DCLLoss(-0.5), smooth]
        found = [loss(x, y) for loss in losses] + [lightly.loss.DCLLoss()(x[:1], y[:1])]
        for bad in (x[0], x[:3]):
            with pytest.raises((ValueError, IndexError)) as error:
                lightly.loss.NTXentLoss()(bad, y)
            found.append(str(error.value))
        return found

    want = values()
    with sk.compat.patch("lightly"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = values()
    assert got[4:] == want[4:]
    assert all(torch.equal(g, w) for g, w in zip(got[:4], want[:4], strict=True))
    assert counted() == {"NTXentLoss": (0, 4), "DCLLoss": (0, 2)}


def test_subclasses_in_the_libraries(counted):
    """DCLWLoss, CoCaLoss and MultipleNegativesSymmetricRankingLoss use ours, as subclasses of patched classes."""
    x, y = (F.normalize(v, dim=1) for v in views(6, 5))
    logits, labels = torch.randn(6, 3, 7), torch.randint(7, (6, 3))

    def values():
        embeddings = torch.nn.Identity()
        symmetric = sentence_transformers.losses.MultipleNegativesSymmetricRankingLoss(embeddings)
        return [
            lightly.loss.DCLWLoss()(x, y),
            open_clip.loss.CoCaLoss(2.0, 1.0)(x, y, logits, labels, 10.0)[0],
            symmetric.compute_loss_from_embeddings([x, y], None),
        ]

    want = values()
    with contextlib.ExitStack() as patches:
        for library in ("lightly", "open_clip", "sentence_transformers"):
            patches.enter_context(sk.compat.patch(library))
        for got, wanted in zip(values(), want, strict=True):
            assert_near("value", got, wanted)
    assert counted() == dict.fromkeys(["DCLWLoss", "CoCaLoss", "MultipleNegativesSymmetricRankingLoss"], (1, 0))


def test_a_distilling_loss_calls_clips_own_hooks(counted):
    student, teacher = ([F.normalize(v, dim=1) for v in views(6, 5, seed=seed)] for seed in (0, 1))
    want = open_clip.loss.DistillClipLoss()(*student, 10.0, *teacher, 20.0)

    class Margin(open_clip.loss.ClipLoss):
        def get_logits(self, *args, **kwargs):
            per_image, per_text = super().get_logits(*args, **kwargs)
            return per_image + torch.eye(len(per_image)), per_text

    margin = Margin()(*student, 10.0)
    with sk.compat.patch("open_clip"):
        assert_near(
            "value", torch.stack(open_clip.loss.DistillClipLoss()(*student, 10.0, *teacher, 20.0)), torch.stack(want)
        )
        with pytest.warns(UserWarning, match="its own get_logits"):
            assert torch.equal(Margin()(*student, 10.0), margin)
    assert counted() == {"Margin": (0, 1)}


def test_timm_beyond_what_the_kernels_serve(counted):
    """Tied weights, and models whose names differ, give timm's values."""

    class Tied(torch.nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                setattr(self, name, torch.nn.Linear(3, 3, bias=False))
            if len(names) > 1:
                getattr(self, names[1]).weight = getattr(self, names[0]).weight

    def averages():
        found = []
        for names, others in ((("a", "b"), ("a", "b")), (("a",), ("c",)), (("a",), ("a",))):
            torch.manual_seed(0)
            average = timm.utils.ModelEmaV3(Tied(names), decay=0.9)
            average.update(Tied(others))
            found.append(average.module.a.weight.detach().clone())
        return found

    want = averages()
    with sk.compat.patch("timm"), pytest.warns(UserWarning, match="tied weights"):
        got = averages()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert counted() == {"ModelEmaV3": (1, 2)}


def test_a_library_of_another_version(monkeypatch):
    before = lightly.loss.NTXentLoss
    missing = _table.Swap("lightly.loss", "NoSuchLoss", "NTXentLoss")
    monkeypatch.setitem(_table.TABLE, "lightly", [*_table.TABLE["lightly"], missing])
    with pytest.raises(RuntimeError, match=r"lightly.loss.NoSuchLoss cannot be patched.*version 1"):
        sk.compat.patch("lightly")
    assert lightly.loss.NTXentLoss is before


@pytest.mark.parametrize(
    ("dtype", "steps", "bound"),
    # In float32 training doubles a difference of one rounding with every step, so few steps stay within the bound.
    [("float32", 4, 2e-5), ("float64", 12, 1e-8)],
)
def test_lightly_script(tmp_path, dtype, steps, bound):
    """examples/lightly_simclr.py gives the same losses, step by step, with and without the line that patches."""
    source = (ROOT / "examples" / "lightly_simclr.py").read_text()
    lines = source.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("import selfsup_kernels; ")]
    assert len(kept) == len(lines) - 1
    losses = {}
    report = "\nprint(selfsup_kernels.compat.report())\n"
    for name, text in {"with": source + report, "without": "".join(kept)}.items():
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        command = [sys.executable, str(script), "--steps", str(steps), "--dtype", dtype]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        rest = done.stdout.splitlines()
        if name == "with":
            assert rest.pop() == f"lightly.loss.ntx_ent_loss.NTXentLoss: {steps} calls ours, 0 the original's"
        losses[name] = torch.tensor([float(line.split()[-1]) for line in rest], dtype=torch.float64)
        assert len(losses[name]) == steps
    assert losses["with"][-1] < losses["with"][0] - 0.5
    torch.testing.assert_close(losses["with"], losses["without"], rtol=bound, atol=0)
