"""Test InfoNCE in numerically hard cases: low precision, near-zero loss, extreme scores, zero rows, NaN and Inf."""

from itertools import product

import pytest
import torch
from helpers import LOW_PRECISION, assert_within, compare_info_nce, randn, random_labels, run

from selfsup_kernels import info_nce_loss, spec
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES


@pytest.fixture
def impl(each_impl):
    return each_impl


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize("size", [(2, 129, 64), (3, 17, 33), (5, 20, 70)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_low_precision(impl, objective, size, temperature, dtype):
    compare_info_nce(impl, randn(*size, dtype=dtype), temperature, objective=objective)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_low_precision_labels_and_queue(impl, objective, dtype):
    views, queue = randn(2, 50, 32, dtype=dtype), randn(20, 32, dtype=dtype, seed=1)
    compare_info_nce(impl, views, objective=objective, labels=random_labels(50, 7), queue=queue)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_unnormalised(impl, dtype):
    compare_info_nce(impl, 0.2 * randn(2, 50, 32, dtype=dtype), 0.5, normalize=False)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradient_of_a_large_batch(impl, dtype):
    """With a mean over many anchors every weight is below fp16's smallest number, so weights must not be rounded."""
    compare_info_nce(impl, randn(2, 1500, 16, dtype=dtype), 0.5)


@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_large_losses_with_labels(impl, objective):
    """Losses of hundreds are right, although their exponentials overflow float32. With one class all negatives are in
    the queue, and the positives are far from each other."""
    views, queue, temperature = randn(2, 6, 4), randn(5, 4, seed=1), 0.002
    labels = torch.zeros(6, dtype=torch.int64)
    loss, grad, _ = run(info_nce_loss, views, temperature, objective=objective, labels=labels, queue=queue, impl=impl)
    assert loss > 80 or objective == "supcon_in"
    exact = torch.tensor(temperature).double()
    want = run(spec.info_nce_loss, views.double(), exact, objective=objective, labels=labels, queue=queue.double())
    floor = 16 * torch.finfo(torch.float32).eps / temperature**2
    assert_within("loss", loss, want[0], floor=floor * temperature)
    assert_within("grad", grad, want[1], floor=floor)


@pytest.mark.parametrize("temperature", [0.4, 0.2, 0.1])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_near_zero_loss(op_impl, objective, temperature):
    """Losses down to 1e-8 are right: positives are nearly identical, negatives opposite, and ``softmax - 1`` cancels.

    The bound does not refer to the eager float32 loss, which loses its digits here.
    """
    direction = randn(32, seed=3)
    views = torch.stack([direction, -direction]).expand(2, 2, 32) + 0.05 * randn(2, 2, 32, seed=4)
    got = run(info_nce_loss, views, temperature, objective=objective, impl=op_impl)
    exact = torch.tensor(temperature).double()
    want = run(spec.info_nce_loss, views.double(), exact, objective=objective)
    if objective != "decoupled":
        assert want[0] < 0.03
    assert_within("grad", got[1], want[1])
    assert_within("temperature", got[2], want[2])
    # The loss is a difference of scores of size 1 / temperature.
    assert_within("loss", got[0], want[0], floor=4 * torch.finfo(torch.float32).eps / temperature)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("positive", ["same", "opposite", "orthogonal"])
@pytest.mark.parametrize("temperature", [0.1, 0.0128, 0.01, 0.005, 0.002])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_negatives_opposite_to_the_anchor(op_impl, objective, temperature, positive, dtype):
    """With every negative at the lowest score, a sum of exponentials with a fixed reference underflows to zero."""
    direction = torch.zeros(24, dtype=torch.float64)
    direction[0] = 1
    views = -direction + 0.01 * randn(3, 19, 24, dtype=torch.float64)
    views[0, 5] = direction
    if positive == "same":
        views[1:, 5] = direction + 0.01 * randn(2, 24, dtype=torch.float64, seed=1)
    if positive == "orthogonal":
        views[1:, 5] = torch.roll(direction, 1)
    compare_info_nce(op_impl, views.to(dtype), temperature, objective=objective, cancels=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("temperature", [0.01, 0.005])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_negatives_opposite_with_labels_and_queue(op_impl, objective, temperature):
    direction = torch.zeros(24)
    direction[0] = 1
    views = -direction + 0.01 * randn(2, 19, 24)
    views[:, :2] += 2 * direction
    labels = torch.tensor([7, 7] + [3] * 17)
    queue = -direction + 0.01 * randn(9, 24, seed=1)
    for extra in ({"labels": labels, "queue": queue}, {"labels": labels}, {"queue": queue}):
        compare_info_nce(op_impl, views, temperature, objective=objective, cancels=True, **extra)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_identical_rows(impl, temperature, dtype):
    """The loss of equal rows is the logarithm of the number of columns at any temperature."""
    views = randn(1, 1, 16, dtype=dtype).expand(3, 10, 16)
    loss = info_nce_loss(views, temperature=temperature, impl=impl)
    assert_within("loss", loss, torch.tensor(29.0).double().log())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-12, 1e-6])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_rows(impl, objective, eps, dtype):
    views = randn(3, 9, 8, dtype=dtype)
    views[1, 4] = 0
    views[2, 4] = 0
    views[0, 1] = 0
    compare_info_nce(impl, views, objective=objective, eps=eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_below_the_floor_are_divided_by_it(impl, dtype):
    views = randn(2, 9, 8, dtype=dtype)
    views[:, :4] *= 1e-3
    compare_info_nce(impl, views, eps=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("zero", [slice(2, 3), slice(None)], ids=["one sample", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_rows_are_finite_in_every_dtype(impl, objective, zero, dtype):
    views = randn(2, 9, 8, dtype=dtype)
    views[:, zero] = 0
    for result in run(info_nce_loss, views, 0.07, objective=objective, impl=impl):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_length_of_the_rows_does_not_matter(impl, size, dtype):
    """Rows are right even if the squares of their elements leave fp16's range."""
    views = randn(2, 9, 8, dtype=torch.float32).to(dtype)
    scaled = (views.double() * size).to(dtype)
    compare_info_nce(impl, scaled)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_of_long_rows_that_are_not_normalised(op_impl, objective):
    """Scores of millions are right: they are so coarse that the backward must recompute exactly the same numbers."""
    views = 100 * randn(2, 64, 64)
    grad = run(info_nce_loss, views, 0.1, normalize=False, objective=objective, impl=op_impl)[1]
    want = run(spec.info_nce_loss, views.double(), 0.1, normalize=False, objective=objective)[1]
    assert_within("grad", grad, want)


def nonfinite(x):
    """Return for each element 0 (finite), 1 (NaN), 2 (+Inf) or 3 (-Inf)."""
    return x.isnan().int() + 2 * x.isposinf().int() + 3 * x.isneginf().int()


@pytest.mark.sanitize
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["views", "queue"])
@pytest.mark.parametrize(
    ("objective", "form"),
    [
        *product(OBJECTIVES, ["plain", "core", "unnormalised"]),
        *product(LABEL_OBJECTIVES, ["labels", "unnormalised labels"]),
    ],
)
def test_nan_and_inf_spread_as_in_the_dense_loss(op_impl, objective, form, where, value):
    views, queue = randn(3, 70, 8), randn(5, 8, seed=1)
    (views[1] if where == "views" else queue)[2, 3] = value
    arguments = {
        "objective": objective,
        "queue": queue if where == "queue" else None,
        "normalize": "unnormalised" not in form,
    }
    if form == "core":
        arguments["core_view"] = 0
    if "labels" in form:
        arguments["labels"] = random_labels(70, 12)
    upstream = torch.ones(3, 70)
    got = run(info_nce_loss, views, 0.1, upstream, reduction="none", impl=op_impl, **arguments)
    want = run(spec.info_nce_loss, views, 0.1, upstream, reduction="none", **arguments)
    assert not want[0].isfinite().all()
    assert torch.equal(nonfinite(got[0]), nonfinite(want[0]))
    if "unnormalised" in form:
        # Autograd spreads 0 * Inf further than the equations do. A row with a non-finite loss has no finite gradient.
        assert not got[1][~want[0].isfinite()].isfinite().all(-1).any()
    else:
        # With core view 0, view 2 never meets view 1: at most it gets 0 * NaN, if that product is computed at all.
        met = slice(0, 2) if form == "core" and where == "views" else slice(None)
        assert torch.equal(got[1][met].isfinite(), want[1][met].isfinite())
    assert not got[2].isfinite()
    finite = want[0].isfinite()
    assert_within("finite losses", got[0][finite], want[0][finite].double())


@pytest.mark.parametrize("upstream", [1.0, 1e-4, 1e-10, 1e6])
def test_similar_rows_under_a_small_upstream_gradient(impl, upstream):
    """Near collapse at a low temperature the negatives' weights are tiny; a loss weight must not make them zero."""
    views = randn(1, 1, 32) + 0.02 * randn(2, 300, 32, seed=1)
    _, grad, _ = run(info_nce_loss, views, 0.01, torch.tensor(upstream), impl=impl)
    _, want, _ = run(spec.info_nce_loss, views.double(), 0.01, torch.tensor(upstream))
    _, eager, _ = run(spec.info_nce_loss, views, 0.01, torch.tensor(upstream))
    assert_within("grad", grad, want, eager)


def test_rows_whose_squares_overflow(impl):
    views = torch.zeros(2, 3, 4)
    views[0, 0, 0] = 3e19
    views[1, :, 0] = torch.tensor([1.0, -1.0, -2.0])
    views[0, 1:, 1] = 1
    got = info_nce_loss(views, normalize=False, reduction="none", impl=impl)
    want = spec.info_nce_loss(views.double(), normalize=False, reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
