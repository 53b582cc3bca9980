"""Test the GPU kernels of the BYOL loss: values and gradients, launches, memory, streams and graphs."""

import ctypes
import itertools
import mmap
import random

import pytest
import torch
from guard import guarded
from helpers import assert_within, randn

from selfsup_kernels import byol_loss, spec
from selfsup_kernels.core import backends, ops

IMPL = "cuda"
SIZES = [(1, 1), (5, 33), (10, 130), (300, 8), (3, 1000), (2, 2049)]


def inputs(num_views, batch, dim, dtype, device):
    """Return predictions and targets as (V, B, D), or as (B, D) for one view (pairs)."""
    shape = (batch, dim) if num_views == 1 else (num_views, batch, dim)
    return (randn(*shape, dtype=dtype, seed=seed).to(device) for seed in (0, 1))


def run(function, predictions, targets, upstream=None, **arguments):
    """Return (loss, gradient) for a tensor or a list of views; a list's gradients are stacked."""
    leaves = predictions if isinstance(predictions, list) else [predictions]
    # detach() keeps the strides, which clone() would not.
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = function(leaves if isinstance(predictions, list) else leaves[0], targets, **arguments)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    grads = torch.autograd.grad(loss, leaves, upstream)
    return loss.detach(), torch.stack(grads) if isinstance(predictions, list) else grads[0]


def compare(predictions, targets, upstream=None, floor=0.0, *, impl, **arguments):
    stacked = torch.stack(predictions) if isinstance(predictions, list) else predictions
    stacked_targets = torch.stack(targets) if isinstance(targets, list) else targets
    got = run(byol_loss, predictions, targets, upstream, impl=impl, **arguments)
    want = run(spec.byol_loss, stacked.double(), stacked_targets.double(), upstream, **arguments)
    eager = run(spec.byol_loss, stacked.contiguous(), stacked_targets.contiguous(), upstream, **arguments)
    for name, ours, truth, yardstick in zip(("loss", "grad"), got, want, eager, strict=True):
        assert ours.dtype == stacked.dtype
        assert_within(name, ours, truth, yardstick, floor)
    return got


def one_feature_floor(predictions, upstream):
    """Return the bound for one feature: the cosine is +-1, so the gradient is the rounding of 2 - 2 and 1 / |p|."""
    if predictions.shape[-1] > 1:
        return 0.0
    return 8 * torch.finfo(predictions.dtype).eps * upstream.abs().max().item() / predictions.abs().min().item()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_values_and_gradients(num_views, size, dtype, impl, device):
    p, t = inputs(num_views, *size, dtype, device)
    for reduction in ops.REDUCTIONS:
        upstream = randn(*p.shape[:-1], seed=2).to(device) if reduction == "none" else torch.tensor(-0.75)
        compare(p, t, upstream, one_feature_floor(p, upstream), reduction=reduction, impl=impl)


@pytest.mark.parametrize("num_views", [2, 3])
def test_views_as_list(num_views, dtype, impl, device):
    """Views may be separate allocations with different strides, in either argument."""
    p, t = inputs(num_views, 9, 40, dtype, device)
    wide = [torch.cat([x, x, x][: i + 1], dim=-1)[:, :40] for i, x in enumerate(p)]
    assert len({x.stride(0) for x in wide}) == num_views
    for views, others in [(list(p.clone()), list(t.clone())), (wide, t), (list(p), wide), (wide, wide[::-1])]:
        compare(views, others, randn(num_views, 9, seed=2).to(device), reduction="none", impl=impl)


