"""Check that ours computes what eager computes, on the inputs that our run meets.

Two float32 runs drift apart by rounding alone, because training multiplies small differences.
"""

import math

import torch

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import eager

LIMITS = {"loss_ours_eager": 1e-5, "gradient_ours_eager": 1e-4, "ema_ours_eager": 1e-5}
"""Relative; float32 rounds to 6e-8, and sums over a thousand rows collect a few dozen of those."""


def check_loss(checks, inputs, temperature):
    """Compare value and gradient of both losses on the embeddings of a step: ``(views,)`` or BYOL's two."""
    views, *targets = (torch.stack(tuple(rows)).detach() for rows in inputs)
    views.requires_grad_()
    if targets:
        values = sk.byol_loss(views, *targets), eager.byol_loss(views, *targets)
    else:
        values = sk.info_nce_loss(views, temperature=temperature), eager.info_nce_loss(views, temperature)
    worst(checks, "loss_ours_eager", *values)
    worst(checks, "gradient_ours_eager", *(torch.autograd.grad(value, views)[0] for value in values))


def check_average(checks, method, before, momentum):
    """Compare the target, which was ``before``, with an eager moving average from the same start."""
    expected = torch._foreach_lerp(before, [p.detach() for p in method.online.parameters()], 1 - momentum)
    for ours, other in zip(method.target.module.parameters(), expected, strict=True):
        worst(checks, "ema_ours_eager", ours, other)


def holds(checks) -> bool:
    """Tell whether all checks agree to rounding."""
    return bool(checks) and all(value <= LIMITS[name] for name, value in checks.items())


def worst(checks, name, x, y):
    """Keep the largest relative difference; a NaN stays."""
    x, y = x.detach().double(), y.detach().double()
    value = float((x - y).norm() / y.norm().clamp_min(1e-300))
    if name not in checks or math.isnan(value) or value > checks[name]:
        checks[name] = value
