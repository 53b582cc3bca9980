"""InfoNCE on a real GPU: random cases, determinism, streams, graphs, sizes past 2^31, torch.compile."""

import random

import pytest
import torch
from helpers import assert_within, compare_info_nce, randn, random_labels, run

from selfsup_kernels import info_nce_loss
from selfsup_kernels.cuda import info_nce as cuda_launcher
from selfsup_kernels.objectives import LABEL_OBJECTIVES, OBJECTIVES
from selfsup_kernels.reference import dense
from selfsup_kernels.triton import _launch

pytestmark = [pytest.mark.cuda, pytest.mark.unpoisoned]


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kernel", range(20))
def test_random_cases(impl, device, kernel, precision):
    """400 of them, of a few kernels each: a kernel takes longer to compile than to test."""
    chosen = random.Random(100 * (precision == "high") + kernel)
    dtype = [torch.float32, torch.bfloat16, torch.float16][kernel % 3]
    objective = OBJECTIVES[kernel % 6]
    num_views = chosen.choice([2, 2, 3, 4])
    dim = [128, 8, 33, 256, 64, 512, 300, 1000, 20, 130][kernel % 10]
    with_queue, labelled = chosen.random() < 0.3, objective in LABEL_OBJECTIVES and chosen.random() < 0.4
    normalize = chosen.random() < 0.85
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for case in range(10):
            seed = 1000 * kernel + 10 * case
            batch = chosen.choice([2, 3, 65, 128, 129, chosen.randrange(2, 700)])
            size = 1.0 if normalize else dim**-0.5  # scores of a few, as un-normalised rows need
            temperature = chosen.choice([0.5, 0.1, 0.07, 0.02, 0.01]) if normalize else 1.0
            arguments = {
                "objective": objective,
                "normalize": normalize,
                "reduction": "mean" if dtype == torch.float16 else chosen.choice(["mean", "sum"]),  # a sum overflows
                "labels": random_labels(batch, chosen.choice([1, 3, batch]), seed).to(device) if labelled else None,
                "queue": (size * randn(chosen.randrange(1, 400), dim, dtype=dtype, seed=seed + 1)).to(device)
                if with_queue or labelled
                else None,
                "core_view": chosen.choice([None, 1]) if not labelled else None,
            }
            views = (size * randn(num_views, batch, dim, dtype=dtype, seed=seed)).to(device)
            # A sum over rows that all but cancels has the rounding of its terms, whose size the scale is.
            rows = num_views * batch if arguments["reduction"] == "sum" else 1
            floor = 64 * torch.finfo(torch.float32).eps * rows / temperature
            tf32 = precision == "high"
            # The gradient of the temperature: in 4 of 260 cases in 16 bits eager has half our error, by luck.
            cancels = normalize and (dtype != torch.float32 or tf32)
            compare_info_nce(impl, views, temperature, floor=floor, cancels=cancels, tf32=tf32, **arguments)
    finally:
        torch.set_float32_matmul_precision(before)


def be_deterministic(monkeypatch):
    monkeypatch.setattr(_launch, "deterministic", lambda: True)
    monkeypatch.setattr(cuda_launcher, "_deterministic", lambda: True)


def step(impl, views, temperature=0.1, **arguments):
    x = views.detach().requires_grad_()
    loss = info_nce_loss(x, temperature=temperature, impl=impl, **arguments)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("size", [(2, 300, 128), (2, 6000, 128), (3, 1500, 512)], ids=str)
def test_deterministic_mode_gives_the_same_bits(impl, device, dtype, size, labelled, monkeypatch):
    be_deterministic(monkeypatch)
    views = randn(*size, dtype=dtype).to(device)
    labels = random_labels(size[1], 50).to(device) if labelled else None
    first = step(impl, views, labels=labels)
    for _ in range(100):
        for got, want in zip(step(impl, views, labels=labels), first, strict=True):
            assert torch.equal(got, want)


