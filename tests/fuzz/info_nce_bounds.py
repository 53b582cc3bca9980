"""Check the InfoNCE loss and its gradients against their error bounds."""

import functools
import math

import torch
from bounds import DRAWS, GPU_IMPLS, SPREAD, Eager, Wrong, outcome, relative, rounding, rounding_of_result, worst
from torch.func import jvp
from torch.nn import functional as F

from selfsup_kernels import spec

FLOAT32_BOUND = 2e-4
OWN = 2.0**-51
"""The error of the dense float64 loss at scores of 1; it grows with the scores. Its log-sum-exp rounds at the size of
the scores, so that a loss of 1e-15 becomes 0 while ours keeps its digits."""


def dense_run(views, temperature, queue, upstream, arguments):
    """Return (loss, gradient of the rows, gradient of the temperature) of the dense loss."""
    h = views.detach().requires_grad_()
    t = torch.as_tensor(temperature, dtype=h.dtype).requires_grad_()
    loss = spec.info_nce_loss(h, temperature=t, queue=queue, **arguments)
    return loss.detach(), *torch.autograd.grad(loss, (h, t), upstream.to(loss.dtype))


def slopes(h, temperature, queue, arguments):
    """Return the derivative of each anchor's loss with respect to the temperature, (V, B)."""
    arguments = arguments | {"reduction": "none"}
    t = torch.tensor(temperature, dtype=torch.float64)
    return jvp(lambda t: spec.info_nce_loss(h, temperature=t, queue=queue, **arguments), (t,), (torch.ones_like(t),))[1]


def mass(h, temperature, queue, arguments):
    """Return for each anchor the absolute sum of its negatives' coefficients, (V, B); its positives have the same sum.

    It is estimated by how far the loss falls if all positives' scores rise by 0.1; one more feature per class raises
    them. With several positives a softmax over them is compared with equal shares or with another softmax: these terms
    add up to one more, which cancels."""
    labels = arguments.get("labels")
    classes = torch.arange(h.shape[1]) if labels is None else torch.unique(labels, return_inverse=True)[1]
    marks = math.sqrt(0.1 * temperature) * F.one_hot(classes).double().expand(len(h), -1, -1)
    normalize, floor = arguments["normalize"], arguments.get("eps", 1e-12)
    rest = {name: value for name, value in arguments.items() if name != "eps"} | {
        "normalize": False,
        "reduction": "none",
    }

    def losses(marks):
        rows = [F.normalize(x, dim=-1, eps=floor) if normalize else x for x in (h, *([] if queue is None else [queue]))]
        more = None if queue is None else F.pad(rows[1], (0, marks.shape[-1]))
        return spec.info_nce_loss(torch.cat([rows[0], marks], -1), temperature=temperature, queue=more, **rest)

    several = arguments["objective"] in ("supcon_out", "supcon_in") and (len(h) > 2 or labels is not None)
    several |= arguments["objective"] == "cross_view" and labels is not None
    return 10 * (losses(0 * marks) - losses(marks)).clamp_min(0) + several


def tangent(z, dz, inside):
    """Return the gradient of a row times its length from the unit row's gradient; no projection below the floor."""
    return dz - torch.where(inside, (z * dz).sum(-1, keepdim=True), 0) * z


def moved(draw, h, temperature, queue, upstream, arguments, of_rows, eps):
    """Return (loss, gradient of the rows times their lengths, slopes in the temperature) of perturbed inputs.

    Each element of the unit rows, each score and the temperature is off by about one rounding. Extra features perturb
    the scores, nearly independently for two pairs of rows: by eps times the product of the lengths, and by eps if
    scores are small, like the rounding of the exponential."""
    normalize, floor = arguments["normalize"], arguments.get("eps", 1e-12)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True).clamp_min(floor) if normalize else x

    def off(z):
        length = z.norm(dim=-1, keepdim=True).square().clamp_min(temperature)
        further = (eps * length).sqrt() * draw.normal(*z.shape[:-1], 4) / math.sqrt(2)
        return torch.cat([z * (1 + of_rows * draw.normal(*z.shape)), further], -1)

    rest = {name: value for name, value in arguments.items() if name not in ("normalize", "eps")}
    dim, z = h.shape[-1], off(unit(h))
    q = None if queue is None else off(unit(queue))
    t = temperature * (1 + eps * draw.normal(1).item())
    rest["normalize"] = False
    slope = slopes(z, t, q, rest)
    loss, dz, _ = dense_run(z, t, q, upstream, rest)
    z, dz = z[..., :dim], dz[..., :dim]
    if normalize:
        dz = tangent(z, dz, h.norm(dim=-1, keepdim=True) >= floor)
    return loss, dz, slope


