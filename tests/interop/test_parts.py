"""Test parts of the originals that a user has changed: distances, reducers, memory banks, similarities, temperatures.

Under a patch the original computes with them; a drop-in that is imported by name raises.
"""

import functools
import math
import warnings

import lightly.loss
import pytest
import timm.utils
import torch
from interop.helpers import assert_near, assert_same, rows, value_and_grads, views
from lightly.models.modules.memory_bank import MemoryBankModule
from pytorch_metric_learning import distances, losses, reducers
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import selfsup_kernels as sk
from selfsup_kernels.compat import _calls, _common
from selfsup_kernels.compat import lightly as our_lightly
from selfsup_kernels.compat import pytorch_metric_learning as our_pml
from selfsup_kernels.compat import sentence_transformers as our_sentence_transformers

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
    """A changed class is noticed even after a call with the unchanged class."""
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
    """Global hooks see the parts of the originals; a drop-in imported by name does not call such parts."""
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
def test_compiled_without_a_break(library, counts, monkeypatch):
    x, y = views(8, 5)
    loss, inputs = (lightly.loss.NTXentLoss(), (x, y)) if library == "lightly" else (losses.SupConLoss(), (x, LABELS))
    want = value_and_grads(lambda x: loss(x, *inputs[1:]), [x])
    torch.compiler.reset()
    monkeypatch.setattr(_common, "_methods_of", {})  # the first call of a process is the compiled one
    with sk.compat.patch(library):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        got = value_and_grads(lambda x: compiled(x, *inputs[1:]), [x])
    assert_near("value", got[0], want[0])
    assert_near("gradient", got[1][0], want[1][0])
    assert counts() == [(1, 0)]


@pytest.mark.parametrize("scale", [4.0, 0.1, 0.0])
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_a_bank_of_rows_of_any_length(scale, temperature, counts):
    def call(make):
        loss = make(temperature, memory_bank_size=(24, 6))
        bank = rows(24, 6, seed=3) * scale

        def value(*inputs):
            loss.memory_bank.bank = bank.clone().to(inputs[0].dtype)
            return loss(*inputs)

        return value

    assert_same(call(our_lightly.NTXentLoss), call(lightly.loss.NTXentLoss), views(10, 6))
    want = call(lightly.loss.NTXentLoss)(*views(10, 6))
    with sk.compat.patch("lightly"):
        assert_near("value", call(lightly.loss.NTXentLoss)(*views(10, 6)), want)
    assert counts() == [(1, 0)]


@pytest.mark.parametrize("wrap", [doubled, torch.no_grad()])
@pytest.mark.parametrize("name", ["cos_sim", "dot_score"])
def test_a_wrapped_similarity_is_another(name, wrap, counts):
    """A wrapper counts as another function, although functools.wraps copies the name and the module."""
    similarity = wrap(getattr(util, name))
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), similarity_fct=similarity)
    inputs = views(6, 5)
    want = loss.compute_loss_from_embeddings(inputs, None)
    with sk.compat.patch("sentence_transformers"), pytest.warns(UserWarning, match=f"similarity_fct={name}"):
        assert torch.equal(loss.compute_loss_from_embeddings(inputs, None), want)
    assert counts() == [(0, 1)]
    for library in (util, our_sentence_transformers):
        with pytest.raises(RuntimeError, match=rf"similarity_fct={name}.*does not support"):
            our_sentence_transformers.MultipleNegativesRankingLoss(
                torch.nn.Identity(), similarity_fct=wrap(getattr(library, name))
            )


