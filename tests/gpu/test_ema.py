"""Test the GPU kernels of the moving average: values, layouts, stochastic rounding.

Tests that need a GPU (streams, graphs, large tensors) are in test_ema_cuda.py.
"""

import ctypes
import math
import random

import extremes
import pytest
import torch
from ema_cases import CHUNK, FLOATING, INTEGERS, LOW, bits, check, mixed
from guard import guarded
from helpers import randn

import selfsup_kernels as sk
from selfsup_kernels.core import backends, ops

SIZES = [1, CHUNK - 1, 0, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 7]

IMPL = "cuda"


@pytest.fixture
def assert_launches(impl):
    """Return a function that asserts the number of kernels launched since its last call; on a GPU it does nothing."""
    seen, count = [0], None
    if backends.emulated("cuda"):
        count = ctypes.CDLL(str(backends.EMULATOR)).sk_emulator_launches
        count.restype = ctypes.c_uint64
        seen[0] = count()

    def check_count(expected):
        if count is not None:
            before, seen[0] = seen[0], count()
            assert seen[0] - before == expected

    return check_count


def op(impl, targets, sources, momentum_tensor, momentum, seed):
    ops.overload("ema_update_", impl)(targets, sources, momentum_tensor, momentum, seed)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_every_pair_of_dtypes(impl, target_dtype, source_dtype, device, assert_launches):
    targets = [randn(n, dtype=target_dtype, seed=n).to(device) for n in SIZES]
    sources = [randn(n, dtype=source_dtype, seed=n + 1).to(device) for n in SIZES]
    for momentum in (0.3, 0.996):
        check(impl, targets, sources, momentum)
    before = [t.clone() for t in targets]
    sk.ema_update_(targets, sources, 1.0, impl=impl)
    assert all(map(torch.equal, targets, before))
    if target_dtype == source_dtype:
        sk.ema_update_(targets, sources, 0.0, impl=impl)
        assert all(map(torch.equal, targets, sources))
    assert_launches(4 if target_dtype == source_dtype else 3)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_copied(impl, dtype, device):
    for momentum in (0.5, 1.0):
        sizes = (1, 17, CHUNK, CHUNK + 1)
        targets, sources = ([bits(dtype, n, seed + n).to(device) for n in sizes] for seed in (0, 1))
        check(impl, [*targets, bits(dtype, 70, 2).to(device)[1:]], [*sources, bits(dtype, 69, 3).to(device)], momentum)


def test_a_mixed_list_is_one_launch(impl, device, assert_launches):
    check(impl, *mixed(device), 0.75)
    assert_launches(1)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float64,) * 2]
)
def test_tensors_start_anywhere(impl, dtypes, device):
    """Tensors may start at any address; memory before and after a target is unchanged."""
    n = CHUNK + 9
    for skip_target, skip_source in [(0, 1), (1, 0), (3, 3), (4, 8), (8, 2)]:
        base, source = (randn(n + 16, dtype=d, seed=i).to(device) for i, d in enumerate(dtypes))
        before = base.clone()
        inside = slice(skip_target, skip_target + n)
        check(impl, [base[inside]], [source[skip_source : skip_source + n]], 0.7)
        assert torch.equal(base[: inside.start], before[: inside.start])
        assert torch.equal(base[inside.stop :], before[inside.stop :])


@pytest.mark.parametrize("size", [1, 17, CHUNK - 1, CHUNK, CHUNK + 3])
def test_nothing_is_touched_past_an_end(impl, size, device):
    """Each target and source ends at a guard page, and nothing past it is accessed."""
    pairs = [(t, s) for t in FLOATING for s in FLOATING]
    targets = [guarded(randn(size, dtype=t, seed=i).to(device)) for i, (t, _) in enumerate(pairs)]
    sources = [guarded(randn(size, dtype=s, seed=50 + i).to(device)) for i, (_, s) in enumerate(pairs)]
    check(impl, targets, sources, 0.9)
    targets, sources = ([guarded(bits(t, size, seed).to(device)) for t in INTEGERS] for seed in (0, 1))
    check(impl, targets, sources, 0.9)
    low = [guarded(randn(size, dtype=t).to(device)) for t in LOW]
    sk.ema_update_(low, [guarded(x + 1) for x in low], 0.9, stochastic_rounding=True, impl=impl)


