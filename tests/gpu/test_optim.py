"""Test the fused optimizer steps of the CUDA library, on a GPU or in the emulator."""

import copy
import ctypes
import warnings

import pytest
import torch
from guard import guarded
from helpers import randn
from optim_cases import CASE_IDS, CASES, Weights, average_of, compare, distance, set_grads
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.core import backends, ops

IMPL = "cuda"
pytestmark = pytest.mark.usefixtures("impl")

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(sk.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (sk.optim.AdamW, torch.optim.AdamW, {})]
PAIRS_IDS = ["SGD", "AdamW"]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "arguments"), CASES, ids=CASE_IDS)
def test_the_step_is_torchs(ours, theirs, arguments, dtype, device):
    compare("cuda", device, ours, theirs, arguments, dtype, max(dtype, torch.float32, key=lambda d: d.itemsize))


@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_pair_of_dtypes(dtype, target_dtype, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning for a target of low precision
        for ours, theirs, arguments in PAIRS:
            compare("cuda", device, ours, theirs, arguments, dtype, target_dtype, steps=2)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
def test_an_infinite_parameter_without_a_gradient_stays(ours, theirs, arguments, dtype, device):
    """A mask of infinities among the parameters stays without weight decay, as in torch, and so does its average."""
    model = nn.Module()
    model.mask = nn.Parameter(torch.full((40, 40), -float("inf"), dtype=dtype, device=device).triu(1))
    ema = sk.EMA(model, 0.99, dtype=torch.float32, impl="cuda")
    want = model.mask.detach().clone()
    eps = {"eps": 1e-3} if ours is sk.optim.AdamW else {}  # 1e-8 underflows in float16
    optimizer = ours(model.parameters(), ema=ema, impl="cuda", **arguments | eps)
    for _ in range(2):
        model.mask.grad = torch.zeros_like(model.mask)
        optimizer.step()
        assert torch.equal(model.mask, want)
        assert torch.equal(ema.module.mask, want.float())


def of_weights(sizes, place):
    """Return a model with gradients whose tensors are made by ``place``."""
    model = nn.Module()
    model.w = nn.ParameterList(nn.Parameter(place(randn(n, seed=i))) for i, n in enumerate(sizes))
    for i, p in enumerate(model.w):
        p.grad = place(randn(len(p), seed=100 + i))
    return model


@pytest.mark.parametrize("skip", [None, 1, 4])
@pytest.mark.parametrize("size", [1, 17, 4096, 8197])
@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=PAIRS_IDS)
def test_nothing_is_touched_outside(ours, theirs, arguments, size, skip, device):
    """Nothing outside the tensors is accessed; they end at a guard page, or lie within larger tensors."""
    bases = []

    def place(x):
        if skip is None:
            return guarded(x.to(device))
        base = torch.full((len(x) + skip + 3,), 7.0, device=device)
        base[skip : skip + len(x)] = x
        bases.append((base, len(x)))
        return base[skip : skip + len(x)]

    model = of_weights([size], place)
    twin = copy.deepcopy(model)
    twin.w[0].grad = model.w[0].grad.clone()
    ema = average_of(model)
    ema.module.w[0].data = place(ema.module.w[0])
    before = [t.clone() for t in ema.module.parameters()]
    optimizer = ours(model.parameters(), ema=ema, impl="cuda", **arguments)
    torchs = theirs(twin.parameters(), **arguments)
    for _ in range(2):
        optimizer.step()
        torchs.step()
        sk.ema_update_(before, list(model.parameters()), ema.momentum, impl="reference")
        for state in optimizer.state.values():
            for name in state:
                if state[name].dim():
                    state[name] = place(state[name])  # the second step reads and writes these
    for got, want in ((model, twin.parameters()), (ema.module, before)):
        torch.testing.assert_close(list(got.parameters()), list(want), rtol=1e-5, atol=1e-6)
    for base, n in bases:
        assert (base[:skip] == 7).all()
        assert (base[skip + n :] == 7).all()


def emulated_launches():
    count = ctypes.CDLL(str(backends.EMULATOR)).sk_emulator_launches
    count.restype = ctypes.c_uint64
    return count()


