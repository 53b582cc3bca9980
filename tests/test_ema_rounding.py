"""Stochastic rounding of ema_update_: unbiased, exact for representable values, repeatable."""

import math

import pytest
import torch
from helpers import randn

import selfsup_kernels as sk

LOW = [torch.bfloat16, torch.float16]


def round_many(impl, value, dtype, count=1 << 16, seed=0, momentum=0.0):
    """Round ``value``, exact in float32, stochastically many times."""
    targets = [torch.zeros(count // 2, dtype=dtype), torch.zeros(2, count // 4, dtype=dtype)]
    sources = [torch.full(t.shape, value) for t in targets]
    generator = torch.Generator().manual_seed(seed)
    sk.ema_update_(targets, sources, momentum, stochastic_rounding=True, generator=generator, impl=impl)
    return torch.cat([t.flatten() for t in targets])


def neighbours(value, dtype):
    """Return the two numbers of ``dtype`` around ``value``, found by search over all 2^16 of them."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].double()
    return every[every <= value].max().item(), every[every >= value].min().item()


VALUES = [1.0 + 2**-10 / 3, -1.0 - 2**-7 / 3, 3.14159, -0.1, 1e-5, 0.99999, 2.0 - 2**-13, -1e-7, 40000.3]
FP16_SUBNORMALS = [1e-6, 2.0**-24 * 0.25, -(2.0**-24) * 0.7, 2.0**-14 - 2.0**-26, 6.1e-5]
BF16_SUBNORMALS = [1.1e-39, -(2.0**-133) * 0.75, 2.0**-126 * (1 - 2**-9)]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, v) for v in VALUES + FP16_SUBNORMALS] + [(torch.bfloat16, v) for v in VALUES + BF16_SUBNORMALS],
)
def test_stochastic_rounding_is_unbiased(impl, dtype, value):
    value = torch.tensor(value).item()  # rounded to float32
    got = round_many(impl, value, dtype).double()
    low, high = neighbours(value, dtype)
    assert low < value < high
    assert ((got == low) | (got == high)).all()
    share = (value - low) / (high - low)
    deviation = math.sqrt(share * (1 - share) / got.numel())
    assert abs((got == high).double().mean().item() - share) < 5 * deviation


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_keeps_representable_values(impl, dtype):
    info = torch.finfo(dtype)
    for value in (0.0, -0.0, 1.0, -1.5, info.max, -info.max, info.tiny, info.tiny * info.eps):
        got = round_many(impl, value, dtype, count=256)
        assert (got.double() == value).all()
    for value in (math.inf, -math.inf):
        assert (round_many(impl, value, dtype, count=256, momentum=0.75) == value).all()
    assert round_many(impl, math.nan, dtype, count=256).isnan().all()


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_overflows_only_where_nearest_does(impl, dtype):
    largest = torch.finfo(dtype).max
    spacing = largest - neighbours(largest * (1 - 1e-6), dtype)[0]
    for sign in (1, -1):
        below = torch.tensor(sign * (largest + 0.49 * spacing)).item()
        assert (round_many(impl, below, dtype, count=4096).double() == sign * largest).all()
        above = torch.tensor(sign * (largest + 0.51 * spacing)).item()
        assert round_many(impl, above, dtype, count=4096).isinf().all()


@pytest.mark.parametrize("dtype", LOW)
def test_seeds_repeat_and_differ(impl, dtype):
    value = 1 + 1e-4
    first = round_many(impl, value, dtype, seed=1)
    assert torch.equal(first, round_many(impl, value, dtype, seed=1))
    assert not torch.equal(first, round_many(impl, value, dtype, seed=2))
    half = len(first) // 2
    assert not torch.equal(first[:half], first[half:])  # one call, two tensors: two streams
    assert not torch.equal(first[: half // 2], first[half // 2 : half])


def test_the_default_generator_advances_with_every_call(impl):
    torch.manual_seed(0)
    states = []
    for _ in range(2):
        target = torch.zeros(4096, dtype=torch.bfloat16)
        sk.ema_update_([target], [torch.full((4096,), 1.001)], 0.0, stochastic_rounding=True, impl=impl)
        states.append(target)
    assert not torch.equal(*states)


def test_a_bfloat16_target_moves_only_with_stochastic_rounding(impl):
    """2,000 steps from 1 to 2 at momentum 0.999 end at 1.865; round-to-nearest stays at 1."""
    source = torch.full((2048,), 2.0, dtype=torch.bfloat16)
    stuck, moving = torch.ones(2048, dtype=torch.bfloat16), torch.ones(2048, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        sk.ema_update_([stuck], [source], 0.999, impl=impl)
        sk.ema_update_([moving], [source], 0.999, stochastic_rounding=True, generator=generator, impl=impl)
    assert (stuck == 1).all()
    assert moving.double().mean().item() == pytest.approx(2 - 0.999**2000, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stochastic_rounding_leaves_wide_targets_exact(impl, dtype):
    targets = [randn(50, dtype=dtype) for _ in range(2)]
    source = randn(50, seed=1, dtype=dtype)
    sk.ema_update_(targets[:1], [source], 0.9, impl=impl)
    sk.ema_update_(targets[1:], [source], 0.9, stochastic_rounding=True, impl=impl)
    assert torch.equal(*targets)
