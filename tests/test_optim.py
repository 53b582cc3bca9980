"""Test the fused optimizers with an EMA's target network: values, state and conventions equal torch.optim's."""

import copy
import math
import warnings

import pytest
import torch
from helpers import randn
from optim_cases import CASE_IDS, CASES, Weights, average_of, compare, distance, set_grads
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.core import backends, ops

PAIRS = [(sk.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (sk.optim.AdamW, torch.optim.AdamW, {})]
PAIRS_IDS = ["SGD", "AdamW"]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "arguments"), CASES, ids=CASE_IDS)
def test_the_step_is_torchs(impl, ours, theirs, arguments, dtype):
    compare(
        impl, torch.device("cpu"), ours, theirs, arguments, dtype, max(dtype, torch.float32, key=lambda d: d.itemsize)
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("target_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_pair_of_dtypes(impl, dtype, target_dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning for a target of low precision
        for ours, theirs, arguments in PAIRS:
            compare(impl, torch.device("cpu"), ours, theirs, arguments, dtype, target_dtype, steps=2)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
def test_one_step_is_a_step_and_an_update(impl, ours, theirs, arguments, buffers):
    """A fused step also averages frozen parameters, ones without a gradient or an optimizer, and buffers."""
    model = Weights()
    twin = copy.deepcopy(model)
    averages = [average_of(m, buffers=buffers, impl=impl) for m in (model, twin)]
    mine = ours(list(model.parameters())[:-1], ema=averages[0], impl=impl, **arguments)
    torchs = theirs(list(twin.parameters())[:-1], **arguments)
    for step in range(3):
        for m in (model, twin):
            set_grads(m, step)
            m.weights[0].grad = m.weights[-1].grad = None
            m.weights[1].requires_grad_(False).grad = None
            m.running.add_(1)
            m.count.add_(1)
        momentum = None if step < 2 else torch.tensor(0.25)
        mine.step(momentum=momentum)
        torchs.step()
        averages[1].update(momentum)
        for (name, got), want in zip(averages[0].state_dict().items(), averages[1].state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
def test_groups_and_schedulers(impl, ours, theirs, arguments):
    models = [Weights(torch.float64) for _ in range(2)]
    optimizers, schedules = [], []
    for make, m in zip((lambda g, **k: ours(g, impl=impl, **k), theirs), models, strict=True):
        w = list(m.parameters())
        optimizers.append(make([{"params": w[:3]}, {"params": w[3:], "weight_decay": 0.3, "lr": 0.05}], **arguments))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], 5))
    for step in range(5):
        for m, o, s in zip(models, optimizers, schedules, strict=True):
            set_grads(m, step)
            o.step()
            s.step()
        assert distance(models[0].parameters(), models[1].parameters()) < 1e-12 * 100


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
@pytest.mark.parametrize("direction", ["to torch", "from torch", "to ours"])
def test_state_dicts_go_both_ways(impl, ours, theirs, arguments, direction):
    makers = {"ours": lambda p: ours(p, impl=impl, **arguments), "torch": lambda p: theirs(p, **arguments)}
    first, second = {"to torch": ("ours", "torch"), "from torch": ("torch", "ours"), "to ours": ("ours", "ours")}[
        direction
    ]
    model = Weights(torch.float64)
    optimizer = makers[first](model.parameters())
    for step in range(2):
        set_grads(model, step)
        optimizer.step()
    other = copy.deepcopy(model)
    successor = makers[second](other.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    successor.load_state_dict(state)
    assert successor.state_dict().keys() == optimizer.state_dict().keys()
    for step in range(2, 4):
        for m, o in ((model, optimizer), (other, successor)):
            set_grads(m, step)
            o.step()
    assert distance(other.parameters(), model.parameters()) < 1e-12 * 100


def lars_step(p, g, buffer, lr, momentum, decay, trust, eps):
    """LARS (arXiv:1708.03888) as in lightly, in loops over numbers."""
    p_norm, g_norm = math.sqrt(sum(x * x for x in p)), math.sqrt(sum(x * x for x in g))
    if decay != 0 and p_norm != 0 and g_norm != 0:
        rate = trust * p_norm / (g_norm + decay * p_norm + eps)
        g = [rate * (y + decay * x) for x, y in zip(p, g, strict=True)]
    buffer = g if buffer is None else [momentum * b + y for b, y in zip(buffer, g, strict=True)]
    return [x - lr * b for x, b in zip(p, buffer, strict=True)], buffer


@pytest.mark.parametrize("decay", [0.0, 0.04])
def test_lars_against_loops(impl, decay):
    starts = [
        randn(50, dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64),
        randn(6, dtype=torch.float64, seed=3),
    ]
    params = [nn.Parameter(x.clone()) for x in starts]
    optimizer = sk.optim.LARS(params, lr=0.3, momentum=0.9, weight_decay=decay, trust_coefficient=0.02, impl=impl)
    expected, buffers = [x.tolist() for x in starts], [None] * 3
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn(len(p), dtype=torch.float64, seed=10 * step + i) * (i != 2)  # the last one's norm is 0
            result = lars_step(expected[i], p.grad.tolist(), buffers[i], 0.3, 0.9, decay, 0.02, 1e-8)
            expected[i], buffers[i] = result
        optimizer.step()
        for p, want in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_lars_groups_and_state(impl):
    model = Weights()
    params = list(model.parameters())
    ema = average_of(model, impl=impl)
    groups = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "trust_coefficient": 0.5}]
    optimizer = sk.optim.LARS(groups, lr=0.1, momentum=0.9, weight_decay=1e-3, ema=ema, impl=impl)
    set_grads(model, 0)
    before = [t.clone() for t in ema.module.parameters()]
    optimizer.step()
    sk.ema_update_(before, params, ema.momentum)
    for got, want in zip(ema.module.parameters(), before, strict=True):
        torch.testing.assert_close(got, want)
    assert [g["trust_coefficient"] for g in optimizer.param_groups] == [0.001, 0.5]
    again = sk.optim.LARS(groups, lr=0.1, impl=impl)
    again.load_state_dict(optimizer.state_dict())
    assert [g["trust_coefficient"] for g in again.param_groups] == [0.001, 0.5]
    plain = torch.optim.SGD(params, lr=0.1)
    again = sk.optim.LARS(params, lr=0.1, trust_coefficient=0.7, impl=impl)
    again.load_state_dict(plain.state_dict())
    assert again.param_groups[0]["trust_coefficient"] == 0.7
    again.step()


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
def test_layouts_of_all_kinds(impl, ours, theirs, arguments):
    """Gradients, targets and states whose memory order differs from the parameter's, and a parameter with gaps."""
    base = randn(6, 8, dtype=torch.float64)

    def make():
        model = nn.Module()
        model.a = nn.Parameter(base.clone())
        model.gaps = nn.Parameter(base.clone()[:, ::2])
        model.image = nn.Parameter(base.clone().view(2, 3, 4, 2).to(memory_format=torch.channels_last))
        return model

    model, twin = make(), make()
    ema = average_of(model, dtype=None, impl=impl)
    ema.module.a.data = ema.module.a.data.t().contiguous().t()
    ema.module.image.data = ema.module.image.data.contiguous()
    before = [t.clone() for t in ema.module.parameters()]
    optimizer, torchs = (
        ours(model.parameters(), ema=ema, impl=impl, **arguments),
        theirs(twin.parameters(), **arguments),
    )
    for step in range(2):
        for m in (model, twin):
            set_grads(m, step)
            m.a.grad = m.a.grad.t().contiguous().t()
            m.image.grad = m.image.grad.contiguous()
        optimizer.step()
        torchs.step()
        sk.ema_update_(before, list(model.parameters()), ema.momentum)
    assert distance(model.parameters(), twin.parameters()) < 1e-12
    assert distance(ema.module.parameters(), before) < 1e-12


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
def test_lr_as_a_tensor(impl, ours, theirs, arguments):
    models = [Weights(torch.float64) for _ in range(2)]
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizers = [
        ours(models[0].parameters(), impl=impl, **arguments | {"lr": lr}),
        theirs(models[1].parameters(), **arguments | {"lr": 0.05}),
    ]
    for m, o in zip(models, optimizers, strict=True):
        set_grads(m, 0)
        o.step()
    assert distance(models[0].parameters(), models[1].parameters()) < 1e-12 * 100


