"""The GPU kernels of the BYOL loss: values and gradients, what the launches are, memory, streams and graphs."""

import ctypes
import itertools
import math
import mmap
import random

import pytest
import torch
from guard import guarded
from helpers import assert_within, randn

from selfsup_kernels import backends, byol_loss, ops
from selfsup_kernels.reference import dense

pytest.importorskip("triton")
from selfsup_kernels.triton import _launch, byol

# Where the kernels are interpreted, half of the operations on infinities warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")

SIZES = [(1, 1), (5, 33), (10, 130), (300, 8), (3, 1000), (2, 2049)]


def inputs(num_views, batch, dim, dtype, device):
    """Predictions and targets as (V, B, D), or as (B, D) for one view: pairs."""
    shape = (batch, dim) if num_views == 1 else (num_views, batch, dim)
    return (randn(*shape, dtype=dtype, seed=seed).to(device) for seed in (0, 1))


def run(function, predictions, targets, upstream=None, **arguments):
    """(loss, gradient), for lists of views too; the gradient stacked."""
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
    want = run(dense.byol_loss, stacked.double(), stacked_targets.double(), upstream, **arguments)
    eager = run(dense.byol_loss, stacked.contiguous(), stacked_targets.contiguous(), upstream, **arguments)
    for name, ours, truth, yardstick in zip(("loss", "grad"), got, want, eager, strict=True):
        assert ours.dtype == stacked.dtype
        assert_within(name, ours, truth, yardstick, floor)
    return got


def one_feature_floor(predictions, upstream):
    """Of one feature the cosine is +-1 and the gradient zero: what remains is rounding of 2 - 2 and of 1 / |p|."""
    if predictions.shape[-1] > 1:
        return 0.0
    return 8 * torch.finfo(predictions.dtype).eps * upstream.abs().max().item() / predictions.abs().min().item()


@pytest.fixture
def launches(monkeypatch):
    """The launches of a test: (kernel, grid, positional arguments, options)."""
    recorded, launch = [], _launch.launch

    def record(kernel, grid, *args, **options):
        recorded.append((kernel, grid, args, options))
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(_launch, "launch", record)
    return recorded


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_values_and_gradients(num_views, size, dtype, impl, device):
    p, t = inputs(num_views, *size, dtype, device)
    for reduction in ops.REDUCTIONS:
        upstream = randn(*p.shape[:-1], seed=2).to(device) if reduction == "none" else torch.tensor(-0.75)
        compare(p, t, upstream, one_feature_floor(p, upstream), reduction=reduction, impl=impl)


@pytest.mark.parametrize("num_views", [2, 3])
def test_several_tiles_a_program(num_views, dtype, device, monkeypatch, triton_runs):
    """More tiles than programs: the loop over tiles, whose last round not every program has."""
    monkeypatch.setattr(_launch, "processors_of", lambda tensor: 1)
    p, t = inputs(num_views, 147, 128, dtype, device)
    for reduction in ops.REDUCTIONS:
        compare(p, t, reduction=reduction, impl="triton")


@pytest.mark.parametrize("num_views", [2, 3])
def test_views_as_list(num_views, dtype, impl, device):
    """Each view an allocation of its own, with its own stride, in either argument."""
    p, t = inputs(num_views, 9, 40, dtype, device)
    wide = [torch.cat([x, x, x][: i + 1], dim=-1)[:, :40] for i, x in enumerate(p)]
    assert len({x.stride(0) for x in wide}) == num_views
    for views, others in [(list(p.clone()), list(t.clone())), (wide, t), (list(p), wide), (wide, wide[::-1])]:
        compare(views, others, randn(num_views, 9, seed=2).to(device), reduction="none", impl=impl)