def test_a_hook_wrapped_before_a_patch(monkeypatch, counts):
    loss, inputs = lightly.loss.DCLLoss(), views(6, 5)
    plain = loss(*inputs)
    monkeypatch.setattr(lightly.loss.DCLLoss, "_loss", doubled(lightly.loss.DCLLoss._loss))
    assert torch.equal(patched("lightly", loss, inputs, "own _loss"), 2 * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_originals_cap_on_a_pairs_loss_holds_under_a_patch(dtype, counts):
    """A positive is opposite to its anchor and the negatives equal it, around where the original's logarithm ends."""
    x = torch.eye(2, dtype=dtype).repeat_interleave(4, 0)
    x[1::2] *= -1
    labels = torch.arange(8) // 2
    info = torch.finfo(dtype)
    end = -math.log(info.tiny)
    served = 0
    for share in (1.2, 1.01, 0.98, 0.9, 0.5, 0.25):  # the loss of the worst pair as a share of the cap
        loss = losses.NTXentLoss(2 / (share * end - math.log(8)))
        want = value_and_grads(lambda x, loss=loss: loss(x, labels), [x])
        with sk.compat.patch("pytorch_metric_learning"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*where the original ends a pair's")
            got = value_and_grads(lambda x, loss=loss: loss(x, labels), [x])
        if counts()[0][0] == served:
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1][0], want[1][0])
        elif dtype != torch.bfloat16:
            assert_near(f"value at {share}", got[0], want[0], 16 * info.eps)
            assert_near(f"gradient at {share}", got[1][0], want[1][0], 16 * info.eps)
        served = counts()[0][0]
    assert counts() == [(2, 4) if dtype == torch.float32 else (3, 3)]
    assert our_pml.NTXentLoss(0.01)(x, labels) > 190


def test_unbounded_scores_go_to_the_original_under_a_patch(counts):
    x = 8 * rows(8, 5)
    dot = losses.NTXentLoss(0.1, distance=distances.DotProductSimilarity(normalize_embeddings=False))
    learnt = losses.NTXentLoss(torch.tensor(0.01))
    for loss, match in ((dot, "not normalised"), (learnt, "tensor as temperature")):
        want = loss(x, LABELS)
        assert torch.equal(patched("pytorch_metric_learning", loss, (x, LABELS), match), want)
    assert counts() == [(0, 2)]


class Filtered(torch.nn.BatchNorm1d):
    def state_dict(self, *args, **kwargs):
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if "running" not in name}


def filtered(how):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), Filtered(4) if how == "method" else torch.nn.BatchNorm1d(4))
    if how == "hook":
        model[1].register_state_dict_post_hook(
            lambda module, state, prefix, metadata: state.__delitem__(f"{prefix}running_mean")
        )
    return model


@pytest.mark.parametrize("how", ["method", "hook"])
@pytest.mark.parametrize("update", ["update", "set"])
def test_a_customised_state_dict_goes_to_the_original(how, update, counts):
    def averaged():
        torch.manual_seed(0)
        average, model = timm.utils.ModelEmaV3(filtered(how), decay=0.9), filtered(how)
        model(rows(8, 3))
        getattr(average, update)(model)
        return list(average.module.parameters()) + list(average.module.buffers())

    want = averaged()
    with sk.compat.patch("timm"), pytest.warns(UserWarning, match="the state_dict that (Filtered|BatchNorm1d) makes"):
        got = averaged()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert counts() == [(0, 1)]


def test_ordinary_models_use_ours_under_a_patch(counts):
    models = [
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)),
        lambda: torch.compile(torch.nn.Linear(3, 4), backend="eager"),
        lambda: torch.nn.MultiheadAttention(4, 2),
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4)),
    ]
    with sk.compat.patch("timm"):
        for make in models:
            timm.utils.ModelEmaV3(make()).update(make())
    assert counts() == [(4, 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["cos_sim", "dot_score"])
def test_rankings_of_low_precision_are_float32(name, dtype, counts):
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=2.0, similarity_fct=getattr(util, name))
    inputs = views(6, 5, dtype=dtype)
    want = loss.compute_loss_from_embeddings(inputs, None)
    with sk.compat.patch("sentence_transformers"):
        got = loss.compute_loss_from_embeddings(inputs, None)
    assert got.dtype == want.dtype
    assert_near("value", got, want)
    assert counts() == [(1, 0)]
