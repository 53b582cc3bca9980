"""compat.pytorch_metric_learning against the installed pytorch-metric-learning."""

import inspect

import pytest
import torch
from interop.helpers import assert_near, assert_same, label_cases, rows, value_and_grads, views
from pytorch_metric_learning import distances, losses, reducers
from pytorch_metric_learning.losses import SelfSupervisedLoss

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
    for kwargs in ({"indices_tuple": (labels,) * 3}, {"ref_emb": x, "ref_labels": labels}):
        with pytest.raises(RuntimeError, match="does not support"):
            mine(x, labels, **kwargs)
    for criterion in both(name):
        with pytest.raises((ValueError, TypeError)):
            criterion(x)
        with pytest.raises(ValueError, match="labels"):
            criterion(x, labels[:5])
