"""Compare InfoNCE's values and gradients for six objectives with the dense loss and a brute force, in float64."""

import pytest
import torch
from helpers import (
    PAIRED_OBJECTIVES,
    POOLED_OBJECTIVES,
    assert_within,
    check_against_loops,
    compare_info_nce,
    randn,
    random_labels,
    run,
)

from selfsup_kernels import info_nce_loss, spec
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES


@pytest.fixture
def impl(each_impl):
    return each_impl


TEMPERATURES = [0.5, 0.1, 0.07, 0.02, 0.01, 0.005]
SIZES = [(2, 2, 1), (2, 3, 1030), (3, 17, 5), (5, 2, 64), (2, 129, 128), (3, 129, 7), (5, 129, 33), (2, 300, 1030)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_views", [2, 3, 5])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_temperatures(impl, objective, temperature, num_views, dtype):
    views = randn(num_views, 17, 33, dtype=dtype)
    compare_info_nce(impl, views, temperature, objective=objective)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sizes(impl, objective, size, dtype):
    views = randn(*size, dtype=dtype, seed=1)
    # Rows of one feature are +-1 after normalisation, and their exact gradient is zero: the result is the rounding of
    # terms of the size of the scale.
    floor = 16 * torch.finfo(dtype).eps / 0.1 if size[-1] == 1 else 0.0
    floor *= (1 / views.abs().min()).item() if size[-1] == 1 else 0.0
    compare_info_nce(impl, views, floor=floor, objective=objective)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("dim", [128, 129])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_either_way_of_multiplying(impl, objective, dim, temperature, dtype):
    """On the CPU plain loops multiply 8 rows of 128 features, and a matrix library those of 129."""
    views, queue = randn(2, 4, dim, dtype=dtype, seed=1), randn(8, dim, dtype=dtype, seed=2)
    compare_info_nce(impl, views, temperature, objective=objective)
    compare_info_nce(impl, views, temperature, objective=objective, queue=queue)
    if objective in LABEL_OBJECTIVES:
        compare_info_nce(impl, views, temperature, objective=objective, queue=queue, labels=random_labels(4, 2))


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
@pytest.mark.parametrize("num_views", [2, 3, 5])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_against_loops(impl, objective, num_views, temperature):
    views = randn(num_views, 3, 4, dtype=torch.float64, seed=2)
    check_against_loops(impl, views, temperature, objective=objective)


@pytest.mark.parametrize("core_view", [0, 2])
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_core_view_and_queue_against_loops(impl, objective, core_view, with_queue):
    views = randn(4, 3, 5, dtype=torch.float64, seed=3)
    queue = randn(6, 5, dtype=torch.float64, seed=4) if with_queue else None
    check_against_loops(impl, views, 0.2, objective=objective, core_view=core_view, queue=queue)


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_labels_against_loops(impl, objective, with_queue, num_views):
    if num_views == 1 and objective not in POOLED_OBJECTIVES:
        return
    views = randn(num_views, 6, 5, dtype=torch.float64, seed=5)
    queue = randn(4, 5, dtype=torch.float64, seed=6) if with_queue else None
    labels = torch.tensor([4, -1, 4, 9, -1, 4])
    check_against_loops(impl, views, 0.2, objective=objective, labels=labels, queue=queue)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unnormalised_against_loops(impl, objective):
    check_against_loops(impl, randn(3, 4, 5, dtype=torch.float64), 1.5, objective=objective, normalize=False)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [1, 4, 40, 10**6])
@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_labels(impl, objective, num_views, classes, dtype):
    """Labels are right with one class (only the queue has negatives), few, many, and one class per sample."""
    if num_views == 1 and objective not in POOLED_OBJECTIVES:
        return
    views = randn(num_views, 65, 16, dtype=dtype)
    labels = random_labels(65, classes)
    queue = randn(10, 16, dtype=dtype, seed=1) if classes == 1 else None
    # With one view and one class per sample there are no positives: loss and gradient are exactly zero.
    compare_info_nce(impl, views, objective=objective, labels=labels, queue=queue)