def test_nan_and_infinity(impl, device):
    """NaN and infinities give the same result as the reference, also with stochastic rounding."""
    for dtype in FLOATING:
        for value in (math.nan, math.inf, -math.inf):
            for momentum in (0.25, 0.75):
                source = torch.ones(9, device=device).index_fill(0, torch.tensor([3, 7], device=device), value)
                targets = [torch.ones(9, dtype=dtype, device=device) for _ in range(3)]
                for target, by, at_random in zip(targets, ("reference", impl, impl), (0, 0, 1), strict=True):
                    target[2:4] = value
                    sk.ema_update_([target], [source], momentum, stochastic_rounding=bool(at_random), impl=by)
                    assert target.isfinite().tolist() == [i not in (2, 3, 7) for i in range(9)]
                for target in targets[1:]:
                    torch.testing.assert_close(target, targets[0], rtol=0, atol=0, equal_nan=True)
    # A GPU's NaN has all bits set; adding random bits to it would carry into the sign.
    target, source = torch.ones(3, dtype=torch.bfloat16, device=device), torch.full((3,), 2**31 - 1, device=device)
    sk.ema_update_([target], [source.int().view(torch.float32)], 0.5, stochastic_rounding=True, impl=impl)
    assert target.isnan().all()


@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_differences_that_are_not_finite(impl, target_dtype, source_dtype, device):
    """If an end is infinite or the difference overflows, the result is the sum m t + (1 - m) s."""
    for momentum in extremes.MOMENTA:
        extremes.check(impl, target_dtype, source_dtype, momentum, device)
    if target_dtype in LOW:
        extremes.check(impl, target_dtype, source_dtype, 0.75, device, stochastic_rounding=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_momentum_as_a_tensor(impl, dtype, device, assert_launches):
    """A momentum may be a tensor of any dtype, also an element of a larger one."""
    schedule = torch.tensor([0.0, 1.0, 0.8125, 0.1], dtype=dtype, device=device)
    for momentum in schedule:
        lists = [[x.to(device) for x in (randn(70, seed=s), randn(9, dtype=torch.float64, seed=s))] for s in (0, 1)]
        check(impl, *lists, momentum)


def test_a_momentum_is_float64(impl, device):
    """The momentum stays float64: as float32, 0.1 and so a float64 average would be off by 1.5e-9."""
    for momentum in (0.1, torch.tensor(0.1, dtype=torch.float64, device=device)):
        target, source = torch.zeros(3, dtype=torch.float64, device=device), torch.ones(3, device=device)
        sk.ema_update_([target], [source], momentum, impl=impl)
        assert (target - 0.9).abs().max() < 1e-15


# ---------------------------------------------------------------- empty work, and other layouts


def test_nothing_to_do(impl, device, assert_launches):
    same = torch.tensor([1.0, math.inf, 3.0], device=device)
    empty = torch.zeros(0, 4, device=device)
    sk.ema_update_([], [], 0.5, impl=impl)
    op(impl, [same, empty, same.view(1, 3)], [same.view(3), empty.clone(), same.view(1, 3)], None, 0.5, None)
    assert_launches(0)
    assert same.tolist() == [1.0, math.inf, 3.0]
    other = torch.zeros(2, device=device)
    op(impl, [same, other, empty], [same, other + 1, empty], None, 0.5, None)
    assert same.tolist() == [1.0, math.inf, 3.0]
    assert other.tolist() == [0.5, 0.5]
    assert_launches(1)


def channels_last(*shape, seed=0):
    return randn(*shape, seed=seed).to(memory_format=torch.channels_last)


def test_one_order_of_memory_is_one_run(impl, device, assert_launches):
    transposed = (randn(7, 5, 3, seed=s).to(device).permute(2, 0, 1) for s in (0, 1))
    one = (randn(6, 1, 4, seed=s).to(device).as_strided((6, 1, 4), (4, 99 + s, 1)) for s in (0, 1))
    images = (channels_last(4, 3, 5, 2, seed=s).to(device) for s in (0, 1))
    for target, source in (transposed, one, images):
        strides = target.stride()
        check(impl, [target], [source], 0.4)
        assert target.stride() == strides
    assert_launches(3)


@pytest.mark.parametrize("kind", ["transposed", "columns", "rows", "channels_last"])
@pytest.mark.parametrize("which", ["target", "source", "both"])
def test_other_layouts(impl, kind, which, device, assert_launches):
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
    check(impl, [target, plain[0], integers[0][0]], [source, plain[1], integers[1][1]], 0.6)
    assert_launches(1)
    if inside.data_ptr() in range(base.data_ptr(), base.data_ptr() + base.nbytes):
        inside.copy_(strided(before))
        assert torch.equal(base, before)  # memory between the elements is unchanged


@pytest.mark.parametrize("form", ["plain", "tensor momentum", "random"])
def test_opcheck(impl, form, device):
    targets, sources = mixed(device)
    momentum = torch.tensor(0.9, device=device) if form == "tensor momentum" else None
    seed = torch.tensor(3, device=device) if form == "random" else None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (targets, sources, momentum, 0.9, seed)
    torch.library.opcheck(ops.overload("ema_update_", impl), arguments, test_utils=tests)


def test_random_cases(impl, device):
    """Random lists are right: sizes around a chunk, any alignment, all pairs of dtypes."""
    choose = random.Random(0)
    for case in range(400 if device.type == "cuda" else 40):
        targets, sources, bases = [], [], []
        for _ in range(choose.randint(1, 6)):
            n = choose.choice([choose.randint(1, 70), CHUNK * choose.choice([1, 2]) + choose.randint(-2, 2), 12_345])
            pair = []
            for seed in (case, case + 1000):
                skip, scale = choose.choice([0, 0, 1, 3, 8]), choose.choice([1e-3, 1.0, 100.0])
                base = (randn(n + skip + 8, seed=seed) * scale).to(device, choose.choice(FLOATING))
                pair.append((base, slice(skip, skip + n)))
            bases.append((pair[0][0], pair[0][0].clone(), pair[0][1]))
            targets.append(pair[0][0][pair[0][1]])
            sources.append(pair[1][0][pair[1][1]])
        momentum = choose.choice([0.0, 0.1, 0.5, 0.9, 0.996, 1.0])
        as_tensor = torch.tensor(momentum, device=device, dtype=torch.float64)
        check(impl, targets, sources, choose.choice([momentum, as_tensor]))
        for base, before, inside in bases:
            base[inside] = before[inside]
            assert torch.equal(base, before)  # memory around a target is unchanged


@pytest.mark.parametrize("count", [118, 119, 200, 1100])
def test_lists_of_many_tensors(impl, count, device, assert_launches):
    """The table is a kernel argument: 4 KB hold a hundred tensors, 32 KB a thousand; more take another launch."""
    targets, sources = ([randn(1 + i % 7, seed=i + s).to(device) for i in range(count)] for s in (0, 1))
    targets[-1], sources[-1] = (randn(2 * CHUNK + 1, seed=s).to(device) for s in (0, 1))
    check(impl, targets, sources, 0.75)
    assert_launches(2 if count == 1100 else 1)


@pytest.mark.parametrize(
    ("target", "source", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(2), ValueError, "shape"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32), TypeError, "dtype"),
        (torch.zeros(1).expand(3), torch.zeros(3), RuntimeError, "share memory"),
        (None, None, RuntimeError, "overlaps"),
    ],
    ids=["shape", "integer", "expanded", "overlap"],
)
def test_what_is_refused(impl, target, source, error, message, device, assert_launches):
    if target is None:
        memory = torch.zeros(4, device=device)
        target, source = memory[:3], memory[1:]
    else:
        target = target.to(device) if target.is_contiguous() else torch.zeros(1, device=device).expand(3)
        source = source.to(device)
    with pytest.raises(error, match=message):
        sk.ema_update_([target], [source], 0.5, impl=impl)
    assert_launches(0)
    assert (target == 0).all()


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (lambda zeros: ([zeros(3)] * 3, [zeros(3)]), "one length"),
        (lambda zeros: ([zeros(3)], [zeros(2)]), "one shape"),
    ],
    ids=["length", "shape"],
)
def test_the_op_refuses(lists, message, impl, device):
    """The op itself also checks lengths and shapes, which the public function has already checked."""
    targets, sources = lists(lambda n: torch.zeros(n, device=device))
    with pytest.raises(RuntimeError, match=message):
        op(impl, targets, sources, None, 0.5, None)


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_it_is_the_cpu_op(target_dtype, source_dtype, impl, device):
    """Results equal the CPU op's up to rounding, and bit for bit if the arithmetic is exact, with any seed."""
    sizes = [5, 0, 2 * CHUNK + 3, 40, 3 * CHUNK]
    # The exponents cover the target's range, including float16's subnormal numbers and numbers too large for it.
    scales = [2.0**k for k in (0, 0, -14, -24, 6)]
    targets = [torch.zeros(n, dtype=target_dtype) for n in sizes]
    sources = [
        (randn(n, seed=i) * scale).to(source_dtype) for i, (n, scale) in enumerate(zip(sizes, scales, strict=True))
    ]
    if target_dtype == torch.float16:
        sources[0] = torch.tensor([65519.0, 65520, math.inf, -math.inf, math.nan]).to(source_dtype)
    for seed in (None, 0, 2**40 + 7, -5):
        for momentum in (0.0, 0.5, 0.996):
            exact = momentum in (0, 0.5)  # since the targets are zero
            both = []
            for name, place in (("cpu", "cpu"), (impl, device)):
                own = [t.to(place, copy=True) for t in targets]
                key = None if seed is None else torch.tensor(seed, device=place)
                op(name, own, [s.to(place) for s in sources], None, momentum, key)
                both.append([t.cpu() for t in own])
            for x, y in zip(*both, strict=True):
                if exact:
                    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
                elif seed is None:
                    torch.testing.assert_close(x, y, equal_nan=True)


