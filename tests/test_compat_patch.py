"""compat.patch on a fake library: its changes and their undo, calls that go to the original, the report."""

import copy
import importlib.machinery
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.compat import _calls, _table


class DCLLoss(nn.Module):
    """lightly's attributes, and decoupled contrastive learning (arXiv:2110.06848, eq. 6) without weights."""

    def __init__(self, temperature=0.1, weight_fn=None, gather_distributed=False):
        super().__init__()
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed

    def forward(self, out0, out1):
        z0, z1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        return 0.5 * (self._loss(z0, z1) + self._loss(z1, z0))

    def _loss(self, z0, z1):
        own = torch.eye(len(z0), dtype=torch.bool)
        positive = (z0 * z1).sum(1) / self.temperature
        others = torch.cat([(z0 @ z.T / self.temperature).masked_fill(own, -torch.inf) for z in (z0, z1)], 1)
        return (others.logsumexp(1) - positive).mean()


class Subclass(DCLLoss):
    """A library class that inherits from the patched one."""


def update_momentum(model, model_ema, m):
    for ema, own in zip(model_ema.parameters(), model.parameters(), strict=True):
        ema.data = ema.data * m + own.data * (1 - m)


ORIGINALS = {"DCLLoss": DCLLoss, "update_momentum": update_momentum}  # entries of a dictionary: no patch finds them
FORWARD = DCLLoss.forward
LOSS = "lightly.loss.DCLLoss"


@pytest.fixture
def library(monkeypatch):
    """A fake library with a real one's name, two modules, and entries in the table."""
    package, losses, user = types.ModuleType("lightly"), types.ModuleType("lightly.loss"), types.ModuleType("user")
    package.__path__ = []
    package.__spec__ = importlib.machinery.ModuleSpec("lightly", None)  # find_spec asks for one
    package.loss, losses.DCLLoss, losses.update_momentum = losses, DCLLoss, update_momentum
    user.Renamed, user.update, user.listed = DCLLoss, update_momentum, [update_momentum]
    for module in (package, losses, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for value in (DCLLoss, DCLLoss.forward, DCLLoss._loss, update_momentum):
        monkeypatch.setattr(value, "__module__", "lightly.loss")
    entries = [
        _table.Swap("lightly.loss", "DCLLoss", "DCLLoss", ("forward",)),
        _table.Swap("lightly.loss", "update_momentum", "update_momentum"),
    ]
    monkeypatch.setitem(_table.TABLE, "lightly", entries)
    monkeypatch.setattr(_calls, "_calls", {})
    yield types.SimpleNamespace(losses=losses, user=user)
    assert DCLLoss.forward is FORWARD


def views(dtype=torch.float64, batch=6):
    return [randn(batch, 5, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1)]


def calls(name=LOSS):
    found = sk.compat.report().get(name, _calls.Calls(0, 0, {}))
    return found.ours, found.original


def original(loss, inputs):
    return FORWARD(loss, *inputs)


def test_patch_and_undo(library):
    before, made = dict(vars(library.losses)), DCLLoss(0.2)
    handle = sk.compat.patch("lightly")
    assert "active patch of lightly.loss.DCLLoss.forward, lightly.loss.update_momentum" in repr(handle)
    assert library.losses.DCLLoss is library.user.Renamed is DCLLoss  # the class is not replaced
    assert library.user.update is library.losses.update_momentum is not ORIGINALS["update_momentum"]
    assert library.user.listed == [ORIGINALS["update_momentum"]]  # not a global name
    torch.testing.assert_close(made(*views()), original(made, views()))  # made before: ours too
    assert calls() == (1, 0)
    handle.undo()
    assert "undone" in repr(handle)
    assert dict(vars(library.losses)) == before
    made(*views())
    assert calls() == (1, 0)
    handle.undo()


def test_nested(library):
    loss = DCLLoss()
    with sk.compat.patch("lightly") as outer:
        with sk.compat.patch("lightly"):
            loss(*views())
        loss(*views())
        other = sk.compat.patch("lightly")
        outer.undo()
        loss(*views())
        assert calls() == (3, 0)
        other.undo()
        loss(*views())
        assert calls() == (3, 0)


def test_an_exception_undoes(library):
    with pytest.raises(KeyError), sk.compat.patch("lightly"):
        raise KeyError


def test_functions_by_global_names(library):
    with sk.compat.patch("lightly"):
        library.user.late = ORIGINALS["update_momentum"]  # from a reference that no patch could see
        sk.compat.patch("lightly").undo()
        assert library.user.late is library.losses.update_momentum
        library.user.taken = library.losses.update_momentum
        library.user.ours = sk.compat.lightly.update_momentum
    assert library.user.late is library.user.taken is ORIGINALS["update_momentum"]
    assert library.user.ours is sk.compat.lightly.update_momentum


def test_a_function_goes_to_the_original_where_ours_refuses(library):
    with sk.compat.patch("lightly"):
        model, average = nn.Linear(2, 2), nn.Linear(2, 2)
        want = [1.5 * a + -0.5 * p for a, p in zip(average.parameters(), model.parameters(), strict=True)]
        with pytest.warns(
            UserWarning, match=r"lightly.loss.update_momentum: .* momentum: expected a number in \[0, 1\];"
        ):
            library.losses.update_momentum(model, average, 1.5)
        torch.testing.assert_close(list(average.parameters()), want)
        library.losses.update_momentum(model, average, 0.5)
    assert calls("lightly.loss.update_momentum") == (1, 1)


def test_an_object_is_the_librarys_own(library):
    """Pickles, copies and isinstance do not depend on the patch."""
    with sk.compat.patch("lightly"):
        made = DCLLoss(0.3)
        assert type(made) is DCLLoss
        copied = copy.deepcopy(made)
        assert copied.__dict__.keys() == made.__dict__.keys()
        torch.testing.assert_close(copied(*views()), original(made, views()))
        loaded = pickle.loads(pickle.dumps(made))
        torch.testing.assert_close(loaded(*views()), original(made, views()))
    torch.testing.assert_close(made(*views()), original(made, views()))


def test_gradients(library):
    inputs = views()
    loss = DCLLoss(0.2)
    with sk.compat.patch("lightly"):
        got = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*inputs), inputs))


