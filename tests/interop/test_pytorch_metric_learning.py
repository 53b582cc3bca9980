"""Compare compat.pytorch_metric_learning with the installed pytorch-metric-learning."""

import inspect
import warnings

import pytest
import torch
from interop.helpers import assert_near, assert_same, label_cases, rows, value_and_grads, views
from pytorch_metric_learning import distances, losses, reducers, regularizers
from pytorch_metric_learning.losses import SelfSupervisedLoss
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

import selfsup_kernels as sk
from selfsup_kernels.compat import _calls
from selfsup_kernels.compat import pytorch_metric_learning as ours

NAMES = ["NTXentLoss", "SupConLoss"]
BATCH = 48
LABELS = label_cases(BATCH)


def both(name, *args, **kwargs):
    return getattr(ours, name)(*args, **kwargs), getattr(losses, name)(*args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    for function in ("__init__", "forward"):
        got, want = (
            {n: p.default for n, p in inspect.signature(getattr(getattr(module, name), function)).parameters.items()}
            for module in (ours, losses)
        )
        assert got == want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels(name, temperature, labels, dtype):
    mine, original = both(name, temperature)
    x = rows(BATCH, 24, dtype=dtype)
    bound = 2e-5 if dtype == torch.float32 else 1e-9
    (value, _), _ = assert_same(mine, original, [x, LABELS[labels]], bound=bound)
    assert (value == 0) == (labels in ("one", "all"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_samples(name, count):
    mine, original = both(name)
    for labels in ([0] * count, list(range(count)), [0, 0, 1][:count]):
        assert_same(mine, original, [rows(count, 6), torch.tensor(labels)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool])
def test_dtypes_of_labels(name, dtype):
    mine, original = both(name)
    labels = torch.tensor([0, 1, 3, 1, 0, 0, 2, 3]).to(dtype)
    x = rows(8, 6)
    got, want = (value_and_grads(lambda e, f=f: f(e, labels), [x]) for f in (mine, original))
    assert_near("value", got[0], want[0])
    assert_near("gradient", got[1][0], want[1][0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer", "AvgNonZeroReducer"])
@pytest.mark.parametrize("labels", ["mixed", "all"])
def test_reducers(name, reducer, labels):
    kwargs = {"reducer": getattr(reducers, reducer)()}
    if (name, reducer) == ("NTXentLoss", "AvgNonZeroReducer"):
        with pytest.raises(RuntimeError, match=r"reducer=AvgNonZeroReducer.*does not support"):
            ours.NTXentLoss(**kwargs)
        return
    assert_same(*both(name, 0.2, **kwargs), [rows(BATCH, 24), LABELS[labels]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalized", [True, False])
def test_distances(name, normalized):
    for distance in (distances.CosineSimilarity(), distances.DotProductSimilarity(normalize_embeddings=normalized)):
        assert_same(*both(name, 0.9, distance=distance), [rows(BATCH, 24) / 3, LABELS["mixed"]])


@pytest.mark.parametrize("name", NAMES)
def test_self_supervised_wrapper(name):
    mine, original = (SelfSupervisedLoss(loss) for loss in both(name))
    assert_same(mine, original, views(20, 16))


def references(batch, columns, classes, dtype=torch.float64):
    """Return embeddings, labels, ref_emb and ref_labels; one class has anchors only, and one columns only."""
    generator = torch.Generator().manual_seed(batch + columns)
    labels = torch.randint(classes, (batch,), generator=generator)
    ref_labels = torch.randint(classes, (columns,), generator=generator) + 1
    return rows(batch, 12, dtype=dtype), labels, rows(columns, 12, dtype=dtype, seed=5) + 0.1, ref_labels


def with_references(criterion, labels, ref_labels):
    return lambda x, y: criterion(x, labels, ref_emb=y, ref_labels=ref_labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "size", [(13, 29, 4), (29, 13, 4), (3, 97, 2), (16, 16, 16), (7, 5, 1), (1, 2, 1), (2, 1, 1), (1, 9, 2), (5, 0, 2)]
)
def test_references(name, temperature, dtype, size):
    x, labels, y, ref_labels = references(*size, dtype)
    mine, original = (with_references(f, labels, ref_labels) for f in both(name, temperature))
    bound = 2e-5 if dtype == torch.float32 else 1e-9
    assert_same(mine, original, [x, y], bound=bound)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [([0], [0, 1]), ([0, 1], [0]), ([0, 1], [0, 1]), ([0, 0], [0]), ([3], [3])], ids=str)
def test_few_references(name, labels):
    """The original takes one positive and one negative pair for none."""
    labels, ref_labels = map(torch.tensor, labels)
    mine, original = (with_references(f, labels, ref_labels) for f in both(name))
    sides = [rows(len(labels), 6, dtype=torch.float64), rows(len(ref_labels), 6, dtype=torch.float64, seed=1)]
    assert_same(mine, original, sides, bound=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_references_with_the_labels_of_the_embeddings(name):
    """One tensor of labels, or none for the references, leaves out the pairs (i, i); equal labels do not."""
    x, y = views(20, 8, dtype=torch.float64)
    labels = LABELS["mixed"][:20]
    for ref_labels in (labels, None, labels.clone()):
        mine, original = (with_references(f, labels, ref_labels) for f in both(name, 0.3))
        assert_same(mine, original, [x, y], bound=1e-9)
        mine, original = (lambda x, f=f, r=ref_labels: f(x, labels, None, x, r) for f in both(name, 0.3))
        assert_same(mine, original, [x], bound=1e-9)
    mine, original = (lambda x, f=f: f(x, labels, ref_labels=labels[:4]) for f in both(name, 0.3))
    assert_same(mine, original, [x], bound=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer", "AvgNonZeroReducer"])
def test_reducers_and_distances_of_references(name, reducer):
    if (name, reducer) == ("NTXentLoss", "AvgNonZeroReducer"):
        return
    x, labels, y, ref_labels = references(13, 29, 4)
    kwargs = {"reducer": getattr(reducers, reducer)()}
    for distance in (distances.CosineSimilarity(), distances.DotProductSimilarity(normalize_embeddings=False)):
        losses_of_both = both(name, 0.9, distance=distance, **kwargs)
        mine, original = (with_references(f, labels, ref_labels) for f in losses_of_both)
        assert_same(mine, original, [x / 3, y / 3], bound=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_self_supervised_wrapper_of_one_direction(name, monkeypatch):
    """Around our drop-in, and around the original under a patch."""
    monkeypatch.setattr(_calls, "_calls", {})
    mine, original = (SelfSupervisedLoss(loss, symmetric=False) for loss in both(name, 0.2))
    x, y = views(20, 16, dtype=torch.float64)
    _, want = assert_same(mine, original, [x, y], bound=1e-9)
    with sk.compat.patch("pytorch-metric-learning"):
        value, grads = value_and_grads(original, [x, y])
    assert_near("value", value, want[0], 1e-9)
    for got, wanted in zip(grads, want[1], strict=True):
        assert_near("gradient", got, wanted, 1e-9)
    assert [calls[:2] for calls in sk.compat.report().values()] == [(1, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory_is_refused(name):
    """Its wrapper passes an ``indices_tuple``; the same memory without one is served."""
    x, labels, y, ref_labels = references(13, 29, 4)
    memory = losses.CrossBatchMemory(getattr(ours, name)(), 12, memory_size=32)
    with pytest.raises(RuntimeError, match=r"indices_tuple.*does not support"):
        memory(x, labels)
    mine, original = (with_references(f, labels, ref_labels) for f in both(name))
    assert_same(lambda x: mine(x, y), lambda x: original(x, y), [x], bound=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_unsupported(name):
    x, labels = rows(8, 4), torch.arange(8) // 2
    for kwargs in (
        {"distance": distances.LpDistance()},
        {"distance": distances.CosineSimilarity(power=2)},
        {"reducer": reducers.ThresholdReducer(low=0.1)},
        {"embedding_regularizer": torch.nn.Identity()},
        {"collect_stats": True},
    ):
        with pytest.raises(RuntimeError, match="does not support"):
            getattr(ours, name)(**kwargs)
    mine = getattr(ours, name)()
    for kwargs in ({"indices_tuple": (labels,) * 3}, {"indices_tuple": (labels,) * 4, "ref_emb": x}):
        with pytest.raises(RuntimeError, match="does not support"):
            mine(x, labels, **kwargs)
    for criterion in both(name):
        with pytest.raises((ValueError, TypeError)):
            criterion(x)
        with pytest.raises(ValueError, match="labels"):
            criterion(x, labels[:5])


def _beyond(name, x, labels, ref):
    """Return (loss, arguments) by feature that the kernels do not support; the library's own tests use these."""
    cls = getattr(losses, name)
    pairs = get_all_pairs_indices(labels)

    class Scaled(cls):
        def _compute_loss(self, *args):
            found = super()._compute_loss(*args)
            found["loss"]["losses"] = 3 * found["loss"]["losses"]
            return found

    class Own(cls):
        def get_default_distance(self):
            return distances.SNRDistance()

    return {
        "distance=LpDistance": (cls(distance=distances.LpDistance()), (x, labels)),
        "distance=SNRDistance": (Own(), (x, labels)),
        "reducer=PerAnchorReducer": (cls(reducer=reducers.PerAnchorReducer()), (x, labels)),
        "embedding_regularizer": (cls(embedding_regularizer=regularizers.LpRegularizer()), (x, labels)),
        "collect_stats": (cls(collect_stats=True), (x, labels)),
        "ref_labels": (cls(), (x, labels, None, torch.cat([ref, ref]))),
        "indices_tuple": (cls(), (x, None, tuple(index[::2] for index in pairs))),
        "its own _compute_loss": (Scaled(), (x, labels)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_unsupported_features_go_to_the_library_under_a_patch(name, monkeypatch):
    """Distances, reducers, regularisers, miners, references and subclasses give the library's results and errors."""
    monkeypatch.setattr(_calls, "_calls", {})
    x, labels, ref = rows(12, 6), torch.arange(12) // 3, rows(12, 6, seed=5)
    want = {
        k: value_and_grads(lambda e, f=f, a=a: f(e, *a[1:]), [x]) for k, (f, a) in _beyond(name, x, labels, ref).items()
    }
    with sk.compat.patch("pytorch-metric-learning"):
        for feature, (loss, arguments) in _beyond(name, x, labels, ref).items():
            with pytest.warns(UserWarning, match=f"the kernels do not support .*{feature}"):
                got = value_and_grads(lambda e, f=loss, a=arguments: f(e, *a[1:]), [x])
            assert torch.equal(got[0], want[feature][0])
            assert torch.equal(got[1][0], want[feature][1][0])
        with pytest.warns(UserWarning, match="labels"), pytest.raises(ValueError, match="cannot both be None"):
            getattr(losses, name)()(x)
        getattr(losses, name)(0.3)(x, labels)
    counts = {key.rpartition(".")[2]: calls[:2] for key, calls in sk.compat.report().items()}
    assert counts == {name: (1, 7), "Own": (0, 1), "Scaled": (0, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_the_librarys_wrappers_under_a_patch(name, monkeypatch):
    """SelfSupervisedLoss, CrossBatchMemory and MultipleLosses, which look at names, types and attributes, work."""
    monkeypatch.setattr(_calls, "_calls", {})
    x, y = views(8, 6)
    labels = torch.arange(8) // 2

    def values():
        loss = getattr(losses, name)(0.2)
        assert type(loss.distance) is distances.CosineSimilarity
        assert isinstance(loss, losses.BaseMetricLossFunction)
        memory = losses.CrossBatchMemory(getattr(losses, name)(0.2), 6, memory_size=16)
        weighted = losses.MultipleLosses([loss, losses.ContrastiveLoss()], weights=[1, 0.5])
        return [
            SelfSupervisedLoss(loss)(x, y),
            SelfSupervisedLoss(loss, symmetric=False)(x, y),
            memory(x, labels),
            memory(y, labels),
            weighted(x, labels),
        ]

    want = values()
    with sk.compat.patch("pytorch-metric-learning"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for got, wanted in zip(values(), want, strict=True):
            assert_near("value", got, wanted)
    assert [calls[:2] for calls in sk.compat.report().values()] == [(3, 2)]


@pytest.mark.parametrize("with_references", [False, True])
def test_the_originals_float16_cap_on_a_pairs_loss_holds_under_a_patch(with_references, monkeypatch):
    """The original caps a pair's loss at 9.7 in float16; our drop-in imported by name has no cap."""
    monkeypatch.setattr(_calls, "_calls", {})
    x = torch.eye(4, dtype=torch.float16)
    x = -x.roll(1, 0) + x
    labels = torch.tensor([0, 0, 1, 1])
    arguments = (x, labels, None, x, labels) if with_references else (x, labels)
    want = losses.NTXentLoss(0.01)(*arguments)
    with sk.compat.patch("pytorch-metric-learning"), pytest.warns(UserWarning, match="float16"):
        assert torch.equal(losses.NTXentLoss(0.01)(*arguments), want)
    assert ours.NTXentLoss(0.01)(*arguments) > 2 * want
