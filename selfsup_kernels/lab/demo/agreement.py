"""Whether ours computes what eager computes: on the same inputs, step by step, and over whole curves.

Two training runs that differ by rounding drift apart, because training multiplies small differences. So the strict
check takes the inputs that our run met and evaluates everything on them.
"""

import math
from contextlib import contextmanager

import numpy as np
import torch

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.lab.bench import eager

LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
"""Relative; float32 rounds to 6e-8, and sums over a thousand rows collect a few dozen of those."""
FLOAT64_LIMIT = 1e-9


def check_loss(checks, inputs, recipe):
    """Value and gradient on the embeddings of this step: ours and eager in float32, both against float64."""
    if len(inputs) == 1:
        ours = _value_and_gradient(lambda z: sk.info_nce_loss(z, temperature=recipe.temperature), *inputs)
        theirs = _value_and_gradient(lambda z: eager.info_nce_loss(z, recipe.temperature), *inputs)
        exact = _value_and_gradient(lambda z: spec.info_nce_loss(z, temperature=recipe.temperature), *_double(inputs))
    else:
        ours = _value_and_gradient(sk.byol_loss, *inputs)
        theirs = _value_and_gradient(eager.byol_loss, *inputs)
        exact = _value_and_gradient(spec.byol_loss, *_double(inputs))
    for pair, a, b in (("ours_eager", ours, theirs), ("ours_exact", ours, exact), ("eager_exact", theirs, exact)):
        for part, x, y in zip(("loss", "gradient"), a, b, strict=True):
            _worst(checks, f"{part}_{pair}", _relative(x, y))


@contextmanager
def checked_update(checks, method, momentum, active):
    """Around an update of the target: the eager moving average, from the same start, must end where it does."""
    if not active:
        yield
        return
    before = [p.detach().clone() for p in method.target.module.parameters()]
    yield
    expected = torch._foreach_lerp(before, [p.detach() for p in method.online.parameters()], 1 - momentum)
    pairs = zip(method.target.module.parameters(), expected, strict=True)
    _worst(checks, "ema_ours_eager", max(_relative(p, e) for p, e in pairs))


def compare_curves(first, second, beginning) -> dict:
    """Largest relative difference of two loss curves, over their beginning and over all steps."""
    difference = np.abs(np.subtract(first, second)) / np.abs(second)
    return {"beginning": float(difference[:beginning].max()), "all": float(difference.max()), "steps": beginning}


def holds(checks, float64) -> bool:
    """Agreement to rounding: every check on common inputs, and the curves in float64."""
    fine = all(
        value <= (GRADIENT_LIMIT if name.startswith("gradient") else LOSS_LIMIT) for name, value in checks.items()
    )
    return bool(checks) and fine and float64["all"] <= FLOAT64_LIMIT


def _value_and_gradient(loss, views, *targets):
    views = torch.stack(tuple(views)).requires_grad_()
    value = loss(views, *(torch.stack(tuple(t)) for t in targets))
    return value.detach(), torch.autograd.grad(value, views)[0]


def _double(inputs):
    return [[x.double() for x in views] for views in inputs]


def _relative(x, y) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp_min(1e-300))


def _worst(checks, name, value):
    # A NaN, once met, stays: no comparison may drop it.
    if name not in checks or math.isnan(value) or value > checks[name]:
        checks[name] = value
