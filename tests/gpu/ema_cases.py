"""Shared code of the moving average's GPU tests: tensors of every kind, and the error bound."""

import torch
from helpers import randn

import selfsup_kernels as sk

FLOATING = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LOW = [torch.bfloat16, torch.float16]
CHUNK = 4096  # elements per block for float32 and mixed pairs


def truth(target, source, momentum):
    return momentum * target.double() + (1 - momentum) * source.double()


def assert_rounded(got, want, target, source):
    """Assert that the error is at most a few roundings in the arithmetic's dtype and one to the target's."""
    info = torch.finfo(got.dtype)
    arithmetic = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    terms = target.double().abs() + source.double().abs()
    allowed = info.eps / 2 * (want.abs() + info.tiny) + 4 * arithmetic.eps * terms
    excess = ((got.double() - want).abs() - allowed).max().item()
    assert excess <= 0, f"error beyond rounding by {excess:.3e}"


def check(impl, targets, sources, momentum, **arguments):
    before, kept = [t.clone() for t in targets], [s.clone() for s in sources]
    sk.ema_update_(targets, sources, momentum, impl=impl, **arguments)
    for t, b, s, k in zip(targets, before, sources, kept, strict=True):
        assert torch.equal(s, k)
        if t.is_floating_point() and t.numel():
            assert_rounded(t, truth(b, s, float(momentum)), b, s)
        else:
            assert torch.equal(t, s)


def bits(dtype, count, seed=0):
    """Return numbers with random bits; bools of both values."""
    if dtype == torch.bool:
        return randn(count, seed=seed) > 0
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (count * dtype.itemsize,), generator=generator).to(torch.int8).view(dtype)


def mixed(device, shift=0):
    """Return (targets, sources) of every pair of floating dtypes and every integer dtype, an empty one and a scalar."""
    pairs = [(t, s) for t in FLOATING for s in FLOATING]
    targets = [randn(5 + i, dtype=t, seed=i + shift) for i, (t, _) in enumerate(pairs)]
    sources = [randn(5 + i, dtype=s, seed=50 + i + shift) for i, (_, s) in enumerate(pairs)]
    targets += [bits(t, 9) for t in INTEGERS] + [torch.zeros(0, 3), torch.tensor(2.0)]
    sources += [bits(t, 9, seed=1) for t in INTEGERS] + [torch.zeros(0, 3), torch.tensor(4.0)]
    return [t.to(device) for t in targets], [s.to(device) for s in sources]