def test_strides(dtype, impl, device):
    """Inputs may be slices of larger tensors, expanded, transposed, or have rows at no multiple of 16 bytes."""
    base, t = inputs(3, 8, 64, dtype, device)
    narrow = randn(3, 8, 67, dtype=dtype).to(device)
    for p in (
        base.transpose(0, 1).contiguous().transpose(0, 1),
        base.flip(2).transpose(1, 2).contiguous().transpose(1, 2),
        narrow[..., 3:],
        narrow[..., 1:65],
        base[:, :1].expand(-1, 8, -1),
        base[:1].expand(3, -1, -1),
    ):
        upstream = randn(3, 8, seed=2).to(device)
        compare(p, t, upstream, 1e-6 if dtype == torch.float32 else 0.0, reduction="none", impl=impl)
        compare(t, p, upstream, reduction="none", impl=impl)


@pytest.mark.parametrize(
    ("num_views", "dim"),
    [(17, 8), (48, 4), (49, 4), (65, 8), (2, 1028), (3, 1028), (3, 1029), (2, 9000), (3, 2900), (3, 26000)],
    ids=str,
)
def test_many_views_and_long_rows(num_views, dim, impl, device):
    """More than 48 views are copied; a row above 1024 numbers gets a block; 26000 numbers exceed shared memory."""
    p, t = inputs(num_views, 2, dim, torch.float32, device)
    compare(p, t, impl=impl)
    compare(list(p), list(t), randn(num_views, 2, seed=2).to(device), reduction="none", impl=impl)


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_upstream_gradients(num_views, impl, device):
    """The upstream gradient may be expanded (stride 0), transposed, or zero."""
    p, t = inputs(num_views, 9, 33, torch.float32, device)
    shape = p.shape[:-1]
    transposed = randn(*shape[::-1]).to(device).permute(*range(len(shape))[::-1])
    for upstream in (torch.tensor(2.0, device=device).expand(shape), transposed, torch.zeros(shape, device=device)):
        _, grad = compare(p, t, upstream, reduction="none", impl=impl)
        if not upstream.any():
            assert not grad.any()


@pytest.mark.parametrize("eps", [1e-30, 1e-12, 1e-6, 0.5])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_floor_of_the_norm(num_views, eps, impl, device):
    """Zero rows, short rows, and rows just below and above the floor are right."""
    p, t = inputs(num_views, 9, 8, torch.float32, device)
    p[..., 0, :] = 0
    t[..., 1, :] = 0
    p[..., 2, :] *= eps / 100
    t[..., 3, :] *= eps / 100
    p[..., 4, :] *= eps / p[..., 4, :].norm(dim=-1, keepdim=True) * 0.99
    p[..., 5, :] *= eps / p[..., 5, :].norm(dim=-1, keepdim=True) * 1.01
    loss, grad = run(byol_loss, p, t, reduction="none", eps=eps, impl=impl)
    want = run(spec.byol_loss, p.double(), t.double(), reduction="none", eps=eps)
    torch.testing.assert_close(loss.double(), want[0], rtol=0, atol=2e-6)
    for row in range(9):  # separately, since their gradients differ by 1 / eps
        assert_within(f"row {row}", grad[..., row, :], want[1][..., row, :])
    assert (loss[..., 0] == 2).all()


def test_zero_rows_are_finite(dtype, impl, device):
    for of_p, of_t in itertools.product((0, 1), repeat=2):
        p, t = inputs(2, 5, 8, dtype, device)
        loss, grad = run(byol_loss, of_p * p, of_t * t, impl=impl)
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("size", [1e30, 1e19, 1e-22, 1e-37])
def test_long_and_short_rows(num_views, size, impl, device):
    """Losses are right although the squared norms leave the range of float32."""
    p, t = (x * size for x in inputs(num_views, 6, 40, torch.float32, device))
    loss = byol_loss(p, t, eps=2e-38, reduction="none", impl=impl)
    want = spec.byol_loss(p.double(), t.double(), eps=2e-38, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["predictions", "targets"])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_nan_and_inf_as_in_the_reference(num_views, where, value, dtype, impl, device):
    p, t = inputs(num_views, 20, 40, dtype, device)
    (p if where == "predictions" else t).view(num_views, 20, 40)[-1, 4, 37] = value
    got = run(byol_loss, p, t, reduction="none", impl=impl)
    want = run(byol_loss, p, t, reduction="none", impl="reference")
    eager = run(spec.byol_loss, p, t, reduction="none")
    specification = run(spec.byol_loss, p.double(), t.double(), reduction="none")
    for ours, theirs, truth, yardstick in zip(got, want, specification, eager, strict=True):
        assert not truth.isfinite().all()
        assert not (ours.isfinite() & ~truth.isfinite()).any()
        # With two views ours uses only the other view's target. The reference subtracts from the sum of all targets,
        # so that its own view becomes NaN as well.
        assert torch.equal(ours.isfinite(), (truth if num_views == 2 else theirs).isfinite())
        finite = ours.isfinite()
        assert finite.view(num_views, 20, -1)[:, :4].all()
        assert_within("finite part", ours[finite], truth[finite], yardstick[finite])
    for reduction in ("mean", "sum"):
        assert not byol_loss(p, t, reduction=reduction, impl=impl).isfinite()


