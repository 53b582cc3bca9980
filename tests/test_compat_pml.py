"""compat.pytorch_metric_learning against the originals' formulas, in loops in float64."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within, randn

from selfsup_kernels.compat import pytorch_metric_learning as pml

BATCH = 14
LABELS = {
    "one": list(range(BATCH)),
    "all": [5] * BATCH,
    "pairs": [i // 2 for i in range(BATCH)],
    "mixed": [0, 3, 3, 1, 0, 0, 0, 2, 0, 3, 1, 0, 4, 0],
}


def similarities(x, temperature, normalize=True):
    z = F.normalize(x, dim=1) if normalize else x
    return z @ z.T / temperature


def ntxent_pairs(scores, labels):
    """Return -log softmax of each ordered positive pair over itself and the anchor's negatives, if there are any."""
    terms = []
    for a in range(len(labels)):
        negative = [scores[a, n] for n in range(len(labels)) if labels[n] != labels[a]]
        for p in range(len(labels)):
            if p != a and labels[p] == labels[a] and negative:
                terms.append(torch.stack([*negative, scores[a, p]]).logsumexp(0) - scores[a, p])
    return terms


def supcon_anchors(scores, labels):
    """Return (loss of each anchor with a positive, number of all anchors); no losses without negatives."""
    terms = []
    for a in range(len(labels)):
        positive = [scores[a, p] for p in range(len(labels)) if p != a and labels[p] == labels[a]]
        every = [scores[a, j] for j in range(len(labels)) if j != a]
        if positive and len(set(labels)) > 1:
            terms.append(torch.stack(every).logsumexp(0) - torch.stack(positive).mean())
    return terms


TERMS = {"NTXentLoss": ntxent_pairs, "SupConLoss": supcon_anchors}


def formula(name, labels, temperature, normalize=True, reducer=None):
    def loss(x):
        terms = TERMS[name](similarities(x, temperature, normalize), labels)
        total = sum(terms) if terms else (x * 0).sum()
        if reducer == "SumReducer":
            return total
        return total / (len(labels) if reducer == "MeanReducer" and name == "SupConLoss" else max(len(terms), 1))

    return loss


def gradients(function, x):
    x = x.clone().requires_grad_()
    loss = function(x)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


class Reducer:
    """Replaces the library's reducers, which are identified by module and name."""

    low, high = 0, None


class Distance:
    p, power, normalize_embeddings = 2, 1, False


def named(name, base, **attributes):
    return type(name, (base,), {"__module__": "pytorch_metric_learning", **attributes})()


def rows(dtype=torch.float64):
    return (randn(BATCH, 9, dtype=torch.float64) + 0.3).to(dtype)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("labels", LABELS)
def test_labels(name, temperature, labels):
    labels = LABELS[labels]
    criterion = getattr(pml, name)(temperature)

    def ours(x):
        return criterion(x, torch.tensor(labels))

    want = gradients(formula(name, labels, temperature), rows())
    for i in range(2):
        assert_within(f"{i}", gradients(ours, rows())[i], want[i])
    low = rows(torch.float32)
    want, eager = (
        gradients(formula(name, labels, temperature), low.double()),
        gradients(formula(name, labels, temperature), low),
    )
    for i in range(2):
        assert_within(f"{i}", gradients(ours, low)[i], want[i], eager[i])


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer"])
def test_reducers_and_distances(name, reducer):
    labels = LABELS["mixed"]
    distance = named("DotProductSimilarity", Distance)
    criterion = getattr(pml, name)(0.9, reducer=named(reducer, Reducer), distance=distance)
    got = gradients(lambda x: criterion(x, torch.tensor(labels)), rows())
    want = gradients(formula(name, labels, 0.9, normalize=False, reducer=reducer), rows())
    for g, w in zip(got, want, strict=True):
        assert_within(reducer, g, w)


def test_defaults():
    assert pml.NTXentLoss().temperature == 0.07
    assert pml.SupConLoss().temperature == 0.1
    assert pickle.loads(pickle.dumps(pml.SupConLoss(0.3))).temperature == 0.3


