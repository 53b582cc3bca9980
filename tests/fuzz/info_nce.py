"""Compare random calls of the InfoNCE loss with the dense loss: values, gradients of the rows and the temperature."""

import math

import torch
from bounds import Wrong, rounding
from draw import rows, size
from info_nce_bounds import check_info_nce, dense_run
from views import EPS, REDUCTIONS, Rows, gradients, spoil, upstream_of

import selfsup_kernels as sk
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES


def info_nce_case(draw, place):
    """Return (dtype, arguments, views, temperature, queue); everything except the views is on the CPU."""
    classes = place.classes
    chosen = classes or draw
    dtype = chosen.choice(place.dtypes)
    num_views, batch, dim = size(draw, place)
    objective = chosen.choice(OBJECTIVES)
    normalize = chosen.chance(0.8)
    labelled = objective in LABEL_OBJECTIVES and chosen.chance(0.3)
    if labelled and objective != "cross_view" and draw.chance(0.15) and classes is None:
        num_views = 1
    temperature = draw.choice([0.1, 0.07, 0.5, 1.0, draw.power(-3, 2), draw.power(-3, 2), draw.power(-3, -1.5)])
    arguments = {"objective": objective, "reduction": draw.choice(REDUCTIONS), "normalize": normalize}
    if draw.chance(0.3):
        arguments["eps"] = draw.choice(EPS)
    # Scores of unnormalised rows go up to thousands: larger ones are beyond the resolution of exp in float32.
    most = None if normalize else math.sqrt(draw.power(-1, 2.5 if dtype == torch.float16 else 3.5) * temperature)
    views = Rows(draw, place, num_views, batch, dim, dtype, lengths=normalize, most=most)
    queue = None
    if chosen.chance(0.15):
        values = draw.power(-1, 1.5) * torch.randn(num_views, batch, generator=draw.generator, dtype=torch.float64)
        arguments["logq"] = (values if draw.chance(0.5) else values[0]).to(draw.choice([dtype, torch.float32]))
    elif chosen.chance(0.3):
        queue = rows(draw, 1, draw.choice([1, draw.randint(1, 40), draw.randint(1, 150)]), dim, dtype, normalize)[0][0]
        if most is not None:
            queue = (queue * (most / queue.norm(dim=-1).max().clamp_min(1e-30))).to(dtype).double()
        if draw.chance(0.1):  # a row that is also in the batch
            queue[0] = views.h[0, 0]
    if labelled:
        count = draw.choice([1, 2, 3, batch, 2 * batch])
        labels = torch.randint(-count, count, (batch,), generator=draw.generator) // 2
        arguments["labels"] = labels.to(draw.choice([torch.int64, torch.int32, torch.int16]))
    elif chosen.chance(0.2):
        arguments["duplicates"] = torch.randint(draw.choice([2, batch, 4 * batch]), (batch,), generator=draw.generator)
    if not labelled and chosen.chance(0.3):
        arguments["core_view"] = draw.randrange(num_views)
    return dtype, arguments, views, temperature, queue


class Temperature:
    """A temperature: a number, or a tensor that may require a gradient, and the tensor's value."""

    def __init__(self, draw, value, dtype, place):
        self.tensor = None
        self.number = value
        if draw.chance(0.6):
            kind = draw.choice([torch.float32, torch.float64])
            device = place.device if draw.chance(0.5) else "cpu"
            self.tensor = torch.tensor(value, dtype=kind, device=device, requires_grad=draw.chance(0.8))
            self.number = self.tensor.item()

    @property
    def argument(self):
        return self.number if self.tensor is None else self.tensor

    @property
    def wants(self):
        return self.tensor is not None and self.tensor.requires_grad


