"""The Triton kernel of the moving average: values, what its launch is, the table and its cache, rounding at random.

Interpreted, bfloat16 targets are cut where a GPU rounds them: their bound is then twice as wide. Rounding at random
works on the bits, and is exact in both. What needs a GPU (streams, graphs, large tensors) is in test_ema_cuda.py.
"""

import math

import pytest
import torch
from guard import guarded
from helpers import randn

import selfsup_kernels as sk
from selfsup_kernels import backends

pytest.importorskip("triton")
from selfsup_kernels.triton import _launch, ema

INTERPRETED = backends.triton_is_interpreted()
FLOATING = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LOW = [torch.bfloat16, torch.float16]
SIZES = [1, ema.CHUNK - 1, 0, ema.CHUNK, ema.CHUNK + 1, 3 * ema.CHUNK + 5, 7]

# Where the kernel is interpreted, operations on infinities and halves that overflow warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def truth(target, source, momentum):
    return momentum * target.double() + (1 - momentum) * source.double()


def assert_rounded(got, want, target, source):
    """One rounding to the target's dtype, after a few in the dtype of the arithmetic."""
    info = torch.finfo(got.dtype)
    arithmetic = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    unit = info.eps if INTERPRETED and got.dtype == torch.bfloat16 else info.eps / 2
    allowed = unit * (want.abs() + info.tiny) + 4 * arithmetic.eps * (target.double().abs() + source.double().abs())
    excess = ((got.double() - want).abs() - allowed).max().item()
    assert excess <= 0, f"error beyond rounding by {excess:.3e}"


def check(targets, sources, momentum, **arguments):
    before, kept = [t.clone() for t in targets], [s.clone() for s in sources]
    sk.ema_update_(targets, sources, momentum, impl="triton", **arguments)
    for t, b, s, k in zip(targets, before, sources, kept, strict=True):
        assert torch.equal(s, k)
        if t.is_floating_point() and t.numel():
            assert_rounded(t, truth(b, s, float(momentum)), b, s)
        else:
            assert torch.equal(t, s)


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


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_every_pair_of_dtypes(target_dtype, source_dtype, device, launches):
    targets = [randn(n, dtype=target_dtype, seed=n).to(device) for n in SIZES]
    sources = [randn(n, dtype=source_dtype, seed=n + 1).to(device) for n in SIZES]
    for momentum in (0.3, 0.996):
        check(targets, sources, momentum)
    before = [t.clone() for t in targets]
    sk.ema_update_(targets, sources, 1.0, impl="triton")
    assert all(map(torch.equal, targets, before))
    if target_dtype == source_dtype:
        sk.ema_update_(targets, sources, 0.0, impl="triton")
        assert all(map(torch.equal, targets, sources))
    assert len(launches) == (4 if target_dtype == source_dtype else 3)


def bits(dtype, count, seed=0):
    """Any bits at all; of bools, both values."""
    if dtype == torch.bool:
        return randn(count, seed=seed) > 0
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (count * dtype.itemsize,), generator=generator).to(torch.int8).view(dtype)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_copied(dtype, device):
    for momentum in (0.5, 1.0):
        sizes = (1, 17, ema.CHUNK, ema.CHUNK + 1)
        targets, sources = ([bits(dtype, n, seed + n).to(device) for n in sizes] for seed in (0, 1))
        check([*targets, bits(dtype, 70, 2).to(device)[1:]], [*sources, bits(dtype, 69, 3).to(device)], momentum)


def mixed(device, shift=0):
    """(targets, sources): every pair of floating dtypes and every integer, an empty tensor and a scalar."""
    pairs = [(t, s) for t in FLOATING for s in FLOATING]
    targets = [randn(5 + i, dtype=t, seed=i + shift) for i, (t, _) in enumerate(pairs)]
    sources = [randn(5 + i, dtype=s, seed=50 + i + shift) for i, (_, s) in enumerate(pairs)]
    targets += [bits(t, 9) for t in INTEGERS] + [torch.zeros(0, 3), torch.tensor(2.0)]
    sources += [bits(t, 9, seed=1) for t in INTEGERS] + [torch.zeros(0, 3), torch.tensor(4.0)]
    return [t.to(device) for t in targets], [s.to(device) for s in sources]


