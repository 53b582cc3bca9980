"""Measure how far losses, gradients and averages are from float64."""

import math

import torch

from selfsup_kernels.lab.bench import baselines, eager
from selfsup_kernels.lab.bench.workloads import MOMENTUM

OPERATIONS = {"cpu": 5e11, "cuda": 2e14}
"""The most operations of the float64 reference of a loss; beyond it nothing is checked."""

MATCH = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Errors up to these, relative to float64, are the rounding of the type."""
DIFFERENT = 1e-2
"""Larger errors, if they are more than rounding, come from another loss, not from arithmetic."""


def worst(row, name):
    """Return the largest error of a column, infinite where one is not finite; None where none is known."""
    found = {key: value for key, value in row["errors"].get(name, {}).items() if key != "rows"}
    return max((math.inf if value is None else value for value in found.values()), default=None)


def rounding(row):
    """Return the largest error that the type of a row explains; the targets of the EMA are float32."""
    return MATCH["float32" if row["op"] == "ema" else row["dtype"]]


def is_different(row, name):
    """Tell whether a column computes something else than float64 does."""
    return (worst(row, name) or 0) > max(DIFFERENT, rounding(row))


def relative(got, want):
    """Return the error in the 2-norm; None where it is not finite, which JSON has no number for."""
    error = ((got.double() - want).norm() / want.norm()).item()
    return error if math.isfinite(error) else None


def with_gradient(function, inputs):
    """Return the loss and the gradient of the first input."""
    loss = function(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs[0])[0]


def truth(case, inputs):
    """Return loss and gradient for the same numbers in float64; of InfoNCE blockwise, so that no matrix is held."""
    wide = [x.detach().double() for x in inputs]
    function = eager.byol_loss if case.op == "byol" else case.ours("reference")
    return with_gradient(function, [wide[0].requires_grad_(), *wide[1:]])


def judge(case, inputs):
    """Return a function ``(name, baseline's function) -> errors``."""
    if case.op == "ema":
        return lambda name, function: {"value": average_error(function, *inputs)}
    if case.op == "siglip" and 6 * case.batch**2 * case.dim > OPERATIONS[inputs[0].device.type]:
        raise baselines.Unsupported("takes too long at this size")
    if case.op == "info_nce" and 8 * case.rows**2 * case.dim > OPERATIONS[inputs[0].device.type]:
        raise baselines.Unsupported("takes too long at this size")
    want = truth(case, inputs)
    return lambda name, function: dict(
        zip(("loss", "gradient"), map(relative, with_gradient(function, inputs), want), strict=True)
    )


def average_error(update, targets, sources):
    """Return the largest error among the tensors of one update."""
    averages = update.copies if isinstance(update, baselines.Average) else targets
    with torch.no_grad():
        want = [t.double().lerp(s.double(), 1 - MOMENTUM) for t, s in zip(averages, sources, strict=True)]
        update(targets, sources)
        found = [relative(t, x) for t, x in zip(averages, want, strict=True)]
        return None if None in found else max(found)
