"""Check averages of every pair of special numbers, whose difference may not be finite, on the CPU and on a GPU."""

import math

import torch

import selfsup_kernels as sk

MOMENTA = [0.0, 0.25, 0.5, 0.75, 0.996, 1.0]


def numbers(dtype):
    """Return NaN, infinities, zeros of both signs, and the smallest normal and largest finite numbers."""
    info = torch.finfo(dtype)
    positive = torch.tensor([math.inf, 0.0, 1.5, info.smallest_normal, info.max], dtype=dtype)
    return torch.cat([positive, -positive, torch.tensor([math.nan], dtype=dtype)])


def pairs(target_dtype, source_dtype, repeats=7):
    """Return (target, source): every pair of special numbers among ordinary ones, at the ends of vectors and inside."""
    t, s = numbers(target_dtype), numbers(source_dtype)
    t, s = t.repeat_interleave(len(s)).repeat(repeats), s.repeat(len(t)).repeat(repeats)
    ordinary = (torch.arange(t.numel()) // 11) % 3 == 0  # stretches without a special number
    t[ordinary], s[ordinary] = 0.75, -1.25
    return t, s


def mean(t, s, momentum):
    """Return ``m t + (1 - m) s`` of two numbers; an infinity of weight 0 is ignored, and NaN stays NaN."""
    if math.isnan(t) or math.isnan(s):
        return math.nan
    if momentum in (0, 1):
        return t if momentum else s
    return momentum * t + (1 - momentum) * s


def check(impl, target_dtype, source_dtype, momentum, device="cpu", **arguments):
    t, s = pairs(target_dtype, source_dtype)
    wide = torch.float64 if target_dtype == torch.float64 else torch.float32
    seen = s.to(wide)  # the kernel first rounds a float64 source to the dtype of the arithmetic
    want = torch.tensor([mean(*x, momentum) for x in zip(t.tolist(), seen.tolist(), strict=True)], dtype=torch.float64)
    got = t.to(device, copy=True)
    sk.ema_update_([got], [s.to(device)], momentum, impl=impl, **arguments)
    got = got.cpu().double()
    info = torch.finfo(target_dtype)
    kind = f"{target_dtype} {source_dtype} {momentum}"
    assert torch.equal(got.isnan(), want.isnan()), kind
    # A result beyond the largest number after rounding is infinite; so is a float32 source beyond float16's range.
    infinite = want.to(target_dtype).isinf()
    assert torch.equal(got[infinite], want.to(target_dtype).double()[infinite]), kind
    finite = want.isfinite() & ~infinite
    sizes = [x.double().abs().nan_to_num(0, 0)[finite] for x in (t, seen)]
    allowed = info.eps * (2 if arguments else 1) * want[finite].abs() + info.smallest_normal * info.eps
    allowed += 4 * torch.finfo(wide).eps * (momentum * sizes[0] + (1 - momentum) * sizes[1])
    assert ((got[finite] - want[finite]).abs() <= allowed).all(), kind
    if momentum in (0, 1) and not arguments:  # exactly one of the two numbers, even if the other is infinite
        own, other = (t, s) if momentum else (s, t)
        exact = other.isinf() & ~own.isnan() & finite
        assert torch.equal(got[exact], own[exact].to(target_dtype).double()), kind
        assert torch.equal(got[exact].signbit(), own[exact].signbit()), kind