def test_a_mixed_list_is_one_launch(device, launches):
    check(*mixed(device), 0.75)
    assert len(launches) == 1


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float64,) * 2]
)
def test_tensors_start_anywhere(dtypes, device):
    """And what lies before and behind a target stays."""
    n = ema.CHUNK + 9
    for skip_target, skip_source in [(0, 1), (1, 0), (3, 3), (4, 8), (8, 2)]:
        base, source = (randn(n + 16, dtype=d, seed=i).to(device) for i, d in enumerate(dtypes))
        before = base.clone()
        inside = slice(skip_target, skip_target + n)
        check([base[inside]], [source[skip_source : skip_source + n]], 0.7)
        assert torch.equal(base[: inside.start], before[: inside.start])
        assert torch.equal(base[inside.stop :], before[inside.stop :])


@pytest.mark.parametrize("size", [1, 17, ema.CHUNK - 1, ema.CHUNK, ema.CHUNK + 3])
def test_nothing_is_touched_past_an_end(size, device, monkeypatch):
    """Each target, source and the table end where memory does."""
    empty = _launch.empty
    monkeypatch.setattr(_launch, "empty", lambda *arguments: guarded(empty(*arguments)))
    pairs = [(t, s) for t in FLOATING for s in FLOATING]
    targets = [guarded(randn(size, dtype=t, seed=i).to(device)) for i, (t, _) in enumerate(pairs)]
    sources = [guarded(randn(size, dtype=s, seed=50 + i).to(device)) for i, (_, s) in enumerate(pairs)]
    check(targets, sources, 0.9)
    targets, sources = ([guarded(bits(t, size, seed).to(device)) for t in INTEGERS] for seed in (0, 1))
    check(targets, sources, 0.9)
    low = [guarded(randn(size, dtype=t).to(device)) for t in LOW]
    sk.ema_update_(low, [guarded(x + 1) for x in low], 0.9, stochastic_rounding=True, impl="triton")


def test_nan_and_infinity(device):
    """What the equation gives for them, from the end that is nearer."""
    for dtype in FLOATING:
        for value in (math.nan, math.inf, -math.inf):
            for momentum in (0.25, 0.75):
                source = torch.ones(9, device=device).index_fill(0, torch.tensor([3, 7], device=device), value)
                targets = [torch.ones(9, dtype=dtype, device=device) for _ in range(3)]
                for target, impl, at_random in zip(targets, ("reference", "triton", "triton"), (0, 0, 1), strict=True):
                    target[2:4] = value
                    sk.ema_update_([target], [source], momentum, stochastic_rounding=bool(at_random), impl=impl)
                    assert target.isfinite().tolist() == [i not in (2, 3, 7) for i in range(9)]
                for target in targets[1:]:
                    torch.testing.assert_close(target, targets[0], rtol=0, atol=0, equal_nan=True)
    # A GPU's own NaN has all bits set, and adding to them would carry into the sign.
    target, source = torch.ones(3, dtype=torch.bfloat16, device=device), torch.full((3,), 2**31 - 1, device=device)
    sk.ema_update_([target], [source.int().view(torch.float32)], 0.5, stochastic_rounding=True, impl="triton")
    assert target.isnan().all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_momentum_as_a_tensor(dtype, device, launches):
    """Also one that starts anywhere; it is the tensor that the kernel reads."""
    schedule = torch.tensor([0.0, 1.0, 0.8125, 0.1], dtype=dtype, device=device)
    for momentum in schedule:
        lists = [[x.to(device) for x in (randn(70, seed=s), randn(9, dtype=torch.float64, seed=s))] for s in (0, 1)]
        check(*lists, momentum)
        assert launches[-1][2][3].data_ptr() == momentum.data_ptr()