# ---------------------------------------------------------------- stochastic rounding


def rounded(impl, value, dtype, device, count=1 << 14, seed=0, skip=0):
    """Round ``value`` stochastically ``count`` times, into a target that starts ``skip`` elements into its memory."""
    target = torch.zeros(count + skip, dtype=dtype, device=device)[skip:]
    source = torch.full((count,), value, device=device)
    op(impl, [target], [source], None, 0.0, torch.tensor(seed, device=device))
    return target


CASES = [(d, v) for d in LOW for v in (1 + 2**-10 / 3, -1 - 2**-7 / 3, 3.14159, -0.1, 2 - 2**-13, 40000.3)]
CASES += [(torch.float16, v) for v in (1e-6, 2**-24 * 0.25, -(2**-24) * 0.7, 2**-14 - 2**-26, -(2.0**-24) * 2**-8)]
CASES += [(torch.bfloat16, v) for v in (1.1e-39, -(2.0**-133) * 0.75, 2.0**-126 * (1 - 2**-9))]


@pytest.mark.parametrize(("dtype", "value"), CASES, ids=str)
def test_the_mean_is_exact(impl, dtype, value, device):
    value = torch.tensor(value).item()  # rounded to float32
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].double()
    low, high = every[every <= value].max().item(), every[every >= value].min().item()
    got = rounded(impl, value, dtype, device).double()
    assert low < value < high
    assert ((got == low) | (got == high)).all()
    share = (value - low) / (high - low)
    deviation = math.sqrt(share * (1 - share) / len(got))
    assert abs((got == high).double().mean().item() - share) < 5 * deviation


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_needs_no_rounding_stays(impl, dtype, device):
    info = torch.finfo(dtype)
    for value in (0.0, -0.0, 1.0, -1.5, info.max, -info.max, info.tiny, -info.tiny * info.eps):
        got = rounded(impl, value, dtype, device, count=64)
        assert (got.double() == value).all()
        assert (torch.signbit(got) == (value < 0)).all() or value == 0  # the arithmetic determines a zero's sign
    step = 2.0 ** (math.frexp(info.max)[1]) * info.eps / 2
    for sign in (1, -1):  # infinity only if rounding to nearest gives it
        assert (rounded(impl, sign * (info.max + 0.49 * step), dtype, device, 64).double() == sign * info.max).all()
        assert (rounded(impl, sign * (info.max + 0.51 * step), dtype, device, 64) == sign * math.inf).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_seeds_and_streams(impl, dtype, device):
    step = torch.finfo(dtype).eps
    got = rounded(impl, 1 + step / 2, dtype, device, seed=2**40 + 1)
    assert torch.equal(got, rounded(impl, 1 + step / 2, dtype, device, seed=2**40 + 1))
    assert torch.equal(got, rounded(impl, 1 + step / 2, dtype, device, seed=2**40 + 1, skip=1))  # from any address
    up = (got > 1).double()
    others = [(rounded(impl, 1 + step / 2, dtype, device, seed=s) > 1).double() for s in (1, 2**40 + 2, 2**41 + 1)]
    others += [up.roll(k) for k in (1, 2, 3, 4, 8, CHUNK // 4, CHUNK // 2, CHUNK, 2 * CHUNK)]
    for other in others:  # agrees with independent bits half of the time
        assert abs((up == other).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(up))
    # Groups of four elements are independent: all 16 patterns are equally frequent.
    patterns = (up.view(-1, 4) @ torch.tensor([1.0, 2, 4, 8], dtype=torch.float64, device=device)).int()
    frequency = torch.bincount(patterns, minlength=16) / len(patterns)
    assert (frequency - 1 / 16).abs().max().item() < 5 * math.sqrt(1 / 16 * 15 / 16 / len(patterns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_targets_are_not_rounded_at_random(impl, dtype, device):
    one, two = (randn(50, dtype=dtype).to(device) for _ in range(2))
    source, low = randn(50, seed=1, dtype=dtype).to(device), torch.zeros(3, dtype=torch.bfloat16, device=device)
    sk.ema_update_([one], [source], 0.9, impl=impl)
    sk.ema_update_([two, low], [source, low + 1], 0.9, stochastic_rounding=True, impl=impl)
    assert torch.equal(one, two)