def test_atomics_and_deterministic_mode_agree(impl, device, monkeypatch):
    views = randn(2, 6000, 128).to(device)
    fast = step(impl, views)
    be_deterministic(monkeypatch)
    for name, got, want in zip(("loss", "grad"), fast, step(impl, views), strict=True):
        assert_within(name, got, want.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_many_rows(impl, device, dtype, dim):
    """Every kernel of a large batch, the mean's gradients as small as they get there, against float64."""
    views = torch.randn(2, 12_000, dim, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    views.requires_grad_()
    loss = info_nce_loss(views, temperature=0.1, impl=impl)
    loss.backward()
    wide = views.detach().double().requires_grad_()
    want = info_nce_loss(wide, temperature=0.1, impl="reference")
    want.backward()
    assert (loss - want).abs() <= torch.finfo(dtype).eps * want
    # float16 and bfloat16: rows, G and the result are each rounded once. float32 as in PyTorch's own products.
    allowed = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-4
    error = (views.grad.double() - wide.grad).norm() / wide.grad.norm()
    # The smallest float16 is 6e-8: a gradient of 1e-5 keeps few digits, whatever computes it.
    spacing = (2**-24 if dtype == torch.float16 else 0) * wide.numel() ** 0.5 / wide.grad.norm()
    assert error <= allowed + spacing


def test_streams(impl, device):
    """Calls on several streams at once, each right."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    cases = [randn(2, 3000, 128, seed=i).to(device) for i in range(4)]
    want = [step(impl, case) for case in cases]
    torch.cuda.synchronize()
    got = []
    for repeat in range(20):
        with torch.cuda.stream(streams[repeat % 4]):
            got.append(step(impl, cases[repeat % 4]))
    torch.cuda.synchronize()
    for repeat, result in enumerate(got):
        for name, ours, theirs in zip(("loss", "grad"), result, want[repeat % 4], strict=True):
            assert_within(name, ours, theirs.double())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("size", [(2, 256, 128), (2, 5000, 128), (2, 700, 512)], ids=str)
def test_graph_replay(impl, device, size, labelled):
    """Captured once, replayed with other rows and another temperature, at one of which every sum underflows."""
    views = randn(*size).to(device).requires_grad_()
    temperature = torch.tensor(0.1, device=device, requires_grad=True)
    labels = random_labels(size[1], 40).to(device) if labelled else None

    def call():
        loss = info_nce_loss(views, temperature=temperature, labels=labels, impl=impl)
        return loss.detach(), *torch.autograd.grad(loss, (views, temperature))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed, value in enumerate([0.1, 0.5, 0.003, 0.07]):
        with torch.no_grad():
            views.copy_(randn(*size, seed=10 + seed))
            temperature.fill_(value)
        graph.replay()
        for name, ours, theirs in zip(("loss", "grad", "temperature"), captured, call(), strict=True):
            assert_within(name, ours, theirs.double())


def test_no_synchronisation(impl, device):
    views = randn(2, 500, 128).to(device)
    labels, queue = random_labels(500, 9).to(device), randn(40, 128, seed=1).to(device)
    temperature = torch.tensor(0.1, device=device)
    step(impl, views, labels=labels, queue=queue, temperature=temperature)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(impl, views, labels=labels, queue=queue, temperature=temperature, reduction="none")
        step(impl, views, normalize=False, temperature=temperature)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_elements(impl, device, alone):
    """A queue that long: its rows pass 2^31 numbers, and the last of them counts."""
    dim, length = 2048, 2**20 + 300
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    queue = torch.randn(length, dim, dtype=torch.bfloat16, device=device)
    assert queue.numel() > 2**31
    views = randn(2, 40, dim, dtype=torch.bfloat16).to(device)
    queue[-1] = views[0, 3]  # a negative as near as can be
    near, grad = step(impl, views, temperature=0.07, queue=queue)
    want = run(dense.info_nce_loss, views, torch.tensor(0.07), queue=queue)
    assert_within("loss", near, want[0].double(), want[0])
    # The anchor's own loss: the mean of 80 moves by 0.01, and the bfloat16 numbers around it are 0.06 apart.
    own, without = (
        info_nce_loss(views, temperature=0.07, queue=q, reduction="none", impl=impl)[0, 3] for q in (queue, queue[:-1])
    )
    assert own - without > 0.5
    assert (grad.float() - want[1].float()).norm() <= 0.05 * want[1].float().norm()  # eager's own error in bfloat16


def test_other_device_than_the_current_one(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    compare_info_nce(impl, randn(2, 65, 33).to("cuda:1"))


def test_compile(device, dtype):
    """As one graph, by the implementation that `auto` chooses on a GPU."""
    views = randn(2, 130, 64, dtype=dtype).to(device)

    def loss(x):
        return 2 * info_nce_loss(x.relu() + x, temperature=0.2)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = views.clone().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    for name, got, want in zip(("loss", "grad"), results[1], results[0], strict=True):
        assert_within(name, got, want.double())


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast(impl, device, enabled):
    """Under autocast the result is float32, and 16-bit rows stay 16-bit."""
    views = randn(2, 70, 64, dtype=torch.bfloat16).to(device).requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
        loss = info_nce_loss(views, impl=impl)
    loss.backward()
    assert loss.dtype == (torch.float32 if enabled else torch.bfloat16)
    assert views.grad.dtype == torch.bfloat16
    assert views.grad.isfinite().all()