def test_a_momentum_is_float64(device):
    """0.1 as float32 is off by 1.5e-9, and so would be an average in float64."""
    for momentum in (0.1, torch.tensor(0.1, dtype=torch.float64, device=device)):
        target, source = torch.zeros(3, dtype=torch.float64, device=device), torch.ones(3, device=device)
        sk.ema_update_([target], [source], momentum, impl="triton")
        assert (target - 0.9).abs().max() < 1e-15


# ---------------------------------------------------------------- what has nothing to do, and other layouts


def test_nothing_to_do(device, launches):
    same = torch.tensor([1.0, math.inf, 3.0], device=device)
    empty = torch.zeros(0, 4, device=device)
    ema.update_([], [], None, 0.5, None)
    ema.update_([same, empty, same.view(1, 3)], [same.view(3), empty.clone(), same.view(1, 3)], None, 0.5, None)
    assert not launches
    assert same.tolist() == [1.0, math.inf, 3.0]
    other = torch.zeros(2, device=device)
    ema.update_([same, other, empty], [same, other + 1, empty], None, 0.5, None)
    assert same.tolist() == [1.0, math.inf, 3.0]
    assert other.tolist() == [0.5, 0.5]
    assert launches[0][1] == (1,)


def channels_last(*shape, seed=0):
    return randn(*shape, seed=seed).to(memory_format=torch.channels_last)


def test_one_order_of_memory_is_one_run(device, launches, monkeypatch):
    monkeypatch.delattr(ema, "_pack")
    transposed = (randn(7, 5, 3, seed=s).to(device).permute(2, 0, 1) for s in (0, 1))
    one = (randn(6, 1, 4, seed=s).to(device).as_strided((6, 1, 4), (4, 99 + s, 1)) for s in (0, 1))
    images = (channels_last(4, 3, 5, 2, seed=s).to(device) for s in (0, 1))
    for target, source in (transposed, one, images):
        strides = target.stride()
        check([target], [source], 0.4)
        assert target.stride() == strides
    assert len(launches) == 3


@pytest.mark.parametrize("kind", ["transposed", "columns", "rows", "channels_last"])
@pytest.mark.parametrize("which", ["target", "source", "both"])
def test_other_layouts(kind, which, device, launches):
    def strided(base):
        return {
            "transposed": lambda: base.t(),
            "columns": lambda: base[:, 1::2],
            "rows": lambda: base[::3],
            "channels_last": lambda: base.reshape(2, 3, 2, -1).to(memory_format=torch.channels_last),
        }[kind]()

    bases = [randn(12, 6, seed=s).to(device) for s in (0, 1)]
    target, source = (
        strided(b) if which in (w, "both") else strided(b).contiguous()
        for b, w in zip(bases, ("target", "source"), strict=True)
    )
    before, base, inside = bases[0].clone(), bases[0], target
    plain = [randn(5, seed=s).to(device) for s in (2, 3)]
    integers = [(base.int() * s, base.int().t().contiguous().t() * s) for s in (1, 3)]
    check([target, plain[0], integers[0][0]], [source, plain[1], integers[1][1]], 0.6)
    assert len(launches) == 1
    if inside.data_ptr() in range(base.data_ptr(), base.data_ptr() + base.nbytes):
        inside.copy_(strided(before))
        assert torch.equal(base, before)  # what lies between the elements


# ---------------------------------------------------------------- the launch, the table, the cache


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


@pytest.mark.parametrize("form", ["plain", "tensor momentum", "random"])
def test_opcheck(form, device):
    targets, sources = mixed(device)
    momentum = torch.tensor(0.9, device=device) if form == "tensor momentum" else None
    seed = torch.tensor(3, device=device) if form == "random" else None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (targets, sources, momentum, 0.9, seed)
    torch.library.opcheck(backends.op("ema_update_", "triton"), arguments, test_utils=tests)


# ---------------------------------------------------------------- rounding at random