# ---------------------------------------------------------------- launches and memory


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
def test_one_launch_each_way(num_views, reduction, impl, device):
    if backends.EMULATOR is None:
        pytest.skip("the emulator counts the launches")
    launches = ctypes.CDLL(backends.EMULATOR).sk_emulator_launches
    p, t = inputs(num_views, 300, 8, torch.float32, device)  # more samples than the blocks have groups
    before = launches()
    _, grad = run(byol_loss, p, t, reduction=reduction, impl=impl)
    assert launches() == before + 2
    assert grad.isfinite().all()


@pytest.mark.parametrize("size", [(2, 5, 33), (3, 3, 1000), (2, 300, 7), (1, 17, 64)], ids=str)
def test_no_access_past_the_end(size, impl, device):
    """Each view, the upstream gradient and the statistics end at a guard page, and nothing past them is accessed."""
    p, t = ([guarded(x) for x in randn(*size, seed=seed)] for seed in (0, 1))
    predictions, targets = ([x.to(device) for x in views] for views in (p, t))
    forward, backward = ops.overload("byol_forward", impl), ops.overload("byol_backward", impl)
    for reduction in range(3):
        loss, stats = forward(predictions, targets, 1e-12, reduction)
        grad = guarded(torch.ones(loss.shape)).to(device)
        got = backward(grad, predictions, targets, guarded(stats), reduction)
        want = ops.overload("byol_backward", "reference")(grad, predictions, targets, stats, reduction)
        assert_within("gradient", got, want.double())