def test_calls_that_ours_refuses_go_to_the_original(library):
    """A refused setting, refused arguments, and arguments that both refuse: the original's error is raised."""
    with sk.compat.patch("lightly"):
        negative = DCLLoss(-0.5)
        with pytest.warns(UserWarning, match=f"{LOSS}: the library's own code computes this.*temperature"):
            got = negative(*views())
        torch.testing.assert_close(got, original(negative, views()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning per class and reason
            negative(*views())
        with pytest.warns(UserWarning, match="views: expected at least 2 samples"):
            assert DCLLoss()(*views(batch=1)) == -torch.inf
        with pytest.warns(UserWarning, match="out1"), pytest.raises(AttributeError):
            DCLLoss()(views()[0], None)
        DCLLoss()(*views())
    report = sk.compat.report()
    assert report[LOSS][:2] == (1, 4)
    assert list(report[LOSS].reasons.values()) == [2, 1, 1]
    assert f"{LOSS}: 1 calls ours, 4 the original's" in str(report)
    assert "    2: a temperature below zero" in str(report)


def test_out_of_memory_errors_do_not_go_to_the_original(library, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(sk.compat.lightly.DCLLoss, "forward", no_memory)
    with sk.compat.patch("lightly"), pytest.raises(torch.OutOfMemoryError):
        DCLLoss()(*views())


def test_subclasses(library):
    """Subclasses of the library and of users, defined before or during the patch, use ours; the report names each."""

    class Before(DCLLoss):
        def __init__(self, scale):
            super().__init__(0.2)
            self.scale = scale

        def forward(self, out0, out1):
            return self.scale * super().forward(out0, out1)

    with sk.compat.patch("lightly"):

        class While(Before):
            pass

        for loss in (Before(3.0), While(3.0)):
            torch.testing.assert_close(loss(*views()), 3 * original(loss, views()))
            assert isinstance(loss, library.losses.DCLLoss)
        Subclass()(*views())
    ours = {name.rpartition(".")[2]: found[:2] for name, found in sk.compat.report().items()}
    assert ours == {"Before": (1, 0), "While": (1, 0), "Subclass": (1, 0)}


class Doubled(DCLLoss):
    def _loss(self, z0, z1):
        return 2 * super()._loss(z0, z1)


class Mixin:
    def _loss(self, z0, z1):
        return 2 * super()._loss(z0, z1)


class Mixed(Mixin, DCLLoss):
    pass


@pytest.mark.parametrize("where", ["subclass", "mixin", "object", "class"])
def test_an_override_is_honoured(library, where, monkeypatch):
    """If a method is replaced that the original calls and ours does not, the original computes."""
    with sk.compat.patch("lightly"):
        loss = {"subclass": Doubled, "mixin": Mixed}.get(where, DCLLoss)(0.2)
        plain = DCLLoss._loss
        if where == "object":
            loss._loss = lambda z0, z1: 2 * plain(loss, z0, z1)
        if where == "class":
            monkeypatch.setattr(DCLLoss, "_loss", lambda self, z0, z1: 2 * plain(self, z0, z1))
        with pytest.warns(UserWarning, match="its own _loss"):
            got = loss(*views())
        monkeypatch.undo()
        torch.testing.assert_close(got, 2 * DCLLoss(0.2)(*views()))


def test_a_class_that_was_changed_before_stays_changed(library, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(DCLLoss, "forward", lambda self, out0, out1: 7)
        with sk.compat.patch("lightly"), pytest.warns(UserWarning, match="its own forward"):
            assert DCLLoss()(*views()) == 7


def test_undo_keeps_later_replacements_by_other_code(library, monkeypatch):
    with monkeypatch.context() as changed:
        handle = sk.compat.patch("lightly")
        inside = DCLLoss.forward
        changed.setattr(DCLLoss, "forward", lambda self, out0, out1: inside(self, out0, out1) + 1)
        handle.undo()
        torch.testing.assert_close(DCLLoss()(*views()), original(DCLLoss(), views()) + 1)
    DCLLoss.forward = FORWARD


def test_inherited_methods(library, monkeypatch):
    """Undo removes a method that the class only inherited; a mixin's method in between is called."""

    class Base(DCLLoss):
        pass

    class Between(DCLLoss):
        def forward(self, out0, out1):
            return 2 * super().forward(out0, out1)

    class Both(Base, Between):
        pass

    monkeypatch.setattr(library.losses, "DCLLoss", Base)
    with sk.compat.patch("lightly"):
        Base()(*views())
        with pytest.warns(UserWarning, match="its own forward"):
            torch.testing.assert_close(Both()(*views()), 2 * original(Both(), views()))
    assert "forward" not in vars(Base)
    assert [found[:2] for found in sk.compat.report().values()] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("temperature", [0.2, -0.2])
def test_compiled_without_a_break(library, temperature):
    loss = DCLLoss(temperature)
    with sk.compat.patch("lightly"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(*views()), original(loss, views()))
    assert calls() == ((1, 0) if temperature > 0 else (0, 1))  # once a graph


def test_refuses(library):
    with pytest.raises(ValueError, match=r"name: expected one of lightly, .*, got 'tensorflow'"):
        sk.compat.patch("tensorflow")
    with pytest.raises(TypeError, match="name: expected a library's name, got NoneType"):
        sk.compat.patch(None)
    del library.losses.update_momentum
    with pytest.raises(RuntimeError, match=r"lightly\.loss\.update_momentum cannot be patched"):
        sk.compat.patch("lightly")


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(_table.TABLE, "no_such_library_here", [])
    with pytest.raises(RuntimeError, match="no_such_library_here is not installed here"):
        sk.compat.patch("no_such_library_here")


def test_a_report_does_not_grow_with_shapes(library):
    with sk.compat.patch("lightly"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in range(2, 50):
            with pytest.raises((RuntimeError, IndexError)):
                DCLLoss()(randn(batch, 3), randn(batch + 1, 4))
    assert ["out1: expected the shape of out0, (...)" in str(warning.message) for warning in caught] == [True]
    assert list(sk.compat.report()[LOSS].reasons.values()) == [48]


def test_a_report_of_many_reasons(library):
    for i in range(100):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _calls.record("some.Loss", f"option={i}")
        assert len(caught) == (i <= 16)
    calls = sk.compat.report()["some.Loss"]
    assert calls.original == sum(calls.reasons.values()) == 100
    assert calls.reasons["further reasons"] == 84


def test_an_empty_report(library):
    assert sk.compat.report() == {}
    assert str(sk.compat.report()) == "no calls of a patched class or function"


def test_table():
    """Every entry names one of our drop-ins and existing methods of it."""
    assert _table.TABLE.keys() == _table.TESTED.keys()
    for library, swaps in _table.TABLE.items():
        for swap in swaps:
            assert swap.module.split(".")[0] == library
            ours = getattr(getattr(sk.compat, library), swap.ours)
            assert isinstance(ours, type) == bool(swap.methods)
            assert all(callable(getattr(ours, method)) for method in swap.methods)


def test_importing_the_drop_ins_imports_none_of_the_originals():
    names = [name for name in sk.compat.__all__ if name not in ("patch", "report")]
    others = [*names, "torchvision", "timm", "transformers"]
    code = f"""
import importlib, sys
import selfsup_kernels as sk
for name in {names}:
    importlib.import_module("selfsup_kernels.compat." + name)
sk.compat.patch, sk.compat.report
found = [m for m in sys.modules if m.split(".")[0] in {others}]
assert not found, found
assert set({names}) <= set(dir(sk.compat))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sk.compat.nothing  # noqa: B018