def rounded(value, dtype, device, count=1 << 14, seed=0, skip=0):
    """``value`` rounded ``count`` times, into a target that starts ``skip`` elements into its memory."""
    target = torch.zeros(count + skip, dtype=dtype, device=device)[skip:]
    source = torch.full((count,), value, device=device)
    ema.update_([target], [source], None, 0.0, torch.tensor(seed, device=device))
    return target


CASES = [(d, v) for d in LOW for v in (1 + 2**-10 / 3, -1 - 2**-7 / 3, 3.14159, -0.1, 2 - 2**-13, 40000.3)]
CASES += [(torch.float16, v) for v in (1e-6, 2**-24 * 0.25, -(2**-24) * 0.7, 2**-14 - 2**-26, -(2.0**-24) * 2**-8)]
CASES += [(torch.bfloat16, v) for v in (1.1e-39, -(2.0**-133) * 0.75, 2.0**-126 * (1 - 2**-9))]


@pytest.mark.parametrize(("dtype", "value"), CASES, ids=str)
def test_the_mean_is_exact(dtype, value, device):
    value = torch.tensor(value).item()  # as float32 has it
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].double()
    low, high = every[every <= value].max().item(), every[every >= value].min().item()
    got = rounded(value, dtype, device).double()
    assert low < value < high
    assert ((got == low) | (got == high)).all()
    share = (value - low) / (high - low)
    deviation = math.sqrt(share * (1 - share) / len(got))
    assert abs((got == high).double().mean().item() - share) < 5 * deviation


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_needs_no_rounding_stays(dtype, device):
    info = torch.finfo(dtype)
    for value in (0.0, -0.0, 1.0, -1.5, info.max, -info.max, info.tiny, -info.tiny * info.eps):
        got = rounded(value, dtype, device, count=64)
        assert (got.double() == value).all()
        assert (torch.signbit(got) == (math.copysign(1, value) < 0)).all()
    step = 2.0 ** (math.frexp(info.max)[1]) * info.eps / 2
    for sign in (1, -1):  # infinity only where rounding to nearest goes there
        assert (rounded(sign * (info.max + 0.49 * step), dtype, device, 64).double() == sign * info.max).all()
        assert (rounded(sign * (info.max + 0.51 * step), dtype, device, 64) == sign * math.inf).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_seeds_and_streams(dtype, device):
    step = torch.finfo(dtype).eps
    got = rounded(1 + step / 2, dtype, device, seed=2**40 + 1)
    assert torch.equal(got, rounded(1 + step / 2, dtype, device, seed=2**40 + 1))
    assert torch.equal(got, rounded(1 + step / 2, dtype, device, seed=2**40 + 1, skip=1))  # from any address
    up = (got > 1).double()
    others = [(rounded(1 + step / 2, dtype, device, seed=s) > 1).double() for s in (1, 2**40 + 2, 2**41 + 1)]
    others += [up.roll(k) for k in (1, 2, 3, 4, 8, ema.CHUNK // 4, ema.CHUNK // 2, ema.CHUNK, 2 * ema.CHUNK)]
    for other in others:  # agrees with independent bits half of the time
        assert abs((up == other).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(up))
    # Four neighbours share a counter: all their patterns are equally frequent.
    patterns = (up.view(-1, 4) @ torch.tensor([1.0, 2, 4, 8], dtype=torch.float64, device=device)).int()
    frequency = torch.bincount(patterns, minlength=16) / len(patterns)
    assert (frequency - 1 / 16).abs().max().item() < 5 * math.sqrt(1 / 16 * 15 / 16 / len(patterns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_targets_are_not_rounded_at_random(dtype, device):
    one, two = (randn(50, dtype=dtype).to(device) for _ in range(2))
    source, low = randn(50, seed=1, dtype=dtype).to(device), torch.zeros(3, dtype=torch.bfloat16, device=device)
    sk.ema_update_([one], [source], 0.9, impl="triton")
    sk.ema_update_([two, low], [source, low + 1], 0.9, stochastic_rounding=True, impl="triton")
    assert torch.equal(one, two)