def sparse_memory(count):
    """Return a tensor of ``count`` float32 numbers whose pages use memory only once they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * count, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer((ctypes.c_char * len(memory)).from_buffer(memory), dtype=torch.float32)


@pytest.mark.skipif(
    backends.EMULATOR is None, reason="sparse memory is the host's; a GPU has test_more_than_2_31_elements"
)
def test_offsets_have_64_bits(impl):
    """Rows may be 2^30 numbers apart; 32-bit offsets would wrap at the third."""
    p, t = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    apart = sparse_memory(2**32).as_strided((2, 3, 5), (8, 2**30, 1))
    apart.copy_(p)
    compare(apart, t, randn(2, 3, seed=2), reduction="none", impl=impl)
    compare(t, apart, randn(2, 3, seed=2), reduction="none", impl=impl)


@pytest.mark.parametrize("reduction", range(3))
def test_op_registration(reduction, impl, device):
    p, t = inputs(3, 5, 8, torch.float32, device)
    forward, backward = ops.overload("byol_forward", impl), ops.overload("byol_backward", impl)
    torch.library.opcheck(forward, (list(p), list(t), 1e-12, reduction))
    loss, stats = forward(list(p), list(t), 1e-12, reduction)
    torch.library.opcheck(backward, (torch.ones_like(loss), list(p), list(t), stats, reduction))


# ---------------------------------------------------------------- tests that need a GPU


@pytest.mark.cuda
def test_random_cases(impl, device):
    """Compare 400 random cases, in 25 groups that share a compiled kernel, since compiling takes longer than a case."""
    chosen = random.Random(0)
    for kernel in range(25):
        dtype = [torch.float32, torch.bfloat16, torch.float16][kernel % 3]
        num_views = chosen.choice([1, 2, 2, 3, 4, 7])
        dim = [2, 8, 33, 128, 256, 768, 1000, 1024, 2048, chosen.randrange(2, 5000)][kernel % 10]
        for case in range(16):
            batch = chosen.choice([1, 2, 5, 33, 257, chosen.randrange(1, 2000)])
            reduction = chosen.choice(ops.REDUCTIONS)
            shape = (batch, dim) if num_views == 1 else (num_views, batch, dim)
            seed = 100 * (16 * kernel + case)
            p, t = (randn(*shape, dtype=dtype, seed=seed + i).to(device) for i in range(2))
            upstream = randn(*shape[:-1], seed=seed + 2).to(device) if reduction == "none" else torch.tensor(1.5)
            if num_views > 1 and chosen.random() < 0.3:
                p, t = list(p.clone()), list(t.clone())
            compare(p, t, upstream, reduction=reduction, impl=impl)


@pytest.mark.cuda
@pytest.mark.unpoisoned
@pytest.mark.parametrize("num_views", [2, 3])
def test_same_bits_every_time(num_views, dtype, impl, device):
    p, t = inputs(num_views, 20000, 256, dtype, device)
    first = run(byol_loss, p, t, impl=impl)
    for _ in range(100):
        torch.empty(4096, dtype=torch.int64, device=device).random_()  # the next workspace reuses this memory
        for got, want in zip(run(byol_loss, p, t, impl=impl), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.unpoisoned
def test_streams(impl, device):
    """Concurrent calls on several streams give the same bits as calls on one."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    p, t = inputs(2, 8192, 256, torch.float32, device)
    cases = [(p * (i + 1), t.roll(i, 1)) for i in range(4)]
    want = [run(byol_loss, *case, impl=impl) for case in cases]
    torch.cuda.synchronize()
    got = []
    for repeat in range(20):
        with torch.cuda.stream(streams[repeat % 4]):
            got.append(run(byol_loss, *cases[repeat % 4], impl=impl))
    torch.cuda.synchronize()
    for repeat, result in enumerate(got):
        for ours, theirs in zip(result, want[repeat % 4], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.cuda
@pytest.mark.unpoisoned
@pytest.mark.parametrize("num_views", [2, 3])
def test_graph_replay(num_views, impl, device):
    p, t = inputs(num_views, 5000, 256, torch.float32, device)
    p.requires_grad_()

    def step():
        (grad,) = torch.autograd.grad(byol_loss(p, t, impl=impl).add(0), p)
        return byol_loss(p, t, impl=impl).detach(), grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(5):
        with torch.no_grad():
            p.copy_(randn(*p.shape, seed=10 + seed))
            t.copy_(randn(*t.shape, seed=20 + seed))
        graph.replay()
        for ours, theirs in zip(captured, step(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.cuda
@pytest.mark.unpoisoned
def test_more_than_2_31_elements(impl, device, alone):
    batch, dim = 2**22 + 5, 256
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    p, t = (torch.randn(2, batch, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    assert p.numel() > 2**31
    loss, grad = run(byol_loss, p, t, reduction="none", impl=impl)
    for rows in (slice(0, 5), slice(batch - 5, batch)):
        want = run(spec.byol_loss, p[:, rows].double(), t[:, rows].double(), reduction="none")
        assert_within("loss", loss[:, rows], want[0])
        assert_within("gradient", grad[:, rows], want[1])


@pytest.mark.cuda
@pytest.mark.unpoisoned
def test_other_device_than_the_current_one(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    compare(*inputs(2, 9, 33, torch.float32, torch.device("cuda:1")), impl=impl)
