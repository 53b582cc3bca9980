"""Measure how far losses, gradients and averages are from float64: all rows, or some where all take too long."""

import math

import torch
import torch.nn.functional as F

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import rivals
from selfsup_kernels.lab.bench.workloads import MOMENTUM, TEMPERATURE

OPERATIONS = {"cpu": 1.2e11, "cuda": 4e13}
"""The most operations of the float64 reference of a whole loss; beyond it some rows are checked."""


def relative(got, want):
    """Return the error in the 2-norm; None where it is not finite, which JSON has no number for."""
    error = ((got.double() - want).norm() / want.norm()).item()
    return error if math.isfinite(error) else None


def with_gradient(function, inputs):
    """Return the loss and the gradient of the first input."""
    loss = function(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs[0])[0]


def truth(function, inputs):
    """Return what ``function`` gives for the same numbers in float64."""
    wide = [x.detach().double() for x in inputs]
    return with_gradient(function, [wide[0].requires_grad_(), *wide[1:]])


def errors(function, inputs, want):
    got = with_gradient(function, inputs)
    return {name: relative(ours, theirs) for name, ours, theirs in zip(("loss", "gradient"), got, want, strict=True)}


def judge(case, inputs):
    """Return a function ``(name, rival's function) -> errors``."""
    if case.op == "ema":
        return lambda name, function: {"value": average_error(function, *inputs)}
    if case.op == "info_nce" and 8 * case.rows**2 * case.dim > OPERATIONS[inputs[0].device.type]:
        return Rows(inputs[0]).errors
    want = truth(rivals.eager_byol, inputs) if case.op == "byol" else info_nce_truth(inputs[0])
    return lambda name, function: errors(function, inputs, want)


def info_nce_truth(views):
    """Return the loss and the gradient in float64, blockwise, so that no M x M matrix is held."""
    return truth(lambda v: sk.info_nce_loss(v, temperature=TEMPERATURE, impl="reference"), (views,))


class Rows:
    """float64 losses and gradients of ``count`` random rows of ``(V, B, D)`` views, in O(count M D) operations.

    The loss of a row needs its own similarities alone. Its gradient needs the normalisers of all rows; they are taken
    from our losses, which are checked at the chosen rows.
    """

    def __init__(self, views, count=64, seed=0):
        self.views = views
        num_views, batch, dim = views.shape
        rows = num_views * batch
        generator = torch.Generator().manual_seed(seed)
        self.chosen = chosen = torch.randperm(rows, generator=generator)[:count].to(views.device)
        with torch.no_grad():
            ours = sk.info_nce_loss(views, temperature=TEMPERATURE, reduction="none").reshape(-1)
            h = views.reshape(-1, dim).double()
            z = F.normalize(h, dim=-1)
            by_view = z.view(num_views, batch, dim)
            others = (by_view.sum(0) - by_view).reshape(rows, dim) / (num_views - 1)
            positive = (z * others).sum(-1) / TEMPERATURE
            normaliser = ours.double() + positive
            scores = z[chosen] @ z.T / TEMPERATURE
            scores[torch.arange(len(chosen), device=views.device), chosen] = -torch.inf
            own = scores.logsumexp(-1)
            self.want = own - positive[chosen]
            weights = (scores - own[:, None]).exp() + (scores - normaliser).exp()
            dz = (weights @ z - 2 * others[chosen]) / (rows * TEMPERATURE)
            dh = dz - z[chosen] * (z[chosen] * dz).sum(-1, keepdim=True)
            self.gradient = dh / h[chosen].norm(dim=-1, keepdim=True)

    def errors(self, name, function):
        """Return the errors of the chosen rows; of rivals, which return their mean loss, the gradient's alone."""
        found = {"rows": len(self.chosen)}
        if impl := rivals.impl_of(name):
            loss = sk.info_nce_loss(self.views, temperature=TEMPERATURE, reduction="none", impl=impl)
            found["loss"] = relative(loss.detach().reshape(-1)[self.chosen], self.want)
            gradient = torch.autograd.grad(loss.mean(), self.views)[0]
        else:
            gradient = with_gradient(function, (self.views,))[1]
        found["gradient"] = relative(gradient.reshape(-1, gradient.shape[-1])[self.chosen], self.gradient)
        return found


def average_error(update, targets, sources):
    """Return the largest error among the tensors of one update."""
    averages = update.copies if isinstance(update, rivals.Average) else targets
    with torch.no_grad():
        want = [t.double().lerp(s.double(), 1 - MOMENTUM) for t, s in zip(averages, sources, strict=True)]
        update(targets, sources)
        found = [relative(t, x) for t, x in zip(averages, want, strict=True)]
        return None if None in found else max(found)
