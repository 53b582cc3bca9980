"""Test the moving average on a GPU: large tensors, streams, CUDA graphs, devices, memory, synchronisation.

Tests that also run in the emulator are in test_ema.py.
"""

import contextlib
import gc

import pytest
import torch
from ema_cases import CHUNK
from helpers import randn

import selfsup_kernels as sk
from selfsup_kernels.core import ops

IMPL = "cuda"
pytestmark = pytest.mark.cuda


def update(impl, targets, sources, momentum, **arguments):
    sk.ema_update_(targets, sources, momentum, impl=impl, **arguments)


def lists(device, sizes=(5, CHUNK, 2 * CHUNK + 77), dtype=torch.float32, seed=0):
    return tuple([randn(n, dtype=dtype, seed=seed + i).to(device) for n in sizes] for i in (0, 1))


def assert_averaged(got, old, source, momentum):
    """Assert that averages are within one rounding to their dtype plus a few of float32."""
    for g, t, s in zip(got, old, source, strict=True):
        want = momentum * t.double() + (1 - momentum) * s.double()
        info = torch.finfo(g.dtype)
        allowed = info.eps / 2 * (want.abs() + info.tiny) + 5e-7 * (t.double().abs() + s.double().abs())
        assert ((g.double() - want).abs() <= allowed).all()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_more_than_2_31_elements(impl, dtype, device, alone):
    n = 2**31 + CHUNK + 3
    if torch.cuda.mem_get_info()[0] < 3 * n * dtype.itemsize:
        pytest.skip("not enough free memory")
    target, source = torch.zeros(n, dtype=dtype, device=device), torch.full((n,), 2, dtype=dtype, device=device)
    update(impl, [target], [source], 0.5)
    expected = 2 if dtype == torch.uint8 else 1
    assert all(bool((part == expected).all()) for part in target.split(2**28))


@pytest.mark.unpoisoned
def test_a_share_far_below_2_24(impl, device):
    """A share of 2^-k is rounded up, also below 2^-24; draws of 24 bits would round up 16 of 2^28 numbers or more."""
    for k, most in ((20, 256 + 5 * 16), (34, 3)):
        source = torch.full((2**28,), 2.0 ** (-24 - k), device=device)
        target = torch.zeros(2**28, dtype=torch.float16, device=device)
        ops.overload("ema_update_", impl)([target], [source], None, 0.0, torch.tensor(0, device=device))
        up = int((target != 0).sum())
        assert up <= most
        assert up >= (256 - 5 * 16 if k == 20 else 0)


def test_streams(impl, device):
    targets, sources = lists(device)
    expected = [torch.lerp(t, s, 0.25) for t, s in zip(targets, sources, strict=True)]
    expected = [torch.lerp(t, s, 0.25) for t, s in zip(expected, sources, strict=True)]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    first.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(first):
        torch.cuda._sleep(20_000_000)
        update(impl, targets, sources, 0.75)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        torch.cuda._sleep(20_000_000)
        update(impl, targets, sources, 0.75)
    torch.cuda.synchronize()
    torch.testing.assert_close(targets, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("warm", [True, False])
def test_a_graph_follows_a_schedule(impl, warm, device):
    """A graph replays with a new momentum each time, even after other allocations could have reused its memory."""
    targets, sources = lists(device)
    momentum = torch.tensor(0.5, device=device)
    update(impl, *lists(device, seed=7), momentum)  # compiles
    if warm:  # a call with the same lists before the capture
        update(impl, targets, sources, momentum)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(impl, targets, sources, momentum)
    others = [lists(device, seed=100 + i) for i in range(9)]
    for other in others:
        update(impl, *other, 0.5)
    gc.collect()
    junk = [torch.full((n,), -1, dtype=torch.int64, device=device) for n in (8, 16, 32, 64, 128) for _ in range(100)]
    pinned = [torch.full((64,), -1).pin_memory() for _ in range(50)]
    for value in (0.9, 0.0, 0.3, 1.0):
        old = [t.clone() for t in targets]
        momentum.fill_(value)
        graph.replay()
        assert_averaged(targets, old, sources, momentum.double().item())
    update(impl, targets, sources, 0.0)  # outside of the graph, too
    assert all(map(torch.equal, targets, sources))
    assert len(junk) + len(pinned) == 550


def test_a_graph_draws_anew(impl, device):
    target = torch.zeros(4096, dtype=torch.bfloat16, device=device)
    source = torch.full((4096,), 1.001, device=device)
    update(impl, [target], [source], 0.0, stochastic_rounding=True)
    graph, states = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        update(impl, [target], [source], 0.0, stochastic_rounding=True)
    for _ in range(2):
        graph.replay()
        states.append(target.clone())
        assert set(target.tolist()) == {1.0, 1.0078125}
    assert not torch.equal(*states)


def test_layouts_that_differ_in_a_graph(impl, device):
    target, source = randn(6, 5).to(device), randn(5, 6, seed=1).to(device).t()
    update(impl, [target.clone()], [source], 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(impl, [target], [source], 0.5)
    for _ in range(2):
        old = target.clone()
        graph.replay()
        assert_averaged([target], [old], [source], 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_is_current(impl):
    for device in ("cuda:0", "cuda:1"):
        for current in (0, 1):
            targets, sources = lists(torch.device(device))
            old = [t.clone() for t in targets]
            with torch.cuda.device(current):
                update(impl, targets, sources, 0.5)
            assert_averaged(targets, old, sources, 0.5)


@contextlib.contextmanager
def synchronising_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_host_does_not_wait(impl, device):
    """An update does not synchronise, even with a momentum or a seed on the device."""
    update(impl, *lists(device, seed=7), 0.5)
    targets, sources = lists(device, dtype=torch.bfloat16)
    momentum, on_host = torch.tensor(0.5, device=device), torch.tensor(0.5)
    with synchronising_is_an_error():
        for value in (momentum, on_host, 0.5):
            update(impl, targets, sources, value, stochastic_rounding=True)
        update(impl, [targets[1].view(64, -1)], [sources[1].view(-1, 64).t()], momentum)


def test_nothing_grows(impl, device):
    """Updates of tensors with equal layouts allocate no memory."""
    targets, sources = lists(device, sizes=(1 << 20, 77))
    update(impl, targets, sources, 0.5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        update(impl, targets, sources, 0.5)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before
