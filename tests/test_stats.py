"""Compare contrastive_stats with loops over the rows, written from its docstring."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randn, random_labels

import selfsup_kernels as sk
from selfsup_kernels.info_nce import stats as stats_module


def by_loops(views, labels=None, normalize=True):
    """Return the five numbers of the docstring, in float64, pair by pair. Ties count against the anchor."""
    num_views, batch, dim = views.shape
    z = views.double().reshape(-1, dim)
    z = F.normalize(z, dim=-1) if normalize else z
    group = list(range(batch)) * num_views if labels is None else labels.tolist() * num_views
    right, hardest, positive, distance, kernel = [], [], [], [], []
    for i in range(len(z)):
        score = {j: float(z[i] @ z[j]) for j in range(len(z)) if j != i}
        mine = [s for j, s in score.items() if group[j] == group[i]]
        others = [s for j, s in score.items() if group[j] != group[i]]
        positive += mine
        distance += [float((z[i] - z[j]).square().sum()) for j in score if group[j] == group[i]]
        kernel += [math.exp(-2 * float((z[i] - z[j]).square().sum())) for j in score]
        if mine:
            right.append(max(mine) > max(others, default=-math.inf) + 1e-7)
        if others:
            hardest.append(max(others))

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    return [mean(right), mean(positive), mean(hardest), mean(distance), math.log(mean(kernel))]


def assert_close(got, want, rtol=2e-6):
    for name, g, w in zip(got._fields, got, want, strict=True):
        assert g.dtype == torch.float32, name
        assert g.shape == (), name
        if math.isnan(w):
            assert g.isnan(), name
        else:
            assert abs(g.item() - w) <= rtol * max(1, abs(w)), f"{name}: {g.item()}, expected {w}"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_loops_over_pairs(dtype, num_views, normalize):
    views = randn(num_views, 9, 5, seed=1)
    views = (views[:1] + 0.6 * views).to(dtype)  # a positive is the nearest row for some anchors only
    got = sk.contrastive_stats(views, normalize=normalize)
    want = by_loops(views, normalize=normalize)
    assert 0 < want[0] < 1
    assert_close(got, want)


@pytest.mark.parametrize("num_views", [1, 2])
def test_equals_loops_over_pairs_with_labels(num_views):
    views = randn(num_views, 12, 4, seed=2)
    labels = random_labels(12, 5, seed=3)
    want = by_loops(views, labels)
    assert 0 < want[0] < 1
    assert_close(sk.contrastive_stats(views, labels=labels), want)
    assert_close(sk.contrastive_stats(list(views), labels=labels), want)


def test_many_chunks_equal_one_chunk(monkeypatch):
    views = randn(2, 33, 7, seed=4)
    whole = sk.contrastive_stats(views)
    monkeypatch.setattr(stats_module, "_CHUNK_ELEMENTS", 200)  # three rows at a time; the last chunk is shorter
    assert_close(sk.contrastive_stats(views), [x.item() for x in whole], rtol=1e-6)
    assert_close(sk.contrastive_stats(views), by_loops(views))


def test_separated_and_collapsed_embeddings():
    eye = torch.eye(6).expand(2, 6, 6)
    assert_close(sk.contrastive_stats(eye), [1, 1, 0, 0, math.log((6 + 60 * math.exp(-4)) / 66)])
    # Every similarity is the same up to the rounding of the product, so no anchor counts as a retrieval.
    for dim in (3, 17, 130):
        collapsed = randn(dim, seed=5).expand(2, 19, dim)
        assert_close(sk.contrastive_stats(collapsed), [0, 1, 1, 0, 0])


def test_nearly_aligned_views_keep_their_alignment():
    """Alignment is accurate at 1e-8, which is below float32's resolution of a similarity."""
    views = randn(1, 8, 16, seed=6, dtype=torch.float64).repeat(2, 1, 1)
    views[1] += 1e-4 * randn(8, 16, seed=7, dtype=torch.float64)
    want = by_loops(views.float())[3]
    assert 1e-9 < want < 1e-7
    assert sk.contrastive_stats(views.float()).alignment.item() == pytest.approx(want, rel=5e-3)


def test_nothing_to_average_is_nan():
    alone = sk.contrastive_stats(randn(1, 4, 3), labels=torch.arange(4))
    assert [x.isnan().item() for x in alone] == [True, True, False, True, False]
    one_class = sk.contrastive_stats(randn(2, 4, 3), labels=torch.zeros(4, dtype=torch.int64))
    assert [x.isnan().item() for x in one_class] == [False, False, True, False, False]
    assert one_class.top1 == 1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_nan_out(bad, normalize):
    views = randn(2, 6, 3)
    views[1, 2, 0] = bad
    assert all(x.isnan() for x in sk.contrastive_stats(views, normalize=normalize))


def test_zero_rows_are_finite():
    views = randn(2, 6, 3)
    views[0, 0] = 0
    assert all(x.isfinite() for x in sk.contrastive_stats(views))


def test_rows_whose_similarities_underflow_are_not_retrieved():
    """Similarities below the smallest normal number are only rounding, so none counts as a retrieval."""
    h = 1e-34 * randn(3, 20, 58)
    assert sk.contrastive_stats(h)[0] == 0
    assert sk.contrastive_stats(1e30 * h)[0] > 0


def test_no_gradient():
    got = sk.contrastive_stats(randn(2, 6, 3).requires_grad_())
    assert not any(x.requires_grad for x in got)


def test_under_autocast_nothing_is_rounded():
    views = randn(2, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sk.contrastive_stats(views)
    assert_close(got, by_loops(views))


@pytest.mark.parametrize(
    ("views", "arguments", "error", "message"),
    [
        (torch.zeros(4, 3), {}, ValueError, "views"),
        (torch.zeros(1, 4, 3), {}, ValueError, "at least 2 views"),
        (torch.zeros(2, 1, 3), {}, ValueError, "at least 2 samples"),
        (torch.zeros(2, 0, 3), {}, ValueError, "non-empty"),
        (torch.zeros(2, 4, 0), {}, ValueError, "feature"),
        ([torch.zeros(4, 3), torch.zeros(4, 2)], {}, ValueError, "shape"),
        ([torch.zeros(4, 3), torch.zeros(4, 3).double()], {}, TypeError, "dtype"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), {}, TypeError, "views"),
        (torch.zeros(2, 4, 3), {"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels"),
        (torch.zeros(2, 4, 3), {"labels": torch.zeros(4)}, TypeError, "labels"),
        (torch.zeros(2, 4, 3), {"eps": 0}, ValueError, "eps"),
    ],
)
def test_bad_input(views, arguments, error, message):
    with pytest.raises(error, match=message):
        sk.contrastive_stats(views, **arguments)
