"""compat.pytorch_metric_learning against the originals' formulas, in loops in float64."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within, randn

from selfsup_kernels.compat import pytorch_metric_learning as pml
from selfsup_kernels.info_nce import one_way

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
    with pytest.raises(RuntimeError, match=r"indices_tuple.*does not support"):  # as CrossBatchMemory calls it
        make()(x, labels, (labels, labels, labels, labels), x, labels)
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


def one_way_formula(name, labels, ref_labels, temperature, normalize=True, reducer=None, itself=False):
    def loss(x, y):
        a, b = (F.normalize(h, dim=1) if normalize else h for h in (x, y))
        scores = a @ b.T / temperature
        same = labels[:, None] == ref_labels
        positive = same & ~torch.eye(*same.shape, dtype=torch.bool) if itself else same
        terms = []
        for row, mine, other in zip(scores, positive, ~same, strict=True):
            p, n = row[mine], row[other]
            if name == "NTXentLoss":
                terms += [torch.cat([n, own[None]]).logsumexp(0) - own for own in p]
            elif len(p):
                terms.append(torch.cat([n, p]).logsumexp(0) - p.mean())
        if not terms or same.all():
            return (x * 0).sum() + (y * 0).sum()
        if reducer == "SumReducer":
            return sum(terms)
        if name == "SupConLoss":  # anchors without negatives and with one positive have the loss zero
            return sum(terms) / (len(x) if reducer == "MeanReducer" else max(sum(bool(t > 0) for t in terms), 1))
        return sum(terms) / len(terms)

    return loss


def both_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)


def some_labels(count, *classes, seed=0):
    index = torch.randint(len(classes), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(classes)[index]


ONE_WAY = {
    "classes on one side only": (some_labels(13, 0, 3, 4, 9), some_labels(37, 0, 3, 7, -2, 4, seed=1)),
    "few anchors": (some_labels(3, 0, 1), some_labels(701, *range(9))),
    "few columns": (some_labels(37, 0, 1, 2), torch.tensor([1, 2])),
    "one anchor": (torch.tensor([1]), torch.tensor([2, 1, 1, 0, 2])),
    "one column": (torch.tensor([2, 1, 1, 0, 2]), torch.tensor([1])),
    "one sample of each class": (torch.arange(17), torch.arange(17).flip(0)),
    "columns of one class": (some_labels(9, 0, 1), torch.zeros(5, dtype=torch.long)),
    "no positives": (torch.zeros(5, dtype=torch.long), torch.arange(1, 8)),
    "no negatives": (torch.zeros(5, dtype=torch.long), torch.zeros(7, dtype=torch.long)),
    "no columns": (torch.arange(5), torch.arange(0)),
}


def two_sides(case, dtype=torch.float64, dim=9):
    x, y = (
        randn(len(labels), dim, dtype=torch.float64, seed=seed) + 0.3 for seed, labels in enumerate(ONE_WAY[case], 1)
    )
    return x.to(dtype), y.to(dtype)


def one_way_call(criterion, labels, ref_labels):
    return lambda x, y: criterion(x, labels, ref_emb=y, ref_labels=ref_labels)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
@pytest.mark.parametrize("case", ONE_WAY)
def test_references(name, temperature, case):
    labels = ONE_WAY[case]
    ours, formula = one_way_call(getattr(pml, name)(temperature), *labels), one_way_formula(name, *labels, temperature)
    sides = two_sides(case)
    want = both_gradients(formula, *sides)
    for i, got in enumerate(both_gradients(ours, *sides)):
        assert_within(f"{i}", got, want[i])
    sides = two_sides(case, torch.float32)
    want, eager = both_gradients(formula, *(x.double() for x in sides)), both_gradients(formula, *sides)
    for i, got in enumerate(both_gradients(ours, *sides)):
        assert_within(f"{i}", got, want[i], eager[i])


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer"])
@pytest.mark.parametrize("case", ["classes on one side only", "columns of one class"])
def test_reducers_and_distances_of_references(name, reducer, case):
    labels = ONE_WAY[case]
    distance = named("DotProductSimilarity", Distance)
    criterion = getattr(pml, name)(0.9, reducer=named(reducer, Reducer), distance=distance)
    want = both_gradients(one_way_formula(name, *labels, 0.9, normalize=False, reducer=reducer), *two_sides(case))
    for g, w in zip(both_gradients(one_way_call(criterion, *labels), *two_sides(case)), want, strict=True):
        assert_within(reducer, g, w)


@pytest.mark.parametrize("name", TERMS)
def test_one_tensor_of_labels_leaves_out_the_diagonal(name):
    """As in the original, it is not ``ref_emb is embeddings`` that decides, but ``ref_labels is labels``."""
    labels, criterion, x = torch.tensor(LABELS["mixed"]), getattr(pml, name)(0.2), rows()
    y = x.flip(1)
    want = both_gradients(one_way_formula(name, labels, labels, 0.2, itself=True), x, y)
    for ref_labels in (labels, None):
        for g, w in zip(both_gradients(one_way_call(criterion, labels, ref_labels), x, y), want, strict=True):
            assert_within("itself", g, w)
    torch.testing.assert_close(criterion(x, labels, ref_emb=x, ref_labels=labels), criterion(x, labels))
    want = one_way_formula(name, labels, labels, 0.2)(x, x)
    assert_within("copied", criterion(x, labels, ref_emb=x, ref_labels=labels.clone()), want)
    assert torch.equal(criterion(x, labels, ref_labels=labels[:3]), criterion(x, labels))  # it is not read


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("itself", [True, False])
def test_gradients_of_both_sides(name, normalize, itself, monkeypatch):
    """In blocks of two anchors and one, by finite differences; the temperature has a gradient too."""
    monkeypatch.setattr(one_way, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(one_way, "_LEAST_ANCHORS", 2)
    labels, ref_labels = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([1, 0, 0, 3, 0])
    distance = named("DotProductSimilarity", Distance, normalize_embeddings=normalize)
    criterion = getattr(pml, name)(0.5, distance=distance, reducer=named("SumReducer", Reducer))

    def loss(x, y, temperature):
        criterion.temperature = temperature
        return criterion(x, labels, ref_emb=y, ref_labels=labels if itself else ref_labels)

    x, y = (randn(5, 3, dtype=torch.float64, seed=seed) for seed in (1, 2))
    leaves = [h.requires_grad_() for h in (x, y, torch.tensor(0.4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(loss, leaves)
    every = torch.autograd.grad(loss(*leaves), leaves)
    for i, leaf in enumerate(leaves):
        apart = [h if h is leaf else h.detach() for h in leaves]
        assert torch.equal(torch.autograd.grad(loss(*apart), leaf)[0], every[i])
    first = torch.autograd.grad(loss(*leaves), leaves[1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize("name", TERMS)
def test_references_in_transforms_and_compiled(name):
    case = "classes on one side only"
    ours, sides = one_way_call(getattr(pml, name)(0.1), *ONE_WAY[case]), two_sides(case)
    value, *want = both_gradients(ours, *sides)
    for g, w in zip(torch.func.grad(ours, (0, 1))(*sides), want, strict=True):
        torch.testing.assert_close(g, w)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for g, w in zip(both_gradients(compiled, *sides), (value, *want), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", TERMS)
def test_references_in_one_block_and_in_many(name, monkeypatch):
    case = "classes on one side only"
    ours, sides = one_way_call(getattr(pml, name)(0.1), *ONE_WAY[case]), two_sides(case)
    want = both_gradients(ours, *sides)
    monkeypatch.setattr(one_way, "_BLOCK_BYTES", 0)
    for anchors in (1, 3, 12):
        monkeypatch.setattr(one_way, "_LEAST_ANCHORS", anchors)
        for g, w in zip(both_gradients(ours, *sides), want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TERMS)
def test_losses_of_hundreds_with_references(name):
    """Every positive is opposite to its anchor, and each anchor is also a column of another class."""
    x = F.normalize(rows(torch.float32), dim=1)
    y, labels, ref_labels = torch.cat([-x, x]), torch.arange(BATCH), torch.arange(2 * BATCH)
    value, *grads = both_gradients(one_way_call(getattr(pml, name)(0.01), labels, ref_labels), x, y)
    formula = one_way_formula(name, labels, ref_labels, 0.01)
    want, *want_grads = both_gradients(formula, x.double(), y.double())
    _, *eager = both_gradients(formula, x, y)
    assert value > 190
    assert_within("value", value, want)
    for i, (got, true, dense) in enumerate(zip(grads, want_grads, eager, strict=True)):
        assert_within(f"gradient {i}", got, true, dense)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_references_in_low_precision(name, dtype):
    case = "classes on one side only"
    labels, sides = ONE_WAY[case], two_sides(case, dtype)
    ours = one_way_call(getattr(pml, name)(0.1), *labels)
    want = both_gradients(one_way_formula(name, *labels, 0.1), *(x.double() for x in sides))
    for g, w in zip(both_gradients(ours, *sides), want, strict=True):
        assert g.dtype == dtype
        assert_within("low", g, w)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = sides[0], sides[1].float()  # as a memory bank in float32 has it
        got = both_gradients(ours, x, y)
    assert [g.dtype for g in got] == [torch.float32, dtype, torch.float32]
    for g, w in zip(got, want, strict=True):
        assert_within("autocast", g, w)


@pytest.mark.parametrize("name", TERMS)
def test_a_memory_bank_may_change_before_the_backward(name):
    case = "classes on one side only"
    labels, ref_labels = ONE_WAY[case]
    x, bank = two_sides(case)
    want = both_gradients(one_way_call(getattr(pml, name)(), labels, ref_labels), x, bank)[1]
    x, bank, ref_labels = x.requires_grad_(), bank.clone(), ref_labels.clone()
    loss = getattr(pml, name)()(x, labels, ref_emb=bank, ref_labels=ref_labels)
    bank.zero_()
    ref_labels.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)


@pytest.mark.parametrize("name", TERMS)
def test_nan_spreads_through_references(name):
    case = "classes on one side only"
    ours, sides = one_way_call(getattr(pml, name)(0.1), *ONE_WAY[case]), two_sides(case)
    for side, other in ((0, 1), (1, 0)):
        changed = [x.clone() for x in sides]
        changed[side][0, 0] = torch.nan
        value, *grads = both_gradients(ours, *changed)
        assert value.isnan()
        assert grads[side][0].isnan().all()
        assert grads[other].isnan().any()


@pytest.mark.parametrize("name", TERMS)
def test_dtypes_of_the_labels_of_references(name):
    case = "classes on one side only"
    (labels, ref_labels), sides, criterion = ONE_WAY[case], two_sides(case), getattr(pml, name)()
    want = criterion(sides[0], labels, ref_emb=sides[1], ref_labels=ref_labels)
    for dtype in (torch.int32, torch.int8, torch.float64, torch.float16):
        got = criterion(sides[0], labels, ref_emb=sides[1], ref_labels=ref_labels.to(dtype))
        assert torch.equal(got, want)
    got = criterion(sides[0], labels / 10, ref_emb=sides[1], ref_labels=ref_labels / 10)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", TERMS)
def test_bad_references(name):
    criterion, x, labels = getattr(pml, name)(), rows(), torch.tensor(LABELS["mixed"])
    y, ref_labels = randn(5, 9, dtype=torch.float64), torch.arange(5)
    for arguments, error, message in (
        ((x, None, None, y, ref_labels), TypeError, r"labels: expected a \(B,\) tensor, got NoneType"),
        ((x, labels, None, [y], ref_labels), TypeError, r"ref_emb: expected a \(M, D\) tensor, got list"),
        ((x, labels, None, y[0], ref_labels), ValueError, r"ref_emb: expected a \(M, D\) tensor, got shape \(9,\)"),
        ((x, labels, None, y[:, :8], ref_labels), ValueError, r"ref_emb: expected shape \(M, 9\), got \(5, 8\)"),
        ((x, labels, None, y.float(), ref_labels), TypeError, "ref_emb: expected the dtype of embeddings"),
        ((x, labels, None, y.long(), ref_labels), TypeError, "ref_emb: expected float64, float32"),
        ((x, labels, None, y.to("meta"), ref_labels), ValueError, "ref_emb: expected the device of embeddings"),
        ((x, labels, None, y, None), ValueError, r"ref_labels: expected a \(M,\) tensor.*14 embeddings and 5 rows"),
        ((x, labels, None, y, 3), TypeError, r"ref_labels: expected a \(M,\) tensor, got int"),
        ((x, labels, None, y, labels), ValueError, r"ref_labels: expected shape \(5,\)"),
        ((x[:0], labels[:0], None, y, ref_labels), ValueError, "embeddings: expected a non-empty batch"),
    ):
        with pytest.raises(error, match=message):
            criterion(*arguments)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        getattr(pml, name)(-1.0)(x, labels, None, y, ref_labels)