@pytest.mark.parametrize("name", TERMS)
def test_losses_of_large_scores_are_not_capped(name):
    """The original's NTXentLoss is capped at 87.3 in float32, where its gradient is zero."""
    x = F.normalize(rows(torch.float32), dim=1)
    x[1::2] = -x[::2]
    labels = [i // 2 for i in range(BATCH)]
    value, grad = gradients(lambda x: getattr(pml, name)(0.01)(x, torch.tensor(labels)), x)
    want, want_grad = gradients(formula(name, labels, 0.01), x.double())
    assert value > 150
    assert_within("value", value, want)
    assert (grad.double() - want_grad).norm() <= 1e-3 * want_grad.norm() + 1e-4


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_classes_in_low_precision(name, dtype):
    """Two classes of 200 have 79,600 positive pairs, more than float16 can represent."""
    x = (randn(400, 9, dtype=torch.float64) + 0.3).to(dtype)
    labels = torch.arange(400) % 2
    got = gradients(lambda x: getattr(pml, name)(0.3)(x, labels), x)
    same = labels[:, None] == labels

    def formula(x):
        scores = similarities(x, 0.3).masked_fill(torch.eye(400, dtype=torch.bool), -torch.inf)
        positive = scores[same & scores.isfinite()].view(400, 199)
        if name == "SupConLoss":
            return (scores.logsumexp(1) - positive.mean(1)).mean()
        negative = scores[~same].view(400, 200).logsumexp(1, keepdim=True)
        return F.softplus(negative - positive).mean()

    want = gradients(formula, x.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert (g.double() - w).norm() <= 2 * torch.finfo(dtype).eps * w.norm() + 400 * 9 * torch.finfo(dtype).tiny


@pytest.mark.parametrize("name", TERMS)
def test_one_sample_and_dtypes_of_labels(name):
    criterion = getattr(pml, name)()
    value, grad = gradients(lambda x: criterion(x, torch.tensor([3])), rows()[:1])
    assert value == 0
    assert not grad.any()
    labels = torch.tensor(LABELS["mixed"])
    want = criterion(rows(), labels)
    for dtype in (torch.int32, torch.uint8, torch.float64, torch.float16):
        assert torch.equal(criterion(rows(), labels.to(dtype)), want)
    fractions = labels / 10  # none of them an integer
    assert torch.equal(criterion(rows(), fractions), want)
    assert math.isnan(criterion(rows() * torch.nan, labels))


@pytest.mark.parametrize("name", TERMS)
def test_unsupported_and_bad_input(name):
    make = getattr(pml, name)
    for kwargs, what in (
        ({"reducer": named("ThresholdReducer", Reducer)}, "reducer=ThresholdReducer"),
        (
            {"reducer": named("AvgNonZeroReducer" if name == "SupConLoss" else "MeanReducer", Reducer, high=1.0)},
            "reducer=",
        ),
        ({"distance": named("LpDistance", Distance)}, "distance="),
        ({"distance": named("CosineSimilarity", Distance, power=2)}, "distance="),
        ({"embedding_regularizer": torch.nn.Identity()}, "embedding_regularizer"),
        ({"collect_stats": True}, "collect_stats=True"),
    ):
        with pytest.raises(RuntimeError, match=f"{what}.*pytorch_metric_learning.losses.{name} does not support"):
            make(**kwargs)
    with pytest.raises(TypeError, match="unexpected arguments margin"):
        make(margin=1)
    labels, x = torch.tensor(LABELS["mixed"]), rows()
    with pytest.raises(RuntimeError, match=r"indices_tuple.*does not support"):
        make()(x, labels, (labels, labels, labels))
    with pytest.raises(RuntimeError, match=r"ref_emb.*does not support"):
        make()(x, labels, ref_emb=x, ref_labels=labels)
    with pytest.raises(TypeError, match=r"labels: expected a \(B,\) tensor, got NoneType"):
        make()(x)
    with pytest.raises(ValueError, match=r"labels: expected shape \(14,\)"):
        make()(x, labels[:3])
    with pytest.raises(ValueError, match="embeddings: expected a"):
        make()(x[0], labels)
    with pytest.raises(TypeError, match="embeddings: expected a"):
        make()([x], labels)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        make(-1.0)(x, labels)
