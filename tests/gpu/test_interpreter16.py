"""Test the 16-bit operations that kernels use, in Triton's interpreter patched by interpreter16.py and on a GPU."""

import math

import interpreter16
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import LOW_PRECISION, randn
from triton.runtime.errors import InterpreterError

from selfsup_kernels.core import backends

IMPL = "triton"
pytestmark = pytest.mark.usefixtures("impl")


@triton.jit
def dot_kernel(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROUND: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + n[:, None] * K + k[None, :])
    if ROUND:  # an operand that the kernel has computed, as in the gradient
        a = (a.to(tl.float32) * 0.3).to(a.dtype)
    total = tl.zeros((M, N), tl.float32)
    total = tl.dot(a, tl.trans(b), total)
    tl.store(out + m[:, None] * N + n[None, :], total)


@triton.jit
def convert_kernel(x, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a - b)
    tl.store(out + 2 * N + i, a * b)
    tl.store(out + 3 * N + i, tl.where(a < b, b, a))
    tl.store(out + 4 * N + i, tl.abs(a))
    tl.store(out + 5 * N + i, tl.full((N,), 1.5, a.dtype))
    tl.store(out + 6 * N + i, i)


@triton.jit
def reduction_kernel(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def sum_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_dot_is_exact_products_added_in_float32(device, dtype, rounded):
    x, y = (randn(32, 64, dtype=dtype, seed=s).to(device) for s in (0, 1))
    out = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](x, y, out, 32, 32, 64, rounded)
    a = (x.float() * 0.3).to(dtype) if rounded else x
    want = a.double() @ y.double().T
    # 64 additions, each truncated at worst; the error of 16-bit sums would be a hundred times larger.
    allowed = 64 * torch.finfo(torch.float32).eps * (a.double().abs() @ y.double().abs().T)
    assert ((out.double() - want).abs() <= allowed).all()


def converted(x, dtype):
    out = torch.empty(len(x), dtype=dtype, device=x.device)
    block = min(len(x), 1024)
    convert_kernel[(len(x) // block,)](x, out, block)
    return out


def test_float16_is_added_up_beyond_its_range(device):
    x = torch.full((32, 64), 200.0, dtype=torch.float16, device=device)
    out = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](x, x, out, 32, 32, 64, False)
    assert (out == 200.0 * 200 * 64).all()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_conversions_round_to_nearest_even(device, dtype, wide):
    """Conversions are right for ties around 1, numbers next to a tie, subnormal and largest numbers, and Inf."""
    info = torch.finfo(dtype)
    eps, tiny, step = info.eps, info.tiny * info.eps, 2.0 ** (math.frexp(info.max)[1]) * info.eps / 2
    cases = [(1 + eps / 2, 1.0), (1 + 3 * eps / 2, 1 + 2 * eps), (1 - eps / 4, 1.0), (1 - 3 * eps / 4, 1 - eps)]
    cases += [(1 + eps * 0.501, 1 + eps), (1 + eps * 0.499, 1.0), (1 + eps * 1.499, 1 + eps), (2 - eps * 0.3, 2.0)]
    cases += [(tiny * 0.5, 0.0), (tiny * 0.51, tiny), (tiny * 1.5, 2 * tiny), (info.tiny - tiny * 0.3, info.tiny)]
    cases += [(info.max + 0.49 * step, info.max), (info.max + step / 2, math.inf), (math.inf, math.inf)]
    if wide == torch.float64:  # rounded to float32 first, these would be ties
        cases += [(1 + eps / 2 + 2.0**-40, 1 + eps), (1 + 3 * eps / 2 - 2.0**-40, 1 + eps), (1e300, math.inf)]
    cases += [(-x, -y) for x, y in cases]
    cases += [(0.0, 0.0)] * (64 - len(cases))
    x, want = (torch.tensor(v, dtype=torch.float64, device=device) for v in zip(*cases, strict=True))
    assert torch.equal(converted(x.to(wide), dtype).double(), want)
    assert converted(torch.full((32,), math.nan, dtype=wide, device=device), dtype).isnan().all()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_every_number_comes_back(device, dtype, wide):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).to(device)
    there = converted(every, wide)
    torch.testing.assert_close(there, every.to(wide), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(converted(there, dtype), every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_arithmetic(device, dtype):
    x, y = (randn(64, dtype=dtype, seed=s).to(device) for s in (0, 1))
    out = torch.empty(7, 64, dtype=dtype, device=device)
    arithmetic_kernel[(1,)](x, y, out, 64)
    i = torch.arange(64, device=device).to(dtype)
    want = torch.stack([x + y, x - y, x * y, torch.maximum(x, y), x.abs(), torch.full_like(x, 1.5), i])
    assert torch.equal(out, want)


# ---------------------------------------------------------------- only in the interpreter


interpreted = pytest.mark.skipif(not backends.triton_is_interpreted(), reason="of Triton's interpreter")


def test_the_rounding_is_that_of_torch():
    numbers = (randn(1 << 16) * 10.0 ** (8 * randn(1 << 16, seed=1))).float()
    got = torch.from_numpy(interpreter16.narrow(numbers.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got, numbers.bfloat16())


@interpreted
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_reductions_in_16_bits_are_refused(device, dtype):
    with pytest.raises(InterpreterError, match="reductions and scans in 16 bits"):
        reduction_kernel[(1,)](torch.ones(32, dtype=dtype), torch.zeros(1, dtype=dtype), 32)


@interpreted
def test_integers_that_overflow_are_refused(device):
    for most in ((1 << 30) - 1, -(1 << 30)):
        x, out = torch.tensor([1, most], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        sum_kernel[(1,)](x, out, 2)
        assert torch.equal(out, 2 * x)
        with pytest.raises(InterpreterError, match="int32 overflows in add"):
            sum_kernel[(1,)](x + x.sign(), out, 2)


@interpreted
@pytest.mark.parametrize(
    "test",
    [
        lambda device: test_a_dot_is_exact_products_added_in_float32(device, torch.bfloat16, False),
        lambda device: test_conversions_round_to_nearest_even(device, torch.bfloat16, torch.float32),
        lambda device: test_conversions_round_to_nearest_even(device, torch.bfloat16, torch.float64),
        lambda device: test_every_number_comes_back(device, torch.bfloat16, torch.float64),
        lambda device: test_arithmetic(device, torch.bfloat16),
    ],
    ids=["dot", "from float32", "from float64", "to float64 and back", "arithmetic"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_interpreter_needs_it(test, device):
    """Without the patches these tests fail; if one passes, Triton has fixed its interpreter, and its patch can go."""
    with interpreter16.without(), pytest.raises((AssertionError, InterpreterError)):
        test(device)