def test_stochastic_rounding_of_the_target(impl):
    """bfloat16 at momentum 0.999, 500 steps from 0.5 towards 1; round-to-nearest would stay at 0.5."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1)
    ema = sk.EMA(model, 0.999, stochastic_rounding=True, impl=impl)
    ema.module.weight.fill_(0.5)
    optimizer = sk.optim.SGD(model.parameters(), lr=0.0, ema=ema, impl=impl)
    model.weight.grad = torch.zeros_like(model.weight)
    torch.manual_seed(0)
    for _ in range(500):
        optimizer.step()
    assert abs(ema.module.weight.float().mean().item() - (1 - 0.5 * 0.999**500)) < 5e-3


def test_closures_and_hooks(impl):
    model = nn.Linear(3, 2)
    optimizer = sk.optim.SGD(model.parameters(), lr=0.1, impl=impl)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert calls == ["hook", "hook"]
    # Backward detects that a saved parameter has changed.
    loss = (model.weight * model.weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_and_pickles_lose_the_ema(impl):
    model = nn.Linear(3, 2)
    optimizer = sk.optim.AdamW(model.parameters(), ema=sk.EMA(model), impl=impl)
    other = copy.deepcopy(optimizer)
    assert (other.ema, other.impl) == (None, "auto")


@pytest.mark.parametrize("ours", [sk.optim.SGD, sk.optim.AdamW, sk.optim.LARS])
def test_refused_steps_change_nothing(impl, ours):
    model = Weights()
    embedding = nn.Embedding(5, 2, sparse=True)
    ema = average_of(model, impl=impl)
    params = [*model.parameters(), embedding.weight]
    optimizer = ours([{"params": params[:-1]}, {"params": params[-1:]}], lr=0.1, ema=ema, impl=impl)
    set_grads(model, 0)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = [x.clone() for x in (*params, *ema.module.parameters())]
    with pytest.raises(TypeError, match=r"expected dense gradients, got layout torch\.sparse_coo"):
        optimizer.step()
    embedding.weight.grad = None
    with pytest.raises(ValueError, match="momentum"):
        optimizer.step(momentum=1.5)
    ema.module.weights[0] = nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match="shape"):
        optimizer.step()
    ema.module.weights[0] = nn.Parameter(before[len(params)].clone())
    assert all(map(torch.equal, before, (*params, *ema.module.parameters())))
    assert not optimizer.state or all(not s for s in optimizer.state.values())
    assert ours([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=0.1, impl=impl) is not None


def test_bad_arguments(impl):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"ema: expected a selfsup_kernels\.EMA or None, got Linear"):
        sk.optim.SGD(model.parameters(), ema=model)
    with pytest.raises(ValueError, match="ema: expected that of a model that has some of params"):
        sk.optim.SGD(model.parameters(), ema=sk.EMA(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="impl: expected one of"):
        sk.optim.AdamW(model.parameters(), impl="fast")
    with pytest.raises(RuntimeError, match="impl='triton' has no fused_adamw_, which reference, cpu, cuda have"):
        sk.optim.AdamW(model.parameters(), impl="triton")
    for bad in (0, math.nan):
        with pytest.raises(ValueError, match="trust_coefficient"):
            sk.optim.LARS(model.parameters(), trust_coefficient=bad)
    optimizer = sk.optim.AdamW(model.parameters(), impl=impl)
    with pytest.raises(ValueError, match="momentum: expected None"):
        optimizer.step(momentum=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="amsgrad: not supported by AdamW"):
        optimizer.step()
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(TypeError, match="got complex64"):
        sk.optim.SGD([parameter], impl=impl).step()


@pytest.mark.parametrize("name", ["fused_sgd_", "fused_adamw_"])
def test_opcheck(impl, name):
    params, grads, one, two = ([randn(n, seed=n + s) for n in (4, 9)] for s in range(4))
    targets = [randn(4, seed=7), torch.empty(0)]
    numbers = (None, 0.1, torch.tensor(0.9), 0.0, torch.tensor(3))
    if name == "fused_sgd_":
        arguments = (params, grads, one, targets, *numbers, None, 0.01, 0.9, 0.0, True, False, False)
    else:
        arguments = (params, grads, one, [x.abs() for x in two], targets, *numbers, 3.0, 0.9, 0.99, 1e-8, 0.01, False)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.overload(name, impl), arguments, test_utils=tests)


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")
def test_the_op_refuses_lists_that_do_not_fit():
    op = ops.overload("fused_sgd_", "cpu")
    x, rest = torch.zeros(3), (None, 0.1, None, 0.9, None, None, 0.0, 0.9, 0.0, False, False, False)
    for bad in (
        ([x], [], [x], [x]),
        ([x], [torch.zeros(2)], [torch.zeros(3)], [torch.zeros(3)]),
        ([x], [torch.ones(3)], [torch.zeros(3).double()], [torch.zeros(3)]),
        ([x], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(4)]),
        ([x], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3, dtype=torch.int32)]),
        ([x], [torch.ones(3)], [torch.zeros(3), x], [torch.zeros(3)]),
    ):
        with pytest.raises(RuntimeError, match="fused_sgd_: expected"):
            op(*bad, *rest)
    assert (x == 0).all()
