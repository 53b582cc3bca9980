"""Error bounds relative to float64 results.

A case within the plain bound (a few roundings, relative to the norm) is right. If rows are degenerate or temperatures
low, a gradient is a small difference of large terms, and no kernel can be accurate relative to its norm. A kernel can
only be expected to return the exact result for inputs a few roundings away, summed in any order. So the bound grows by

- `SPREAD` times the largest deviation of the dense float64 loss over a few draws, in which rows, scores and the
  temperature are perturbed at random by one rounding (``info_nce_bounds.moved``);
- the rounding of sums over n columns: the square root of n roundings of the terms' absolute sum
  (``info_nce_bounds.mass``), which is small if the loss is.

If the error exceeds even that, the contract of docs/numerics.md still allows twice the error of the eager loss in the
same dtype. The run counts such cases separately.
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
    """Return the relative spacing of ``impl``'s numbers: (unit rows, scores and sums).

    See docs/numerics.md, "Precision": CPUs compute in float32, also for 16-bit inputs. GPUs keep 16-bit rows in 16
    bits, and also the coefficient matrix of the gradient's product; a float32 product is three TF32 products, and
    tensor cores truncate when they accumulate.
    """
    if dtype == torch.float64:
        return 2.0**-50, 2.0**-50  # the dense loss itself is off by as much
    if impl in GPU_IMPLS:
        return 2.0**-22 if dtype == torch.float32 else torch.finfo(dtype).eps / 2, 2.0**-21
    return 2.0**-23, 2.0**-23


def relative(dtype):
    """Return the plain bound, relative to the result's norm: for 16 bits twice the rounding of the result; for float32
    a twentieth of what the project's tests allow (tests/helpers.py: FLOAT32_BOUND)."""
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype) or torch.finfo(dtype).eps


def spacing(dtype):
    """Return the spacing of numbers next to zero. On GPUs subnormal numbers may be flushed to zero."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def clipped(x, dtype):
    """Return ``x`` in float64, clamped to the range of ``dtype``: a result beyond it is infinite or the largest number
    (the gradient of a zero row in float16: docs/numerics.md, "Zero rows")."""
    most = torch.finfo(dtype).max
    return x.detach().cpu().double().clamp(-most, most)


def outcome(name, got, want, plain, further, eager, weight=None):
    """Return a note if only eager's error explains the result, "" if the bound holds; raise Wrong otherwise.

    ``plain`` is a number. ``further`` and ``eager`` are functions, called if the error exceeds it: they return a
    further allowance and the eager result (None in float64, where eager is exact). ``weight`` scales the elements
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
    """Return (outcome, message) of a case from the notes on its results."""
    notes = [note for note in notes if note]
    return ("as eager", "; ".join(notes)) if notes else ("right", "")


def rounding_of_result(dtype, weight, dim, place):
    """Return the absolute rounding error of results below the smallest normal number."""
    step = spacing(dtype) if place.impl not in GPU_IMPLS else max(spacing(dtype), torch.finfo(torch.float32).tiny)
    return step * weight.norm().item() * math.sqrt(dim)


class Eager:
    """The results of the dense loss in the case's own dtype, computed on demand."""

    def __init__(self, dtype, run):
        self.dtype, self.run = dtype, functools.cache(run)

    def __call__(self, which):
        return None if self.dtype == torch.float64 else lambda: self.run()[which]