def test_strides(dtype, impl, device):
    """Views of larger tensors, expanded and transposed ones; rows that do not start at multiples of 16 bytes."""
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
def test_many_views_and_long_rows_by_cuda(num_views, dim, device, cuda_runs):
    """Beyond 48 views they are copied; above 1024 numbers a block has a row; 26000 do not fit the shared memory."""
    p, t = inputs(num_views, 2, dim, torch.float32, device)
    compare(p, t, impl="cuda")
    compare(list(p), list(t), randn(num_views, 2, seed=2).to(device), reduction="none", impl="cuda")


def test_many_views_and_long_rows(device, launches, triton_runs):
    p, t = inputs(17, 2, 8, torch.float32, device)
    compare(p, t, impl="triton")
    assert len(launches) == 2
    for num_views, dim in ((byol.MAX_VIEWS + 1, 4), (2, byol.MAX_DIM + 4)):  # what the kernels do not take
        compare(*inputs(num_views, 2, dim, torch.float32, device), impl="triton")
    assert len(launches) == 2


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_upstream_gradients(num_views, impl, device):
    """Expanded ones, which have stride 0, transposed ones, and zeros."""
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
    """Zero rows, short rows, and rows of the length of the floor on either side."""
    p, t = inputs(num_views, 9, 8, torch.float32, device)
    p[..., 0, :] = 0
    t[..., 1, :] = 0
    p[..., 2, :] *= eps / 100
    t[..., 3, :] *= eps / 100
    p[..., 4, :] *= eps / p[..., 4, :].norm(dim=-1, keepdim=True) * 0.99
    p[..., 5, :] *= eps / p[..., 5, :].norm(dim=-1, keepdim=True) * 1.01
    loss, grad = run(byol_loss, p, t, reduction="none", eps=eps, impl=impl)
    want = run(dense.byol_loss, p.double(), t.double(), reduction="none", eps=eps)
    torch.testing.assert_close(loss.double(), want[0], rtol=0, atol=2e-6)
    for row in range(9):  # each by itself: their gradients differ by 1 / eps
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
    """Squares leave the range of float32; cosines do not."""
    p, t = (x * size for x in inputs(num_views, 6, 40, torch.float32, device))
    loss = byol_loss(p, t, eps=2e-38, reduction="none", impl=impl)
    want = dense.byol_loss(p.double(), t.double(), eps=2e-38, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["predictions", "targets"])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_nan_and_inf_as_in_the_reference(num_views, where, value, dtype, impl, device):
    p, t = inputs(num_views, 20, 40, dtype, device)
    (p if where == "predictions" else t).view(num_views, 20, 40)[-1, 4, 37] = value
    got = run(byol_loss, p, t, reduction="none", impl=impl)
    want = run(byol_loss, p, t, reduction="none", impl="reference")
    eager = run(dense.byol_loss, p, t, reduction="none")
    specification = run(dense.byol_loss, p.double(), t.double(), reduction="none")
    for ours, theirs, truth, yardstick in zip(got, want, specification, eager, strict=True):
        assert not truth.isfinite().all()
        assert not (ours.isfinite() & ~truth.isfinite()).any()
        # With two views ours has the other one's target; the reference, by way of the sum, loses its own view as well.
        assert torch.equal(ours.isfinite(), (truth if num_views == 2 else theirs).isfinite())
        finite = ours.isfinite()
        assert finite.view(num_views, 20, -1)[:, :4].all()
        assert_within("finite part", ours[finite], truth[finite], yardstick[finite])
    for reduction in ("mean", "sum"):
        assert not byol_loss(p, t, reduction=reduction, impl=impl).isfinite()


