"""How far losses and gradients are from float64: of everything, or of some rows where everything takes too long."""

import torch
import torch.nn.functional as F
import workloads as w

import selfsup_kernels as sk


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def with_gradient(function, inputs):
    """(loss, gradient of the first input)."""
    loss = function(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs[0])[0]


def truth(function, inputs):
    """What ``function`` gives for the same numbers in float64."""
    wide = [x.detach().double() for x in inputs]
    return with_gradient(function, [wide[0].requires_grad_(), *wide[1:]])


def errors(function, inputs, want):
    got = with_gradient(function, inputs)
    return {name: relative(ours, theirs) for name, ours, theirs in zip(("loss", "gradient"), got, want, strict=True)}


def info_nce_truth(views):
    """Blockwise, so that no M x M matrix is held."""
    return truth(lambda v: sk.info_nce_loss(v, temperature=w.TEMPERATURE, impl="reference"), (views,))


def info_nce_errors_of_rows(views, count=64, seed=0):
    """Our errors at ``count`` random rows of the two views, in O(count M D) operations.

    The loss of a row needs its own similarities alone. Its gradient needs the normalisers of all rows; they are those
    of the measured losses, which the errors of the losses vouch for.
    """
    num_views, batch, dim = views.shape
    loss = sk.info_nce_loss(views, temperature=w.TEMPERATURE, reduction="none")
    (gradient,) = torch.autograd.grad(loss.mean(), views)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_views * batch, generator=generator)[:count].to(views.device)
    with torch.no_grad():
        h = views.reshape(-1, dim).double()
        z, rows = F.normalize(h, dim=-1), len(h)
        positive = z * z.roll(batch, 0) / w.TEMPERATURE
        normaliser = loss.reshape(-1).double() + positive.sum(-1)
        scores = z[chosen] @ z.T / w.TEMPERATURE
        scores[torch.arange(len(chosen), device=views.device), chosen] = -torch.inf
        want = scores.logsumexp(-1) - positive[chosen].sum(-1)
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp() + (scores - normaliser).exp()
        partner = (chosen + batch) % rows
        dz = (weights @ z - 2 * z[partner]) / (rows * w.TEMPERATURE)
        dh = (dz - z[chosen] * (z[chosen] * dz).sum(-1, keepdim=True)) / h[chosen].norm(dim=-1, keepdim=True)
    return {
        "loss": relative(loss.detach().reshape(-1)[chosen], want),
        "gradient": relative(gradient.reshape(-1, dim)[chosen], dh),
        "rows": len(chosen),
    }


def ema_error(update, targets, sources):
    """The largest error among the tensors of one update."""
    want = [t.double().lerp(s.double(), 1 - w.MOMENTUM) for t, s in zip(targets, sources, strict=True)]
    update(targets, sources)
    return max(relative(t, x) for t, x in zip(targets, want, strict=True))
