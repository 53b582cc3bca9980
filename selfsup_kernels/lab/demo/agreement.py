"""Checks that ours computes what eager computes, on the inputs that our run meets.

Two float32 runs drift apart by rounding alone, because training multiplies small differences.
"""

import math

import torch

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import eager

LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
"""Relative; float32 rounds to 6e-8, and sums over a thousand rows collect a few dozen of those."""


def check_loss(checks, inputs, temperature):
    """Compare value and gradient of both losses on the embeddings of a step: ``(views,)`` or BYOL's two."""
    if len(inputs) == 1:
        ours = _value_and_gradient(lambda z: sk.info_nce_loss(z, temperature=temperature), *inputs)
        theirs = _value_and_gradient(lambda z: eager.info_nce_loss(z, temperature), *inputs)
    else:
        ours = _value_and_gradient(sk.byol_loss, *inputs)
        theirs = _value_and_gradient(eager.byol_loss, *inputs)
    for name, x, y in zip(("loss_ours_eager", "gradient_ours_eager"), ours, theirs, strict=True):
        worst(checks, name, _relative(x, y))


def check_average(checks, method, before, momentum):
    """Compare the target, which was ``before``, with an eager moving average from the same start."""
    expected = torch._foreach_lerp(before, [p.detach() for p in method.online.parameters()], 1 - momentum)
    pairs = zip(method.target.module.parameters(), expected, strict=True)
    worst(checks, "ema_ours_eager", max(_relative(p, e) for p, e in pairs))


def holds(checks) -> bool:
    """Whether all checks agree to rounding."""
    limits = {name: GRADIENT_LIMIT if name.startswith("gradient") else LOSS_LIMIT for name in checks}
    return bool(checks) and all(checks[name] <= limits[name] for name in checks)


def worst(checks, name, value):
    """Keep the largest value; a NaN stays."""
    if name not in checks or math.isnan(value) or value > checks[name]:
        checks[name] = value


def _value_and_gradient(loss, views, *targets):
    views = torch.stack([view.detach() for view in views]).requires_grad_()
    value = loss(views, *(torch.stack(tuple(t)) for t in targets))
    return value.detach(), torch.autograd.grad(value, views)[0]


def _relative(x, y) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp_min(1e-300))