# ---------------------------------------------------------------- launches and memory


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
def test_one_launch_each_way(num_views, reduction, device, launches, triton_runs):
    p, t = inputs(num_views, 21, 256, torch.float32, device)
    run(byol_loss, p, t, reduction=reduction, impl="triton")
    (first, first_grid, _, _), (second, second_grid, _, options) = launches
    assert first is byol.forward_kernel
    assert second is byol.backward_kernel
    assert options["ROWS"] == 8
    assert first_grid == second_grid == (3,)
    assert options["ALIGNED"]
    assert options["ALIGNED_OUT"]


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
def test_one_launch_each_way_by_cuda(num_views, reduction, device, cuda_runs):
    if backends.EMULATOR is None:
        pytest.skip("the emulator counts the launches")
    launches = ctypes.CDLL(backends.EMULATOR).sk_emulator_launches
    p, t = inputs(num_views, 300, 8, torch.float32, device)  # more samples than the blocks have groups
    before = launches()
    _, grad = run(byol_loss, p, t, reduction=reduction, impl="cuda")
    assert launches() == before + 2
    assert grad.isfinite().all()


def test_configurations_cover_every_length(triton_runs):
    for dim, size, aligned in itertools.product([*range(1, 300), 768, 1000, 4096, byol.MAX_DIM], (2, 4), (True, False)):
        config = byol.configuration(dim, size, aligned)
        warps_of_a_row = config["num_warps"] / min(config["ROWS"], config["num_warps"])
        assert warps_of_a_row <= max(1, dim / 256)  # none is idle
        numbers = config["ROWS"] * -(-dim // config["WIDTH"]) * config["WIDTH"] / (32 * config["num_warps"])
        assert numbers <= 32
        assert all(x & (x - 1) == 0 for x in config.values())


@pytest.mark.parametrize("num_views", [2, 3])
def test_a_repeated_launch_does_not_depend_on_what_the_workspace_held(num_views, device, launches, triton_runs):
    """What the replay of a captured graph does: the same arguments again, other numbers in them."""
    p, t = inputs(num_views, 40, 128, torch.float32, device)
    loss, _ = ops.get("byol_forward", "triton")(list(p), list(t), 1e-12, ops.REDUCTIONS.index("mean"))
    ((kernel, grid, args, options),) = launches
    assert grid[0] > 1
    (workspace,) = (x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.int64)
    assert workspace[0] == 0  # no count is left for others to find
    top = torch.iinfo(torch.int64).max
    for seed, left in enumerate((0, -1, 5, top, -top - 1, None)):
        if left is not None:
            workspace.fill_(left)
        p.copy_(randn(*p.shape, seed=10 + seed))
        loss.fill_(torch.nan)
        kernel[grid](*args, **options)
        assert_within("replayed", loss, dense.byol_loss(p.double(), t.double()))


@pytest.mark.parametrize("size", [(2, 5, 33), (3, 3, 1000), (2, 300, 7), (1, 17, 64)], ids=str)
def test_no_access_past_the_end(size, impl, device):
    """Of each view in an allocation of its own, of the upstream gradient, and of what the kernels write."""
    p, t = ([guarded(x) for x in randn(*size, seed=seed)] for seed in (0, 1))
    predictions, targets = ([x.to(device) for x in views] for views in (p, t))
    forward, backward = ops.get("byol_forward", impl), ops.get("byol_backward", impl)
    for reduction in range(3):
        loss, stats = forward(predictions, targets, 1e-12, reduction)
        grad = guarded(torch.ones(loss.shape)).to(device)
        got = backward(grad, predictions, targets, guarded(stats), reduction)
        want = ops.get("byol_backward", "reference")(grad, predictions, targets, stats, reduction)
        assert_within("gradient", got, want.double())


def sparse_memory(count):
    """``count`` float32 numbers of address space, which takes memory only where it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * count, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer((ctypes.c_char * len(memory)).from_buffer(memory), dtype=torch.float32)


@pytest.mark.skipif(
    not _launch.INTERPRETED, reason="sparse memory is the host's; a GPU has test_more_than_2_31_elements"
)
def test_offsets_have_64_bits(triton_runs):
    """Rows 2^30 numbers apart: 32-bit offsets wrap at the third, and the interpreter says nothing of it."""
    p, t = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    apart = sparse_memory(2**32).as_strided((2, 3, 5), (8, 2**30, 1))
    apart.copy_(p)
    compare(apart, t, randn(2, 3, seed=2), reduction="none", impl="triton")
    compare(t, apart, randn(2, 3, seed=2), reduction="none", impl="triton")


@pytest.mark.skipif(
    not _launch.INTERPRETED, reason="sparse memory is the host's; a GPU has test_more_than_2_31_elements"
)
def test_offsets_of_results_have_64_bits(monkeypatch, triton_runs):
    """One program of a batch of 2^30: the last view's results begin past 2^31 numbers."""
    batch, views = 2**30, 4
    launch = _launch.launch
    monkeypatch.setattr(
        _launch, "launch", lambda kernel, grid, *args, **options: launch(kernel, (1,), *args, **options)
    )
    monkeypatch.setattr(_launch, "processors_of", lambda tensor: 10**6)
    monkeypatch.setattr(byol, "MAX_PROGRAMS", type(byol.MAX_PROGRAMS)(10**9))
    new_empty = torch.Tensor.new_empty

    def sparse_if_large(self, shape, **options):
        large = isinstance(shape, tuple) and math.prod(shape) > batch
        return sparse_memory(math.prod(shape)).view(shape) if large else new_empty(self, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", sparse_if_large)
    p, t = ([x.expand(batch, 2) for x in randn(views, 1, 2, seed=seed)] for seed in (0, 1))
    loss, stats = byol.forward(p, t, 1e-12, 0)
    grad = byol.backward(torch.ones(()), p, t, stats, 0)
    p, t = (torch.stack([x[:1] for x in views]) for views in (p, t))
    want = run(dense.byol_loss, p.double(), t.double(), reduction="none")
    for name, ours, truth in (("loss", loss[:, :1], want[0]), ("gradient", grad[:, :1], want[1])):
        assert_within(name, ours, truth)


@pytest.mark.parametrize("reduction", range(3))
def test_op_registration(reduction, impl, device):
    p, t = inputs(3, 5, 8, torch.float32, device)
    forward, backward = ops.get("byol_forward", impl), ops.get("byol_backward", impl)
    torch.library.opcheck(forward, (list(p), list(t), 1e-12, reduction))
    loss, stats = forward(list(p), list(t), 1e-12, reduction)
    torch.library.opcheck(backward, (torch.ones_like(loss), list(p), list(t), stats, reduction))


# ---------------------------------------------------------------- on a GPU alone


@pytest.mark.cuda
def test_random_cases(impl, device):
    """400 of them, of 25 kernels: a kernel takes longer to compile than to test."""
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
        torch.empty(4096, dtype=torch.int64, device=device).random_()  # what the next workspace is made of
        for got, want in zip(run(byol_loss, p, t, impl=impl), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.unpoisoned
def test_streams(impl, device):
    """Calls on several streams at once, each right."""
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
def test_one_compilation_for_all_batch_sizes(device, triton_runs):
    """Nor does a new one follow from other strides and alignments of rows that are not aligned anyway."""
    for batch in (7, 16):
        run(byol_loss, *inputs(2, batch, 33, torch.float32, device), impl="triton")

    def compiled():
        kernels = (byol.forward_kernel, byol.backward_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    before = compiled()
    for batch in (1, 2, 3, 8, 17, 32, 1000, 4096):
        run(byol_loss, *inputs(2, batch, 33, torch.float32, device), impl="triton")
    assert compiled() == before


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
        want = run(dense.byol_loss, p[:, rows].double(), t[:, rows].double(), reduction="none")
        assert_within("loss", loss[:, rows], want[0])
        assert_within("gradient", grad[:, rows], want[1])


@pytest.mark.cuda
@pytest.mark.unpoisoned
def test_other_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    compare(*inputs(2, 9, 33, torch.float32, torch.device("cuda:1")), impl="triton")