@pytest.mark.parametrize("objective", ["supcon_out", "supcon_in", "per_positive"])
def test_one_class_without_negatives(impl, objective):
    views = randn(2, 9, 8, dtype=torch.float64)
    compare_info_nce(impl, views, objective=objective, labels=torch.zeros(9, dtype=torch.int64), floor=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_label_dtypes(impl, dtype):
    views, labels = randn(2, 12, 8), torch.arange(12) % 5
    got = info_nce_loss(views, labels=labels.to(dtype), impl=impl)
    assert torch.equal(got, info_nce_loss(views, labels=labels, impl=impl))


def test_one_class_per_sample_equals_no_labels(impl):
    views = randn(3, 20, 8, dtype=torch.float64)
    for objective in LABEL_OBJECTIVES:
        got = run(info_nce_loss, views, 0.1, labels=torch.randperm(20), objective=objective, impl=impl)
        want = run(info_nce_loss, views, 0.1, objective=objective, impl=impl)
        for name, ours, other in zip(("loss", "grad", "temperature"), got, want, strict=True):
            assert_within(name, ours, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("core_view", [None, 1])
@pytest.mark.parametrize("length", [1, 7, 500])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_queue(impl, objective, length, core_view, dtype):
    views, queue = randn(3, 33, 16, dtype=dtype), randn(length, 16, dtype=dtype, seed=1)
    compare_info_nce(impl, views, objective=objective, queue=queue, core_view=core_view)


def test_queue_gets_no_gradient_and_allows_a_batch_of_one(impl):
    views = randn(2, 1, 8, dtype=torch.float64)
    queue = randn(5, 8, dtype=torch.float64, seed=1).requires_grad_()
    compare_info_nce(impl, views, queue=queue.detach())
    loss = info_nce_loss(views.requires_grad_(), queue=queue, impl=impl)
    loss.backward()
    assert queue.grad is None
    assert views.grad.isfinite().all()


@pytest.mark.parametrize("core_view", [0, 1, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_core_view(impl, objective, core_view):
    compare_info_nce(impl, randn(5, 33, 16), objective=objective, core_view=core_view)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_core_view_has_no_effect_with_two_views(impl, objective):
    views = randn(2, 9, 8)
    for core_view in (0, 1):
        got = info_nce_loss(views, objective=objective, core_view=core_view, impl=impl)
        assert torch.equal(got, info_nce_loss(views, objective=objective, impl=impl))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("size", "temperature"), [(1.0, 1.0), (1.0, 0.05), (30.0, 2.0), (1e-3, 0.1)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unnormalised(impl, objective, size, temperature, dtype):
    views = size * randn(3, 33, 12, dtype=dtype, seed=7)
    compare_info_nce(impl, views, temperature, objective=objective, normalize=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reductions(impl, objective, reduction, dtype):
    views = randn(3, 20, 12, dtype=dtype)
    upstream = randn(3, 20, dtype=dtype, seed=1) if reduction == "none" else torch.tensor(-1.75)
    got = run(info_nce_loss, views, 0.1, upstream, objective=objective, reduction=reduction, impl=impl)
    arguments = {"objective": objective, "reduction": reduction}
    truth = run(spec.info_nce_loss, views.double(), torch.tensor(0.1, dtype=dtype).double(), upstream, **arguments)
    for name, ours, want in zip(("loss", "grad", "temperature"), got, truth, strict=True):
        assert_within(name, ours, want)


def test_upstream_gradient_may_be_expanded_zero_or_partial(impl):
    """Upstream gradients of ``loss.mean()``, a mask and an unused anchor are handled."""
    views = randn(2, 10, 6, dtype=torch.float64)
    mask = torch.zeros(2, 10, dtype=torch.float64)
    mask[1, 3] = 1
    for upstream in (
        torch.tensor(0.5, dtype=torch.float64).expand(2, 10),
        mask,
        torch.zeros_like(mask),
        mask.T.contiguous().T,
    ):
        got = run(info_nce_loss, views, 0.1, upstream, reduction="none", impl=impl)
        want = run(spec.info_nce_loss, views, 0.1, upstream, reduction="none")
        assert_within("grad", got[1], want[1])
        assert_within("temperature", got[2], want[2])


def test_two_views_have_the_textbook_values(impl):
    """NT-Xent and CLIP equal a cross entropy over the similarity matrix."""
    views = randn(2, 12, 8, dtype=torch.float64)
    z = torch.nn.functional.normalize(views, dim=-1)
    rows = z.reshape(24, 8)
    scores = (rows @ rows.T / 0.3).fill_diagonal_(-torch.inf)
    nt_xent = torch.nn.functional.cross_entropy(scores, (torch.arange(24) + 12) % 24)
    assert_within("supcon_out", info_nce_loss(views, temperature=0.3, impl=impl), nt_xent)
    target, scores = torch.arange(12), z[0] @ z[1].T / 0.3
    clip = (torch.nn.functional.cross_entropy(scores, target) + torch.nn.functional.cross_entropy(scores.T, target)) / 2
    assert_within("cross_view", info_nce_loss(views, temperature=0.3, objective="cross_view", impl=impl), clip)


def test_paired_objectives_agree_at_two_views(impl):
    views = randn(2, 12, 8, dtype=torch.float64)
    want = info_nce_loss(views, impl=impl)
    for objective in ("supcon_in", "per_positive", "pairwise"):
        assert_within(objective, info_nce_loss(views, objective=objective, impl=impl), want)
    assert PAIRED_OBJECTIVES == ["pairwise", "cross_view"]
