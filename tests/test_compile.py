"""torch.compile without graph breaks, autocast, and the modes of autograd."""

import os

import pytest
import torch
from helpers import LOW_PRECISION, assert_within, randn

from selfsup_kernels import byol_loss, info_nce_loss

# Inductor allocates with the poisoned memory switched off.
pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_compiles(function, *inputs, backend="aot_eager", exact=True):
    """Forward and backward in one graph each, and the values of the eager call."""
    want = with_gradients(function, *inputs)
    got = with_gradients(torch.compile(function, fullgraph=True, backend=backend), *inputs)
    for ours, eager in zip(got, want, strict=True):
        assert ours.dtype == eager.dtype
        assert ours.stride() == eager.stride()
        assert torch.equal(ours, eager) if exact else torch.allclose(ours, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["plain", "labels", "queue", "core", "none", "duplicates", "labels across views"])
def test_info_nce_compiles(op_impl, case):
    arguments = {
        "plain": {},
        "labels": {"labels": torch.arange(12) % 5, "objective": "supcon_in"},
        "queue": {"queue": randn(7, 8), "objective": "cross_view"},
        "duplicates": {"duplicates": torch.arange(12) % 5, "logq": randn(12, seed=3)},
        "labels across views": {"labels": torch.arange(12) % 5, "objective": "cross_view", "logq": randn(12, seed=3)},
        "core": {"core_view": 1, "objective": "pairwise"},
        "none": {"normalize": False, "objective": "per_positive", "temperature": 2.0},
    }[case]
    assert_compiles(lambda x: info_nce_loss(x, impl=op_impl, **arguments), randn(3, 12, 8))


def test_list_of_views_compiles(op_impl):
    assert_compiles(lambda x, y: info_nce_loss([x, y], impl=op_impl), *randn(2, 12, 8).unbind(0))


def test_learnable_temperature_compiles(op_impl):
    def loss(x, log_scale):
        return info_nce_loss(x, temperature=(-log_scale).exp(), reduction="none", impl=op_impl).square().mean()

    assert_compiles(loss, randn(2, 12, 8), torch.tensor(2.0))


def test_byol_compiles(op_impl):
    target = randn(2, 12, 8, seed=1)
    assert_compiles(lambda p: byol_loss(p, target, impl=op_impl), randn(2, 12, 8))
    assert_compiles(lambda p: byol_loss(p, target[0], reduction="none", impl=op_impl).sum(), randn(12, 8))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_compiles(op_impl, dtype):
    assert_compiles(lambda x: info_nce_loss(x, impl=op_impl), randn(2, 12, 8, dtype=dtype))


@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="what PyTorch's inductor writes does not compile there"
)
def test_inductor(impl):
    """The default backend compiles a network with the losses inside."""
    weight, target = randn(8, 8, seed=1), randn(2, 12, 8, seed=2)

    def loss(x, w, t):
        z = torch.relu(x @ w)
        return info_nce_loss(z, temperature=t.exp(), impl=impl) + byol_loss(z, target, impl=impl)

    assert_compiles(loss, randn(2, 12, 8), weight, torch.tensor(-1.0), backend="inductor", exact=False)


@pytest.mark.parametrize("loss", ["stacked views", "views in a list", "byol"])
def test_batch_size_may_change(op_impl, loss):
    def run(x):
        if loss == "byol":
            return byol_loss(x, x.detach().flip(0), impl=op_impl)
        return info_nce_loss(x if loss == "stacked views" else list(x.unbind(0)), impl=op_impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 12, 70):
        x = randn(2, batch, 8)
        for ours, want in zip(with_gradients(compiled, x), with_gradients(run, x), strict=True):
            assert torch.equal(ours, want)


def test_bad_input_is_refused_while_compiling(impl):
    with pytest.raises(Exception, match="temperature: expected"):
        torch.compile(lambda x: info_nce_loss(x, temperature=-1.0, impl=impl), backend="eager")(randn(2, 4, 8))