@pytest.mark.parametrize(("count", "launches"), [(3, 1), (500, 1), (700, 2)])
def test_many_tensors(count, launches, device):
    model = of_weights([1 + i % 5 for i in range(count)], lambda x: x.to(device))
    twin = copy.deepcopy(model)
    for p, q in zip(twin.w, model.w, strict=True):
        p.grad = q.grad.clone()
    ema = average_of(model)
    before = [t.clone() for t in ema.module.parameters()]
    optimizer = sk.optim.AdamW(model.parameters(), ema=ema, impl="cuda")
    started = None if backends.EMULATOR is None else emulated_launches()
    optimizer.step()
    assert started is None or emulated_launches() - started == launches
    torch.optim.AdamW(twin.parameters()).step()
    sk.ema_update_(before, list(model.parameters()), ema.momentum, impl="reference")
    assert distance(model.parameters(), twin.parameters()) < 1e-5
    assert distance(ema.module.parameters(), before) < 1e-5


def test_lars(device):
    models = [Weights().to(device) for _ in range(2)]
    averages = [average_of(m) for m in models]
    for impl, model, ema in zip(("cuda", "reference"), models, averages, strict=True):
        optimizer = sk.optim.LARS(model.parameters(), 0.1, 0.9, weight_decay=0.01, ema=ema, impl=impl)
        for step in range(3):
            set_grads(model, step)
            optimizer.step(momentum=torch.tensor(0.9, device=device))
    for one, two in (models, averages):
        torch.testing.assert_close(list(one.parameters()), list(two.parameters()), rtol=1e-5, atol=1e-6)


def test_numbers_on_the_device(device):
    for number_device in (device, torch.device("cpu")):
        lr = torch.tensor(0.25, device=number_device)
        model = of_weights([9], lambda x: x.to(device))
        ema, start = average_of(model), model.w[0].detach().clone()
        target = ema.module.w[0].clone()
        optimizer = sk.optim.SGD(model.parameters(), lr=lr, ema=ema, impl="cuda")
        optimizer.step(momentum=torch.tensor(0.5, dtype=torch.float64, device=number_device))
        torch.testing.assert_close(model.w[0].detach(), start - 0.25 * model.w[0].grad)
        torch.testing.assert_close(ema.module.w[0], 0.5 * target + 0.5 * model.w[0].detach())


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_targets_are_rounded_at_random_as_by_the_cpu_op(dtype, device):
    """One seed rounds as on the CPU. With learning rate and momentum 0 the target is the rounded parameter."""
    results = []
    for impl, place in (("cpu", "cpu"), ("cuda", device)):
        params = [randn(n, seed=n).to(place) for n in (5, 9000)]
        targets = [torch.zeros_like(p, dtype=dtype) for p in params]
        seed = torch.tensor(2**35 + 3, device=place)
        settings = (None, 0.0, None, 0.0, seed, None, 0.0, 0.0, 0.0, False, False, False)
        ops.overload("fused_sgd_", impl)(params, [torch.ones_like(p) for p in params], [], targets, *settings)
        results.append([t.cpu() for t in targets])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["fused_sgd_", "fused_adamw_"])
def test_opcheck(name, device):
    params, grads, one, two = ([randn(n, seed=n + s).to(device) for n in (4, 9)] for s in range(4))
    targets = [randn(4, seed=7).to(device), torch.empty(0, device=device)]
    numbers = (None, 0.1, torch.tensor(0.9, device=device), 0.0, torch.tensor(3, device=device))
    if name == "fused_sgd_":
        arguments = (params, grads, one, targets, *numbers, None, 0.01, 0.9, 0.0, True, False, False)
    else:
        arguments = (params, grads, one, [x.abs() for x in two], targets, *numbers, 3.0, 0.9, 0.99, 1e-8, 0.01, False)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.overload(name, "cuda"), arguments, test_utils=tests)


@pytest.mark.cuda
def test_a_captured_step_follows_schedules(device):
    """A captured SGD step reads the learning rate and the average's momentum from the device at each replay."""
    model = of_weights([5, 70_000], lambda x: x.to(device))
    twin, ema = copy.deepcopy(model), average_of(model)
    lr, momentum = (torch.tensor(x, device=device) for x in (0.1, 0.5))
    optimizer = sk.optim.SGD(model.parameters(), lr=lr, momentum=0.9, ema=ema, impl="cuda")
    torchs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for p, q in zip(twin.w, model.w, strict=True):
        p.grad = q.grad.clone()
    before = [t.clone() for t in ema.module.parameters()]

    def eager(rate, m):
        torchs.param_groups[0]["lr"] = rate
        torchs.step()
        sk.ema_update_(before, list(twin.parameters()), m, impl="reference")

    optimizer.step(momentum=momentum)  # the first step creates the buffers
    eager(0.1, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(momentum=momentum)
    for rate, m in ((0.2, 0.9), (0.0, 0.0), (0.05, 0.99)):
        lr.fill_(rate)
        momentum.fill_(m)
        graph.replay()
        eager(rate, m)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
        torch.testing.assert_close(list(ema.module.parameters()), before)