def cut_off(place, dtype, score, normalize):
    """Return the additional relative error of float32 on GPUs: the bound of the project's tests, 2e-4; for unnormalised
    rows the limit in docs/numerics.md, 1e-2 at scores of 40,000, since tensor cores truncate when they accumulate."""
    if place.impl not in GPU_IMPLS or dtype != torch.float32:
        return 0.0
    return FLOAT32_BOUND if normalize else max(FLOAT32_BOUND, 1e-2 * score / 40_000)


def check_info_nce(draw, place, dtype, arguments, views, t, queue, upstream, loss, grad, last, want):
    h, normalize, floor = views.h, arguments["normalize"], arguments.get("eps", 1e-12)
    of_rows, eps = rounding(views.computed_in(None if queue is None else queue.to(dtype)), place.impl)
    length = h.norm(dim=-1, keepdim=True)
    weight = length.clamp_min(floor) if normalize else torch.ones_like(length)
    anchors = h.shape[0] * h.shape[1]
    columns = anchors + (0 if queue is None else len(queue))
    longest = 1.0 if normalize else max(x.norm(dim=-1).max().item() for x in (h, queue) if x is not None)
    logq = arguments.get("logq", torch.zeros(1)).double()
    score = longest**2 / t.number + (logq.max() - logq.min()).item()
    share = upstream / (anchors if arguments["reduction"] == "mean" else 1)

    @functools.cache
    def far():
        """Return the bounds for the loss, the gradient of the rows (times their lengths) and of the temperature."""
        exact = want[0], want[1] * weight, slopes(h, t.number, queue, arguments)
        draws = []
        for _ in range(DRAWS):
            other = moved(draw, h, t.number, queue, upstream, arguments, of_rows, eps)
            loss, dz, slope = (o - e for o, e in zip(other, exact, strict=True))
            dz = dz * (weight > 0)
            # Equal anchors have equal rounding errors, so the errors add up.
            draws.append((loss.norm().item(), dz.norm().item(), (share.abs() * slope.abs()).sum().item()))
        terms = share.abs() * mass(h, t.number, queue, arguments)
        # A coefficient is exp(score - table), and the backward recomputes the score: the coefficient's relative error
        # is the absolute error of the score, so a loss near zero keeps its digits.
        summed = eps * (math.sqrt(columns) + score) / t.number + of_rows / t.number
        in_rows = summed * longest * (2 * terms.norm() + terms.sum() / math.sqrt(anchors)).item()
        in_slopes = summed * score * 2 * terms.sum().item()
        if not place.by_op and dtype != torch.float64:
            # Autograd rounds the log-sum-exp to float32, which shifts all of an anchor's probabilities.
            rounded = torch.finfo(torch.float32).eps * score * share.abs().expand(h.shape[:2]) / t.number
            in_rows, in_slopes = in_rows + longest * rounded.norm().item(), in_slopes + score * rounded.sum().item()
        return [SPREAD * max(d) + s for d, s in zip(zip(*draws, strict=True), (0, in_rows, in_slopes), strict=True)]

    low = None if queue is None else queue.to(dtype)
    eager = Eager(dtype, lambda: dense_run(h.to(dtype), torch.tensor(t.number, dtype=dtype), low, upstream, arguments))

    # The loss is a log-sum-exp minus a mean of scores, and each has the error of the scores.
    each = 16 * eps * (2 * score + math.log(columns) + 1) * (anchors if arguments["reduction"] == "sum" else 1)
    allowed = (torch.finfo(loss.dtype).eps * want[0].abs() + each).norm().item()
    found = [outcome("loss", loss, want[0], allowed, lambda: far()[0], eager(0))]
    # A row whose length equals the floor up to rounding may count as above or below it.
    weight = torch.where((length / floor - 1).abs() < 1e-5, 0, weight) if normalize else weight
    limit = rounding_of_result(grad.dtype, weight, h.shape[-1], place)
    own = OWN * (8 + score)
    weights = share.abs().expand(h.shape[:2]).sum().item()
    plain = (
        (relative(grad.dtype) + cut_off(place, dtype, score, normalize)) * (want[1] * weight).norm().item()
        + limit
        + own * weights * longest / t.number
    )
    found.append(outcome("grad", grad, want[1], plain, lambda: far()[1], eager(1), weight))
    if last is not None:
        if last.device != t.tensor.device or last.dtype != t.tensor.dtype:
            raise Wrong(f"temperature: {last.dtype} on {last.device}")
        plain = relative(last.dtype if dtype == torch.float64 else torch.float32) + cut_off(
            place, dtype, score, normalize
        )
        plain *= abs(want[2].item())
        plain += own * score * weights / t.number
        found.append(outcome("temperature", last, want[2], plain, lambda: far()[2], eager(2)))
    return worst(found)