def info_nce(draw, place):
    dtype, arguments, views, temperature, queue = info_nce_case(draw, place)
    nonfinite = None
    if draw.chance(0.03) and place.classes is None:
        nonfinite = spoil(draw, views, queue)
        arguments["reduction"] = draw.choice(["none", "none", "mean"])
    num_views, batch, _ = views.h.shape
    t = Temperature(draw, temperature, dtype, place)
    leaves = views.leaves()
    given = dict(arguments)
    for name in ("labels", "duplicates", "logq"):
        if name in given:
            given[name] = draw.placed(given[name], place.device)[0]
    if queue is not None:
        given["queue"] = draw.placed(queue.to(dtype), place.device)[0]
    shape = (num_views, batch) if arguments["reduction"] == "none" else ()
    wanted = place.loss_dtype(dtype)
    upstream = upstream_of(draw, shape, wanted)
    place.say(dtype, size=tuple(views.h.shape), kinds=sorted(views.kinds), temperature=t.number, **given)
    with place.autocasting():
        loss = call_info_nce(draw, place, views.argument(leaves), t, given)
    if (loss.dtype, loss.device.type, tuple(loss.shape)) != (wanted, place.device, shape):
        raise Wrong(f"loss: {loss.dtype} {tuple(loss.shape)} on {loss.device}")
    wrt = [*leaves, t.tensor] if t.wants else leaves
    *grads, last = [*gradients(loss, wrt, upstream, draw)] + ([] if t.wants else [None])
    for leaf, grad in zip(leaves, grads, strict=True):
        if (grad.dtype, grad.shape) != (leaf.dtype, leaf.shape):
            raise Wrong(f"grad: {grad.dtype} {tuple(grad.shape)} for {leaf.dtype} {tuple(leaf.shape)}")
    want = dense_run(views.h, t.number, queue, upstream, arguments)
    grad = views.stacked(grads)
    if nonfinite or not all(x.isfinite().all() for x in want):
        return f"{dtype}", *not_finite(loss, grad, last, want, t, place, arguments, nonfinite)
    return f"{dtype}", *check_info_nce(draw, place, dtype, arguments, views, t, queue, upstream, loss, grad, last, want)


def call_info_nce(draw, place, argument, t, given):
    """Call the loss as a function or as a module."""
    if t.tensor is None and draw.chance(0.2):
        given = dict(given)
        of_call = {name: given.pop(name, None) for name in ("labels", "duplicates", "logq", "queue")}
        module = sk.InfoNCELoss(t.number, impl=place.impl, **given)
        form = [argument] if isinstance(argument, torch.Tensor) or len(argument) == 1 or draw.chance(0.5) else argument
        return module(*form, **of_call)
    return sk.info_nce_loss(argument, temperature=t.argument, impl=place.impl, **given)


def kinds_of(x):
    """Return for each element 0 (finite), 1 (NaN), 2 (+Inf) or 3 (-Inf)."""
    return x.isnan().int() + 2 * x.isposinf().int() + 3 * x.isneginf().int()


def not_finite(loss, grad, last, want, t, place, arguments, spoiled):
    """Check non-finite cases: losses equal the dense loss; where its gradient is not finite, ours is not either."""
    got = loss.detach().cpu()
    kinds = kinds_of if place.by_op else torch.isfinite  # F.cross_entropy is NaN where the log-sum-exp is infinite
    if not torch.equal(kinds(got), kinds(want[0])):
        raise Wrong(f"loss: NaN and infinities differ from the dense loss ({int(kinds_of(got).any())})")
    fine = want[0].isfinite()
    off = (got[fine].double() - want[0][fine]).abs()
    allowed = (
        2 * torch.finfo(got.dtype).eps * (want[0][fine].abs() + 1)
        + 16 * max(rounding(got.dtype, place.impl)) / t.number
    )
    if arguments["normalize"] and not (off <= allowed).all():
        raise Wrong(f"loss: off by {off.max().item():.3e} where it is finite")
    if not spoiled:  # an anchor without negatives, whose decoupled loss is -Inf
        return "right", ""
    if got.dim() and arguments["normalize"]:
        lost = ~want[0].isfinite()
        if grad.detach().cpu()[lost].isfinite().all(-1).any():
            raise Wrong("grad: a finite gradient of a row without a loss")
    if last is not None and not want[0].isfinite().all() and last.isfinite():
        raise Wrong("temperature: a finite gradient of a loss that is not")
    return "right", ""
