"""Test the BYOL loss: values and gradients against the dense loss in float64, and its conventions in edge cases."""

import pytest
import torch
from helpers import LOW_PRECISION, assert_within, randn

from selfsup_kernels import byol_loss, spec


@pytest.fixture
def impl(each_impl):
    return each_impl


SIZES = [(2, 2, 1), (2, 1, 1030), (3, 17, 5), (5, 129, 33), (2, 129, 128), (3, 300, 1030), (2, 3, 257)]
pytestmark = pytest.mark.sanitize


def run(function, predictions, targets, upstream=None, **arguments):
    predictions = predictions.detach().clone().requires_grad_()
    loss = function(predictions, targets, **arguments)
    (grad,) = torch.autograd.grad(loss, predictions, torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return loss.detach(), grad


def compare(impl, predictions, targets, upstream=None, floor=0.0, **arguments):
    dtype = predictions.dtype
    got = run(byol_loss, predictions, targets, upstream, impl=impl, **arguments)
    want = run(spec.byol_loss, predictions.double(), targets.double(), upstream, **arguments)
    eager = run(spec.byol_loss, predictions, targets, upstream, **arguments)
    for name, ours, truth, yardstick in zip(("loss", "grad"), got, want, eager, strict=True):
        assert ours.dtype == dtype
        assert_within(name, ours, truth, None if dtype == torch.float64 else yardstick, floor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients(impl, reduction, size, dtype):
    predictions, targets = randn(*size, dtype=dtype), randn(*size, dtype=dtype, seed=1)
    upstream = randn(*size[:2], seed=2) if reduction == "none" else torch.tensor(-0.75)
    # With one feature the cosine is +-1, so the gradient is only the rounding of 2 - 2 and 1 / |p|.
    floor = 0.0
    if size[-1] == 1:
        floor = 8 * torch.finfo(dtype).eps * upstream.abs().max().item() / predictions.abs().min().item()
    compare(impl, predictions, targets, upstream, floor, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("size", [(1, 8), (130, 33), (7, 1030)], ids=str)
def test_pairs(impl, size, dtype):
    predictions, targets = randn(*size, dtype=dtype), randn(*size, dtype=dtype, seed=1)
    compare(impl, predictions, targets, randn(size[0], seed=2), reduction="none")
    compare(impl, predictions, targets)


@pytest.mark.parametrize("num_views", [2, 3, 5])
def test_against_loops(impl, num_views):
    """The loss equals its definition term by term; at two views, the mean of the paper's two symmetrised terms."""
    p, t = randn(num_views, 4, 6, dtype=torch.float64), randn(num_views, 4, 6, dtype=torch.float64, seed=1)
    want = torch.empty(num_views, 4, dtype=torch.float64)
    for u in range(num_views):
        for a in range(4):
            terms = [
                2 - 2 * (p[u, a] @ t[v, a]) / (p[u, a] @ p[u, a]).sqrt() / (t[v, a] @ t[v, a]).sqrt()
                for v in range(num_views)
                if v != u
            ]
            want[u, a] = sum(terms) / len(terms)
    assert_within("loss", byol_loss(p, t, reduction="none", impl=impl), want)
    assert_within("dense", spec.byol_loss(p, t, reduction="none"), want)
    assert_within("mean", byol_loss(list(p), list(t), impl=impl), want.mean())
    assert_within("sum", byol_loss(list(p), t, reduction="sum", impl=impl), want.sum())


def test_a_stack_and_a_sequence_may_meet(impl):
    p, t = randn(3, 5, 4, dtype=torch.float64), randn(3, 5, 4, dtype=torch.float64, seed=1)
    loss, grad = run(spec.byol_loss, p, t)
    for predictions, targets in ((p, list(t)), (list(p), t)):
        leaves = [x.clone().requires_grad_() for x in ([p] if predictions is p else predictions)]
        got = byol_loss(leaves[0] if predictions is p else leaves, targets, impl=impl)
        got.backward()
        assert_within("loss", got, loss)
        assert_within("grad", torch.stack([x.grad for x in leaves]).view(3, 5, 4), grad)


def test_two_views_are_the_mean_of_two_pairs(impl):
    p, t = randn(2, 9, 6, dtype=torch.float64), randn(2, 9, 6, dtype=torch.float64, seed=1)
    pairs = [byol_loss(p[0], t[1], impl=impl), byol_loss(p[1], t[0], impl=impl)]
    assert_within("loss", byol_loss(p, t, impl=impl), sum(pairs) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 0.5])
def test_eps_is_the_floor_of_the_norm(impl, eps, dtype):
    """Below eps the norm is a constant, and the gradient has no projection."""
    predictions, targets = randn(3, 9, 6, dtype=dtype), randn(3, 9, 6, dtype=dtype, seed=1)
    predictions[0, 0] = 0
    predictions[1, 1] *= eps / 100
    targets[2, 2] = 0
    targets[1, 3] *= eps / 100
    compare(impl, predictions, targets, eps=eps)
    got = run(byol_loss, predictions, targets, reduction="none", eps=eps, impl=impl)
    assert got[0][0, 0] == 2


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_zero_rows_are_finite(impl, dtype):
    for p, t in [(0, 1), (1, 0), (0, 0)]:
        loss, grad = run(byol_loss, p * randn(2, 5, 8, dtype=dtype), t * randn(2, 5, 8, dtype=dtype), impl=impl)
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_length_of_the_rows_does_not_matter(impl, size, dtype):
    predictions, targets = (size * randn(2, 9, 8)).to(dtype), (size * randn(2, 9, 8, seed=1)).to(dtype)
    compare(impl, predictions, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_zero_loss(impl, dtype):
    predictions = randn(2, 17, 64, dtype=dtype)[:1].expand(2, -1, -1)
    targets = predictions + 1e-3 * randn(2, 17, 64, dtype=dtype, seed=1)
    # 2 - 2 cos has an absolute error of eps; the gradient is the difference of two unit rows over the length.
    compare(impl, predictions, targets, floor=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["predictions", "targets"])
def test_nan_and_inf_spread_as_in_the_dense_loss(impl, where, value):
    """A prediction row spoils itself; a target row spoils the other views of its sample and, since ours sums over the
    targets, its own view. All other rows are right, and every row that the dense loss spoils is not finite."""
    p, t = randn(3, 20, 40), randn(3, 20, 40, seed=1)
    (p if where == "predictions" else t)[1, 4, 37] = value
    got = run(byol_loss, p, t, reduction="none", impl=impl)
    want = run(spec.byol_loss, p, t, reduction="none")
    other = torch.ones(3, 20, dtype=torch.bool)
    other[1 if where == "predictions" else slice(None), 4] = False
    for ours, truth in zip(got, want, strict=True):
        assert not truth.isfinite().all()
        assert not (ours.isfinite() & ~truth.isfinite()).any()
        assert ours[other].isfinite().all()
        assert_within("finite part", ours[other], truth[other].double())


def test_targets_never_receive_a_gradient(impl):
    for shape in [(4, 8), (2, 4, 8)]:
        p, t = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
        byol_loss(p, t, impl=impl).backward()
        assert t.grad is None
        assert p.grad.any()
        assert not byol_loss(p.detach(), t, impl=impl).requires_grad
    shared = randn(2, 4, 8).requires_grad_()
    byol_loss(shared, shared, impl=impl).backward()
    as_target = randn(2, 4, 8)
    alone = shared.detach().clone().requires_grad_()
    byol_loss(alone, as_target, impl=impl).backward()
    assert torch.equal(shared.grad, alone.grad)


def test_one_sample_is_enough(impl):
    compare(impl, randn(2, 1, 8), randn(2, 1, 8, seed=1))


@pytest.mark.sanitize
@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1e19, 1e19), torch.float32),
        ((1e30, 1e30), torch.bfloat16),
        ((1e-22, 1e-22), torch.float32),
        # Around both ends of the range in which the CPU multiplies rows without scaling them first.
        ((1e18, 1e18), torch.float32),
        ((1e-14, 1e-14), torch.float32),
        ((1e18, 1e-14), torch.float32),
        ((1e18, 1e-17), torch.float32),
        ((1e-17, 1e19), torch.float32),
    ],
)
def test_long_and_short_rows(impl, num_views, sizes, dtype):
    """Losses are right although the product of two norms leaves the range of float32."""
    p, t = (randn(num_views, 6, 40, seed=seed).mul(sizes[seed]).to(dtype) for seed in (0, 1))
    if num_views == 1:
        p, t = p[0], t[0]
    loss = byol_loss(p, t, eps=1e-30, reduction="none", impl=impl)
    want = spec.byol_loss(p.double(), t.double(), eps=1e-30, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_targets_made_under_inference_mode(impl):
    p = randn(2, 5, 8).requires_grad_()
    with torch.inference_mode():
        t = randn(2, 5, 8, seed=1)
    byol_loss(p, t, impl=impl).backward()
    want = torch.autograd.grad(spec.byol_loss(p, t.clone()), p)[0]
    torch.testing.assert_close(p.grad, want)
