"""How far a result may be from float64's.

A case in which the plain bound (a few roundings, relative to the norm) holds is right. Where rows are degenerate or
temperatures low, a gradient is a small difference of large terms, and no kernel can be near it relative to its norm.
What a kernel can be asked for is the exact result of numbers a few roundings away, added up in any order. So there

- the dense loss in float64 is computed of rows, scores and temperatures that are moved at random by one rounding
  (``info_nce_bounds.moved``): `SPREAD` times the farthest of a few draws is allowed;
- and the rounding of sums over n columns, the square root of n times one of their terms' absolute sum
  (``info_nce_bounds.mass``), which is small where the loss is.

Where even that is passed, the contract of docs/numerics.md still allows twice the error of the eager loss in the same
dtype. The run counts such cases apart.
"""

import functools
import math

import torch

GPU_IMPLS = ("triton", "cuda")
SPREAD = 8
DRAWS = 4


class Wrong(AssertionError):
    """A result that no bound explains."""


def rounding(dtype, impl):
    """(of unit rows, of scores and sums): the relative spacing of the numbers that ``impl`` computes with.

    docs/numerics.md, "Precision": float32 on CPUs, also of 16 bits. On GPUs rows have the dtype's 16 bits, and so has
    the matrix that the gradient is a product of; a float32 product is made of three of TF32, and tensor cores cut off
    what they add up.
    """
    if dtype == torch.float64:
        return 2.0**-50, 2.0**-50  # the dense loss itself is off by as much
    if impl in GPU_IMPLS:
        return 2.0**-22 if dtype == torch.float32 else torch.finfo(dtype).eps / 2, 2.0**-21
    return 2.0**-23, 2.0**-23


def relative(dtype):
    """The part of a result's norm that it may be off by without a further reason: of 16 bits twice the rounding of the
    result; of float32 a twentieth of what the project's tests allow (tests/helpers.py: FLOAT32_BOUND)."""
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype) or torch.finfo(dtype).eps


def spacing(dtype):
    """Of the numbers next to zero. On GPUs numbers below the normal ones may be zero."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def clipped(x, dtype):
    """``x`` in float64, with the largest number of ``dtype`` for what is beyond it: there a result is infinite, or that
    number (the gradient of a zero row in float16: docs/numerics.md, "Zero rows")."""
    most = torch.finfo(dtype).max
    return x.detach().cpu().double().clamp(-most, most)


def outcome(name, got, want, plain, further, eager, weight=None):
    """What to say of a result that only eager's error explains; "" where the bound holds.

    ``plain`` is a number. ``further`` and ``eager`` are functions, called where it is passed: what else the result may
    be off by, and the eager result (None in float64, where it is the right value). ``weight`` scales the elements
    before their norm is taken.
    """
    if got.shape != want.shape:
        raise Wrong(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    within = clipped(want, got.dtype)

    def error(x):
        off = clipped(x, got.dtype) - within
        return (off if weight is None else off * weight).norm().item()

    off, allowed = error(got), plain
    if off <= allowed:
        return ""
    allowed += further()
    if off <= allowed:
        return ""
    theirs = 0.0 if eager is None else error(eager())
    size = (within if weight is None else within * weight).norm().item()
    said = f"{name}: error {off:.3e} > {allowed:.3e} (norm {size:.3e}; eager's error {theirs:.3e})"
    if not (math.isfinite(theirs) and off <= 2 * theirs):
        raise Wrong(said)
    return said


def worst(notes):
    """(outcome, message) of a case, of the notes of its results."""
    notes = [note for note in notes if note]
    return ("as eager", "; ".join(notes)) if notes else ("right", "")


def rounding_of_result(dtype, weight, dim, place):
    """Results below the smallest normal number are off by an absolute step."""
    step = spacing(dtype) if place.impl not in GPU_IMPLS else max(spacing(dtype), torch.finfo(torch.float32).tiny)
    return step * weight.norm().item() * math.sqrt(dim)


class Eager:
    """The results of the dense loss in the case's own dtype, computed where one is asked for."""

    def __init__(self, dtype, run):
        self.dtype, self.run = dtype, functools.cache(run)

    def __call__(self, which):
        return None if self.dtype == torch.float64 else lambda: self.run()[which]
