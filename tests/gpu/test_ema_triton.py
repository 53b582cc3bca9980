"""The Triton kernel of the moving average from within: what its launch is, the table and its cache.

Values are in test_ema.py, streams and graphs in test_ema_cuda.py.
"""

from functools import partial

import ema_cases
import pytest
import torch
from ema_cases import bits, mixed
from guard import guarded
from helpers import randn

pytest.importorskip("triton")
from selfsup_kernels.triton import _launch, ema

# Where the kernel is interpreted, operations on infinities and halves that overflow warn.
pytestmark = [
    pytest.mark.usefixtures("triton_runs"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

check = partial(ema_cases.check, "triton")


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(ema, "_tables", {})
    monkeypatch.setattr(ema, "_captured", {})


@pytest.fixture
def launches(monkeypatch):
    """The launches of a test: (kernel, grid, positional arguments, options)."""
    recorded, launch = [], _launch.launch

    def record(kernel, grid, *args, **options):
        recorded.append((kernel, grid, args, options))
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(_launch, "launch", record)
    return recorded


@pytest.fixture
def uploads(monkeypatch):
    """The tables that were uploaded in a test."""
    recorded, upload = [], ema._upload

    def record(table, words, device):
        recorded.append(table)
        upload(table, words, device)

    monkeypatch.setattr(ema, "_upload", record)
    return recorded


def test_arguments_of_the_launch(device, launches):
    sizes = [ema.CHUNK + 1, 3, 2 * ema.CHUNK]
    targets = [
        randn(n, dtype=d).to(device) for n, d in zip(sizes, (torch.float32, torch.float16, torch.float32), strict=True)
    ]
    sources = [
        randn(n, dtype=d).to(device) for n, d in zip(sizes, (torch.bfloat16, torch.float32, torch.float32), strict=True)
    ]
    counts = (bits(torch.int64, 5).to(device), bits(torch.int64, 5, seed=1).to(device))
    seed = torch.tensor(3, device=device)
    ema.update_([*targets, counts[0]], [*sources, counts[1]], None, 1, seed)
    ((kernel, grid, (rows, owners, momentum, momentum_tensor, given), options),) = launches
    assert kernel is ema._ema_kernel
    assert grid == (2 + 1 + 2 + 1,)
    assert rows.dtype == torch.int64
    expected = [
        [t.data_ptr(), s.data_ptr(), t.numel()]
        for t, s in zip([*targets, counts[0]], [*sources, counts[1]], strict=True)
    ]
    assert rows.view(-1, ema.ROW)[:, :3].tolist() == expected
    assert rows.view(-1, ema.ROW)[:, 3].tolist() == [0, 2, 3, 5]
    assert owners.dtype == torch.int32
    assert [(x // 32, x % 32) for x in owners[:6].tolist()] == [(0, 1), (0, 1), (1, 8), (2, 0), (2, 0), (3, 19)]
    assert (type(momentum), momentum, momentum_tensor) == (float, 1.0, None)
    assert given is seed
    assert options["WIDE"] is False
    ema.update_([targets[0], targets[2].double()], [sources[0], sources[2]], None, 0.5, seed)
    assert launches[1][2][4] is None  # nothing to round at random
    assert launches[1][3]["WIDE"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_sizes_are_64_bit(dtype, monkeypatch):
    """The table of tensors that need no memory."""
    monkeypatch.setattr(ema._overlap, "identical", lambda a, b: False)  # on `meta` all addresses are 0
    n = 2**31 + 5
    targets = [torch.empty(n, dtype=dtype, device="meta"), torch.empty(3 * n, dtype=torch.float32, device="meta")]
    sources = [torch.empty(n, dtype=dtype, device="meta"), torch.empty(3 * n, dtype=torch.bfloat16, device="meta")]
    table = ema._Table(targets, sources)
    first = -(-n // ema.CHUNK)
    assert table.rows.view(-1, ema.ROW)[:, 2:].tolist() == [[n, 0], [3 * n, first]]
    assert table.chunks == first - (-3 * n // ema.CHUNK)
    assert table.owners[first - 1 : first + 1].tolist() == [0 if dtype == torch.float32 else 16, 32 + 1]


def test_a_list_is_uploaded_once(device, uploads):
    targets, sources = mixed(device)
    for _ in range(3):
        check(targets, sources, 0.5)
    assert len(uploads) == 1
    targets[0] = randn(*targets[0].shape).to(device)  # elsewhere
    check(targets, sources, 0.5)
    assert len(uploads) == 2
    sources[1].data = sources[1].clone()  # the same tensor, elsewhere
    check(targets, sources, 0.5)
    assert len(uploads) == 3
    base, source = randn(64).to(device), randn(64, seed=1).to(device)  # the same addresses
    for view in (lambda x: x, lambda x: x[:9], lambda x: x.view(8, 8), lambda x: x.view(torch.float64)[:9]):
        rest = base[18:].clone()
        check([view(base)], [view(source)], 0.5)
        assert torch.equal(base[18:], rest) == (view(base).nbytes < base.nbytes)
    check([base.view(8, 8)], [source.view(8, 8).t()], 0.5)
    check([base.view(torch.int32)], [source.view(torch.int32)], 0.5)


def test_the_cache_is_bounded(device, uploads):
    lists = [([randn(3).to(device)], [randn(3, seed=1).to(device)]) for _ in range(ema.MOST_TABLES + 1)]
    for targets, sources in lists[:-1]:
        check(targets, sources, 0.5)
    check(*lists[0], 0.5)  # now the second one is the oldest
    check(*lists[-1], 0.5)
    assert [len(tables) for tables in ema._tables.values()] == [ema.MOST_TABLES]
    assert len(uploads) == len(lists)
    check(*lists[0], 0.5)
    assert len(uploads) == len(lists)
    check(*lists[1], 0.5)
    assert len(uploads) == len(lists) + 1


def test_what_a_graph_may_read_is_kept(device, uploads, monkeypatch):
    """A table that a capture finds outlives the cache; one that it makes is found by nobody else."""
    first, second = (([randn(3, seed=s).to(device)], [randn(3).to(device)]) for s in (0, 1))
    check(*first, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(ema, "_capturing", lambda device: True)
        check(*first, 0.5)
        check(*second, 0.5)
    assert len(uploads) == 2
    assert ema._captured == {id(uploads[0]): uploads[0], id(uploads[1].staging): uploads[1].staging}
    for (targets, sources), seen in ((second, 3), (first, 3), (second, 3)):
        check(targets, sources, 0.5)
        assert len(uploads) == seen


@pytest.mark.parametrize(
    ("targets", "sources", "error", "message"),
    [
        ([torch.zeros(3)] * 3, [torch.zeros(3)], ValueError, "sources: expected 3 tensors.*got 1"),
        ([torch.zeros(3)], [torch.zeros(2)], ValueError, r"sources\[0\]: expected shape \(3,\), got \(2,\)"),
        ([torch.zeros(3)], [torch.zeros(3, dtype=torch.int32)], TypeError, "float32 and torch.int32"),
        ([torch.zeros(3).cfloat()], [torch.zeros(3).cfloat()], TypeError, "complex64"),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], ValueError, "on cpu"),
    ],
    ids=["length", "shape", "integer", "complex", "device"],
)
def test_the_op_refuses_what_its_table_cannot_hold(targets, sources, error, message):
    """What the public function has checked before; the op alone must not write anywhere else either."""
    with pytest.raises(error, match=message):
        ema.update_(targets, sources, None, 0.5, None)


@pytest.mark.parametrize("size", [1, 17, ema.CHUNK - 1, ema.CHUNK, ema.CHUNK + 3])
def test_nothing_is_read_past_the_table(size, device, monkeypatch):
    empty = _launch.empty
    monkeypatch.setattr(_launch, "empty", lambda *arguments: guarded(empty(*arguments)))
    check([randn(size).to(device)], [randn(size, seed=1).to(device)], 0.9)


def test_one_order_of_memory_is_not_packed(device, launches, monkeypatch):
    monkeypatch.delattr(ema, "_pack")
    images = (randn(4, 3, 5, 2, seed=s).to(device).to(memory_format=torch.channels_last) for s in (0, 1))
    transposed = (randn(7, 5, 3, seed=s).to(device).permute(2, 0, 1) for s in (0, 1))
    for target, source in (images, transposed):
        check([target], [source], 0.4)
    assert len(launches) == 2


def test_the_kernel_reads_the_momentum(device, launches):
    for momentum in torch.tensor([0.0, 1.0, 0.1], device=device):
        check([randn(9).to(device)], [randn(9, seed=1).to(device)], momentum)
        assert launches[-1][2][3].data_ptr() == momentum.data_ptr()
