"""One training run: a method of the package, driven by plain PyTorch, with the losses of the package or eager ones.

Both runs of a method share everything but the loss and the moving average: seed, initial weights, order of the
batches, augmentations, optimizer.
"""

import time
from dataclasses import dataclass, field
from statistics import median

import torch

import selfsup_kernels as sk
from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import eager
from selfsup_kernels.lab.demo import agreement, data, networks


@dataclass(frozen=True)
class Recipe:
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


@dataclass
class Run:
    method: torch.nn.Module
    losses: list = field(default_factory=list)
    times: dict = field(default_factory=dict)
    """Part of a step -> its median seconds."""
    checks: dict = field(default_factory=dict)
    """What was compared -> the largest relative difference that any step showed."""


def build(name, loss, recipe, seed, dtype=torch.float32):
    """The method with our loss or the eager one, and the update of its target (None where it has none)."""
    torch.manual_seed(seed)
    encoder, projector = networks.encoder(), networks.head(networks.FEATURES)
    if name == "contrastive":
        method = sk.methods.CMC(encoder, projector, recipe.temperature, objective="supcon_out")
        update = None
        eager_loss = eager.InfoNCELoss(recipe.temperature)
    else:
        predictor = networks.head(networks.EMBEDDING)
        method = sk.methods.BYOL(encoder, projector, predictor, recipe.momentum)
        update = method.update_target
        eager_loss = eager.BYOLLoss()
    if loss == "eager":
        method.loss = eager_loss
        if update is not None:

            def update(momentum):
                eager.ema_update_(method.target.module, method.online, momentum)

    return method.to(dtype), update


def train(
    name,
    loss,
    images,
    recipe,
    seed,
    *,
    dtype=torch.float32,
    check_every=0,
    stop=None,
    nudge=False,
    on_step=lambda value: None,
) -> Run:
    """Train by ``recipe``, or its first ``stop`` steps.

    ``check_every``: at steps 0, n, 2n, ... compare loss, gradient and moving average with eager ones of equal inputs.
    ``nudge``: change every initial weight in its last bit, to see what rounding alone does to a run.
    """
    method, update = build(name, loss, recipe, seed, dtype)
    if nudge:
        _nudge(method)
    run = Run(method)
    clock = _TimedLoss(method.loss)
    method.loss = clock
    optimizer = torch.optim.AdamW(method.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    seconds = {part: [] for part in ("encoder", "loss", "ema", "optimizer")}
    for step, views in enumerate(data.batches(images, recipe.batch, recipe.views, stop or recipe.steps, seed)):
        views = [view.to(dtype) for view in views]
        checking = check_every and step % check_every == 0
        clock.seconds, clock.keep = 0.0, checking

        start = time.perf_counter()
        value = method(*views)
        value.backward()
        differentiated = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        optimized = time.perf_counter()
        if checking:
            agreement.check_loss(run.checks, clock.inputs, recipe)
        if update is not None:
            momentum = sk.cosine_momentum(step, recipe.steps, recipe.momentum)
            with agreement.checked_update(run.checks, method, momentum, checking):
                updating = time.perf_counter()
                update(momentum)
                seconds["ema"].append(time.perf_counter() - updating)
        seconds["encoder"].append(differentiated - start - clock.seconds)
        seconds["loss"].append(clock.seconds)
        seconds["optimizer"].append(optimized - differentiated)
        run.losses.append(value.item())
        on_step(run.losses[-1])
    method.loss = clock.loss
    run.times = {part: median(values) for part, values in seconds.items() if values}
    return run


@torch.no_grad()
def _nudge(method):
    for parameter in method.parameters():
        away = torch.where(torch.rand_like(parameter) < 0.5, torch.inf, -torch.inf)
        parameter.copy_(torch.nextafter(parameter, away))


class _TimedLoss(torch.nn.Module):
    """A loss that knows how long its forward and its backward took.

    Autograd runs a graph backwards in the order of its making, on one thread for CPU tensors: the loss's part of the
    backward lies between the gradient of its value and the first gradient of its inputs.
    """

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.seconds = 0.0
        self.keep = False
        self.inputs = None

    def forward(self, *inputs):
        start = time.perf_counter()
        value = self.loss(*inputs)
        self.seconds += time.perf_counter() - start
        if value.requires_grad:
            marks = {}

            def begin(gradient):
                marks["begin"] = time.perf_counter()

            def end(gradient):
                if "begin" in marks:
                    self.seconds += time.perf_counter() - marks.pop("begin")

            value.register_hook(begin)
            for tensor in inputs[0]:
                tensor.register_hook(end)
        if self.keep:
            self.inputs = [[tensor.detach() for tensor in views] for views in inputs]
        return value


def peak_bytes(name, loss, batch) -> int | None:
    """Peak memory of three training steps above the built method. Call it in a fresh process."""
    recipe = RECIPES[name]
    method, update = build(name, loss, recipe, seed=0)
    optimizer = torch.optim.AdamW(method.parameters(), recipe.learning_rate)
    views = list(torch.rand(recipe.views, batch, 1, 8, 8))

    def steps(count, views):
        for _ in range(count):
            method(*views).backward()
            optimizer.step()
            optimizer.zero_grad()
            if update is not None:
                update(recipe.momentum)

    steps(1, [view[:8] for view in views])  # libraries, threads and the optimizer's state
    return host_memory.peak_growth(lambda: steps(3, views))
