"""Train once: a method of the package, driven by plain PyTorch, with the losses of the package or eager ones.

Both runs of a method share everything but the loss and the moving average: seed, initial weights, order of the
batches, augmentations, optimizer. Whole float32 runs drift apart by rounding alone, because training multiplies small
differences: losses, gradients and averages are compared on the inputs of single steps.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import eager
from selfsup_kernels.lab.demo import data
from selfsup_kernels.lab.profile import parts, steps
from selfsup_kernels.lab.profile.workload import convolutions, head, make_eager

FEATURES, EMBEDDING = 256, 128
"""Widths of the encoder's output, which the evaluation reads, and of the rows that the losses read."""


class Recipe(NamedTuple):
    """Chosen on a validation part of the training digits; the test digits played no part."""

    views: int
    steps: int
    learning_rate: float
    temperature: float = 0.5
    momentum: float = 0.97
    batch: int = 256
    weight_decay: float = 1e-4


RECIPES = {
    "contrastive": Recipe(views=4, steps=250, learning_rate=5e-3),
    "byol": Recipe(views=2, steps=600, learning_rate=5e-3),
}
LOSSES = ("eager", "ours")
LIMITS = {"loss_ours_eager": 1e-5, "gradient_ours_eager": 1e-4, "ema_ours_eager": 1e-5}
"""Relative; float32 rounds to 6e-8, and sums over a thousand rows collect a few dozen of those."""
TIMES = {
    "encoder": (parts.ENCODER_FORWARD, parts.ENCODER_BACKWARD),
    "loss": parts.LOSS,
    "ema": (parts.EMA,),
    "optimizer": (parts.OPTIMIZER,),
}
"""The demo's names for parts of a step."""


@dataclass
class Run:
    method: nn.Module
    losses: list = field(default_factory=list)
    times: dict = field(default_factory=dict)
    """Name of ``TIMES`` -> seconds."""
    checks: dict = field(default_factory=dict)
    """Name of a comparison -> the largest relative difference that any step showed."""


def encoder(width=24) -> nn.Sequential:
    """Make a small convolutional encoder of 8 x 8 digits."""
    layers = convolutions(1, (width, 1), (2 * width, 2), (4 * width, 2))
    flat = nn.Flatten(), nn.Linear(16 * width, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.ReLU(inplace=True)
    return nn.Sequential(*layers, *flat)


def build(name, loss, recipe, seed):
    torch.manual_seed(seed)
    networks = encoder(), head(FEATURES, FEATURES, EMBEDDING)
    if name == "contrastive":
        method = sk.methods.SimCLR(*networks, recipe.temperature)
    else:
        method = sk.methods.BYOL(*networks, head(EMBEDDING, FEATURES, EMBEDDING), recipe.momentum)
    if loss == "eager":
        make_eager(method)
    return method


def train(name, loss, images, recipe, seed, *, check_every=0, on_step=lambda value: None) -> Run:
    """Train by ``recipe`` under ``profile.steps``.

    ``check_every``: at steps 0, n, 2n, ... compare loss, gradient and moving average with eager ones of equal inputs.
    """
    method = build(name, loss, recipe, seed)
    run = Run(method)
    optimizer = torch.optim.AdamW(method.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    batches = data.batches(images, recipe.batch, recipe.views, recipe.steps, seed)
    inputs = []
    hook = method.loss.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
    with steps(method, trace=False, memory=False) as profile:
        for step, views in enumerate(profile(batches)):
            value = method(*views)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            checking = check_every and step % check_every == 0
            if checking:
                check_loss(run.checks, inputs[-1], recipe.temperature)
            inputs.clear()
            if name == "byol":
                momentum = sk.cosine_momentum(step, recipe.steps, recipe.momentum)
                before = [p.detach().clone() for p in method.target.module.parameters()] if checking else None
                method.update_target(momentum)
                if checking:
                    check_average(run.checks, method, before, momentum)
            run.losses.append(value.item())
            on_step(f"loss {run.losses[-1]:.4f}")
    hook.remove()
    seconds = {row["part"]: row["seconds"] for row in profile.summary["parts"]}
    if profile.summary["steps"]["timed"]:
        run.times = {key: sum(seconds[p] for p in group) for key, group in TIMES.items() if seconds[group[0]]}
    return run


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


def worst(checks, name, x, y):
    """Keep the largest relative difference; a NaN stays."""
    x, y = x.detach().double(), y.detach().double()
    value = float((x - y).norm() / y.norm().clamp_min(1e-300))
    if name not in checks or math.isnan(value) or value > checks[name]:
        checks[name] = value


def agrees(checks) -> bool:
    """Tell whether all checks agree to rounding."""
    return bool(checks) and all(value <= LIMITS[name] for name, value in checks.items())