def test_autocast_inside_compile(impl):
    def loss(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return info_nce_loss(x @ w, impl=impl)

    assert_compiles(loss, randn(2, 12, 8), randn(8, 8, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_autocast_gives_float32_without_upcasting(impl, dtype, monkeypatch):
    """The embeddings reach the op as they are; the loss is what the loss of the upcast embeddings is."""
    from selfsup_kernels.core import ops

    seen, original = [], ops.overload

    def spy(name, chosen):
        def call(first, *rest):
            seen.append(first[0].dtype if isinstance(first, (list, tuple)) else None)
            return original(name, chosen)(first, *rest)

        return call

    monkeypatch.setattr(ops, "overload", spy)
    x = randn(2, 12, 8, dtype=dtype).requires_grad_()
    target = randn(2, 12, 8, dtype=dtype, seed=1)
    for function in (info_nce_loss, lambda v, impl: byol_loss(v, target.to(v), impl=impl)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, impl=impl)
        (grad,) = torch.autograd.grad(loss, x)
        assert seen[0] == dtype
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        assert function(x, impl=impl).dtype == dtype
        assert_within("loss", loss, function(x.detach().double(), impl=impl))


def test_mixed_dtypes_under_autocast(impl):
    x, y = randn(2, 12, 8).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = info_nce_loss([x.requires_grad_(), y.bfloat16().requires_grad_()], impl=impl)
        pair = byol_loss(x, y.bfloat16(), impl=impl)
        stacked = byol_loss(torch.stack([x, y]), torch.stack([y, x]).bfloat16(), impl=impl)
        with_queue = info_nce_loss([x, y], queue=randn(5, 8).bfloat16(), impl=impl)
    assert mixed.dtype == pair.dtype == stacked.dtype == with_queue.dtype == torch.float32
    assert_within("mixed", mixed, info_nce_loss([x.double(), y.bfloat16().double()], impl=impl))
    assert_within("pair", pair, byol_loss(x.double(), y.bfloat16().double(), impl=impl))
    mixed.backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("forward", [True, False], ids=["forward too", "backward alone"])
@pytest.mark.parametrize("objective", ["supcon_out", "pairwise", "cross_view", "decoupled"])
def test_backward_inside_autocast(impl, objective, forward):
    def loss(x):
        queue = randn(5, 8, seed=1)
        return info_nce_loss(x, queue=queue, objective=objective, impl=impl) + byol_loss(x, x.flip(0), impl=impl)

    x = randn(3, 12, 8)
    (want,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
    with torch.autocast("cpu", torch.bfloat16):
        value.backward()
    # Under autocast the reference's op does what autograd does without.
    exact = {} if impl == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(leaf.grad, want, **exact)


def test_jit_trace(impl):
    """The traced loss is right for another batch size too."""
    x, y = randn(2, 12, 8), randn(2, 18, 8, seed=1)

    def loss(x):
        return info_nce_loss(x, impl=impl) + byol_loss(x, x.flip(0), impl=impl)

    torch.testing.assert_close(torch.jit.trace(loss, x)(y), loss(y))


@pytest.mark.parametrize("threads", [1, 2])
def test_without_gradients(impl, threads):
    torch.set_num_threads(threads)
    x, y = randn(2, 65, 8), randn(2, 65, 8, seed=1)
    want = info_nce_loss(x, impl=impl), byol_loss(x, y, impl=impl)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = info_nce_loss(x.clone(), impl=impl), byol_loss(x.clone(), y.clone(), impl=impl)
        assert not got[0].requires_grad
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_graph_may_be_kept_and_run_again(impl):
    x = randn(2, 12, 8).requires_grad_()
    loss = info_nce_loss(x, impl=impl)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def test_create_graph_without_a_second_derivative(impl):
    """The first derivative may be taken with ``create_graph=True``, as some trainers always do."""
    x = randn(2, 12, 8).requires_grad_()
    want = torch.autograd.grad(info_nce_loss(x, impl=impl), x)[0]
    got = torch.autograd.grad(info_nce_loss(x, impl=impl), x, create_graph=True)[0]
    assert torch.equal(got, want)


def test_activation_checkpointing(impl):
    def loss(v):
        return info_nce_loss(v, impl=impl)

    x = randn(2, 12, 8).requires_grad_()
    want = torch.autograd.grad(loss(x), x)[0]
    again = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], want)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sizes_that_change_between_calls(impl, reduction):
    """The gradient of ``sum`` is expanded: no size may come from its strides."""
    loss = torch.compile(
        lambda views, queue: info_nce_loss(views, queue=queue, reduction=reduction, impl=impl).sum(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for num_views, batch, rows in ((2, 8, 4), (3, 9, 4), (3, 5, 11), (2, 16, 1)):
        views = [v.requires_grad_() for v in randn(num_views, batch, 6)]
        queue = randn(rows, 6, seed=1)
        got = torch.autograd.grad(loss(views, queue), views)
        want = torch.autograd.grad(info_nce_loss(views, queue=queue, reduction=reduction, impl=impl).sum(), views)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)
