"""Modules of known cost for the tests of the profile."""

import time

import torch
from torch import nn

from selfsup_kernels.lab.profile.workload import METHODS, Workload

TICK = 1e-6


class CountedTime:
    """A clock that sleeping moves, and each reading by a tick: what a busy machine adds to a part does not count."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def read(self):
        self.now += TICK
        return self.now


def close(measured, costs):
    """Under ``counted_time`` a part costs its sleeps, and a tick for each mark that ends a stretch of it."""
    for part, cost in costs.items():
        assert 0 <= measured[part] - cost + 1e-9 < 100 * TICK, (part, cost, measured)


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None, None


class Encoder(nn.Module):
    """Two linear layers whose forward and backward take as many seconds more."""

    def __init__(self, forward=0.0, backward=0.0, width=4):
        super().__init__()
        self.linear, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.seconds = forward, backward

    def forward(self, x):
        return self.out(_Slow.apply(self.linear(x), *self.seconds))


class SquareLoss(nn.Module):
    def __init__(self, forward=0.0, backward=0.0):
        super().__init__()
        self.seconds = forward, backward

    def forward(self, *tensors):
        rows = torch.cat([torch.atleast_2d(x) for tensor in tensors for x in tensor])
        return _Slow.apply(rows.square(), *self.seconds).mean()


class Optimizer(torch.optim.SGD):
    seconds = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        time.sleep(self.seconds)
        return super().step(closure)


def batches(count, seconds=0.0, width=4):
    for i in range(count):
        time.sleep(seconds)
        yield torch.full((3, width), float(i + 1))


def seconds(run) -> dict:
    """Part -> seconds."""
    return {row["part"]: row["seconds"] for row in run.summary["parts"]}


COSTS = {
    "data": 0.004,
    "encoder forward": 0.008,
    "loss forward": 0.012,
    "loss backward": 0.02,
    "encoder backward": 0.016,
    "optimizer": 0.006,
    "EMA": 0.01,
}


def setup(costs=COSTS):
    torch.manual_seed(0)
    model = Encoder(costs["encoder forward"], costs["encoder backward"])
    criterion = SquareLoss(costs["loss forward"], costs["loss backward"])
    optimizer = Optimizer(model.parameters(), 0.01)
    optimizer.seconds = costs["optimizer"]
    return model, criterion, optimizer


def method_of(name, encoder=None):
    torch.manual_seed(0)
    networks = encoder or nn.Linear(8, 8), nn.Linear(8, 4)
    return METHODS[name](Workload(dim=4), networks, nn.Linear(4, 4))


def loop(method, count, around=lambda loader: loader):
    optimizer = torch.optim.AdamW(method.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)
    values = []
    for x in around([torch.randn(2, 16, 8, generator=generator) for _ in range(count)]):
        value = method(x[0] + 0.1 * torch.randn(16, 8), x[1])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(method, "update_target"):
            method.update_target(0.9)
        values.append(value.item())
    return values, method.state_dict()


def tiny():
    """Make an encoder that takes hardly more memory than its images."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16))


def wrong():
    return nn.Identity()
