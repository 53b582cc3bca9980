"""Parts of the originals that somebody has changed: distances and reducers, memory banks, similarities, temperatures.

Under a patch the original computes with them; imported by name, the drop-in refuses them.
"""

import functools

import lightly.loss
import pytest
import torch
from interop.helpers import assert_near, rows, value_and_grads, views
from lightly.models.modules.memory_bank import MemoryBankModule
from pytorch_metric_learning import losses, reducers

import selfsup_kernels as sk
from selfsup_kernels.compat import _calls
from selfsup_kernels.compat import lightly as our_lightly
from selfsup_kernels.compat import pytorch_metric_learning as our_pml

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])


def double(module, args, output):
    return 2 * output


def of_distance(name, value):
    return lambda loss: setattr(loss.distance, name, value(getattr(loss.distance, name)))


def doubled(function):
    @functools.wraps(function)
    def method(*args):
        return 2 * function(*args)

    return method


PML = {
    "is_inverted": of_distance("is_inverted", lambda old: False),
    "distance=CosineSimilarity with its own hooks": lambda loss: loss.distance.register_forward_hook(double),
    "own compute_mat": of_distance("compute_mat", doubled),
    "own normalize": of_distance("normalize", lambda old: lambda x, **kwargs: x),
    "own hooks": lambda loss: loss.reducer.register_forward_hook(double),
    "own element_reduction": lambda loss: setattr(
        loss.reducer, "element_reduction", doubled(loss.reducer.element_reduction)
    ),
}


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.setattr(_calls, "_calls", {})
    return lambda: [calls[:2] for calls in sk.compat.report().values()]


def patched(library, loss, inputs, match):
    with sk.compat.patch(library), pytest.warns(UserWarning, match=match):
        return loss(*inputs)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize("match", PML)
def test_distances_and_reducers(name, match, counts):
    loss = getattr(losses, name)()
    plain = loss(rows(8, 5), LABELS)
    PML[match](loss)
    want = loss(rows(8, 5), LABELS)
    assert want != plain
    assert torch.equal(patched("pytorch_metric_learning", loss, (rows(8, 5), LABELS), match), want)
    assert counts() == [(0, 1)]
    with pytest.raises(RuntimeError, match=f"{match}.*does not support"):
        getattr(our_pml, name)(distance=loss.distance, reducer=loss.reducer)(rows(8, 5), LABELS)


@pytest.mark.parametrize("kind", ["MeanReducer", "BaseReducer"])
@pytest.mark.parametrize("before", [False, True])
def test_a_changed_class_of_reducers(kind, before, monkeypatch, counts):
    """Also where a call has found the class unchanged before."""
    kind, x = getattr(reducers, kind), rows(8, 5)
    method = "element_reduction" if kind is reducers.MeanReducer else "reduce_the_loss"
    loss = losses.NTXentLoss()
    plain = loss(x, LABELS)
    with sk.compat.patch("pytorch_metric_learning"):
        for _ in range(before):
            assert_near("value", loss(x, LABELS), plain)
        monkeypatch.setattr(kind, method, doubled(getattr(kind, method)))
        with pytest.warns(UserWarning, match=f"own {method}"):
            assert torch.equal(loss(x, LABELS), 2 * plain)
        monkeypatch.undo()
        assert_near("value", loss(x, LABELS), plain)


LIGHTLY = {
    "cross_entropy with its own hooks": lambda loss, _: loss.cross_entropy.register_forward_hook(double),
    "cross_entropy with its own forward": lambda loss, _: setattr(
        loss.cross_entropy, "forward", doubled(loss.cross_entropy.forward)
    ),
    "memory_bank with its own forward": lambda loss, _: setattr(
        loss.memory_bank, "forward", lambda x, update: (x, torch.eye(5))
    ),
    "memory_bank with feature_dim_first=False": lambda loss, _: setattr(loss.memory_bank, "feature_dim_first", False),
    "memory_bank with its own _dequeue_and_enqueue": lambda loss, monkeypatch: [
        monkeypatch.setattr(kind, "_dequeue_and_enqueue", lambda self, batch: self.bank.zero_())
        for kind in (MemoryBankModule, our_lightly.MemoryBankModule)
    ],
}


@pytest.mark.parametrize("match", LIGHTLY)
def test_banks_and_cross_entropies(match, monkeypatch, counts):
    def twice(make):
        torch.manual_seed(0)
        loss = make(memory_bank_size=(5, 5))
        LIGHTLY[match](loss, monkeypatch)
        inputs = views(4, 5)
        inputs[0].requires_grad_()
        return loss, lambda: torch.stack([loss(*inputs), loss(*inputs)])

    with monkeypatch.context() as changed:
        monkeypatch = changed
        want = twice(lightly.loss.NTXentLoss)[1]()
        got = twice(lightly.loss.NTXentLoss)[1]
        with sk.compat.patch("lightly"), pytest.warns(UserWarning, match=match):
            assert torch.equal(got(), want)
        assert counts() == [(0, 2)]
        with pytest.raises(RuntimeError, match=f"{match}.*does not support"):
            twice(our_lightly.NTXentLoss)[1]()


def test_hooks_of_all_modules(counts):
    """They see the parts of the originals; a drop-in imported by name has none that it calls."""
    x, y = views(4, 5)
    loss = lightly.loss.NTXentLoss()
    plain = loss(x, y)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, torch.nn.CrossEntropyLoss) else None
    )
    try:
        assert torch.equal(patched("lightly", loss, (x, y), "own hooks"), 2 * plain)
        assert_near("value", our_lightly.NTXentLoss()(x, y), plain)
    finally:
        handle.remove()


@pytest.mark.parametrize("library", ["lightly", "pytorch_metric_learning"])
def test_compiled_without_a_break(library, counts):
    x, y = views(8, 5)
    loss, inputs = (lightly.loss.NTXentLoss(), (x, y)) if library == "lightly" else (losses.SupConLoss(), (x, LABELS))
    want = value_and_grads(lambda x: loss(x, *inputs[1:]), [x])
    torch.compiler.reset()
    with sk.compat.patch(library):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        got = value_and_grads(lambda x: compiled(x, *inputs[1:]), [x])
    assert_near("value", got[0], want[0])
    assert_near("gradient", got[1][0], want[1][0])
    assert counts() == [(1, 0)]
