"""Random calls of the BYOL loss against the dense loss in float64."""

import torch
from bounds import Eager, Wrong, outcome, relative, rounding, rounding_of_result, worst
from draw import size
from views import EPS, REDUCTIONS, Rows, gradients, spoil, upstream_of

import selfsup_kernels as sk
from selfsup_kernels import spec


def byol(draw, place):
    chosen = place.classes or draw
    dtype = chosen.choice(place.dtypes)
    num_views, batch, dim = size(draw, place)
    if chosen.chance(0.3):
        num_views = 1
    if draw.chance(0.1):
        batch = 1
    if draw.chance(0.03) and place.classes is None:
        dim = draw.choice([511, 1030, draw.randint(300, 2500)])
    p, q = (Rows(draw, place, num_views, batch, dim, dtype) for _ in range(2))
    if draw.chance(0.3):  # a loss near zero, or near four
        near = draw.choice([1, -1, 1 + 2**-6]) * p.h.flip(0) + draw.choice(
            [0, draw.power(-6, -1)]
        ) * p.h.abs().mean() * draw.normal(*p.h.shape)
        q.h = near.clamp(-torch.finfo(dtype).max / 8, torch.finfo(dtype).max / 8).to(dtype).double()
        q.tensors = (
            [q.h.to(dtype).to(place.device)] if q.form == "stacked" else [x.to(dtype).to(place.device) for x in q.h]
        )
    spoiled = spoil(draw, draw.choice([p, q]), None) if draw.chance(0.03) and place.classes is None else None
    reduction, eps = draw.choice(REDUCTIONS), draw.choice(EPS)
    shape = () if reduction != "none" else (batch,) if num_views == 1 else (num_views, batch)
    wanted = place.loss_dtype(dtype)
    upstream = upstream_of(draw, shape, wanted)
    kinds = [sorted(x.kinds) for x in (p, q)]
    place.say(dtype, size=tuple(p.h.shape), kinds=kinds, reduction=reduction, eps=eps)
    if num_views == 1:
        leaves = [p.tensors[0].reshape(batch, dim).detach().requires_grad_()]
        arguments = leaves[0], q.tensors[0].reshape(batch, dim)
    else:
        leaves = p.leaves()
        arguments = p.argument(leaves), q.argument(q.tensors)
    with place.autocasting():
        if draw.chance(0.2):
            loss = sk.BYOLLoss(eps=eps, reduction=reduction, impl=place.impl)(*arguments)
        else:
            loss = sk.byol_loss(*arguments, eps=eps, reduction=reduction, impl=place.impl)
    if (loss.dtype, tuple(loss.shape)) != (wanted, shape):
        raise Wrong(f"loss: {loss.dtype} {tuple(loss.shape)}")
    grads = gradients(loss, leaves, upstream, draw)
    grad = grads[0].reshape(p.h.shape) if num_views == 1 else p.stacked(grads)
    return f"{dtype}", *check_byol(place, dtype, p, q, reduction, eps, upstream, loss, grad, spoiled)


def check_byol(place, dtype, p, q, reduction, eps, upstream, loss, grad, spoiled):
    def dense_byol(kind):
        h = (p.h[0] if len(p.h) == 1 else p.h).to(kind).requires_grad_()
        value = spec.byol_loss(h, (q.h[0] if len(p.h) == 1 else q.h).to(kind), eps=eps, reduction=reduction)
        (g,) = torch.autograd.grad(value, h, upstream.to(value.dtype))
        return value.detach(), g.reshape(p.h.shape)

    want = dense_byol(torch.float64)
    if spoiled:
        got = loss.detach().cpu(), grad.detach().cpu()
        for name, ours, truth in zip(("loss", "grad"), got, want, strict=True):
            if (ours.isfinite() & ~truth.isfinite()).any():
                raise Wrong(f"{name}: finite where the dense loss is not")
        return "right", ""
    # Rows are not rounded: each is read once and multiplied in float32.
    unit = rounding(torch.float64 if dtype == torch.float64 else torch.float32, "cpu")[1]
    terms = p.h.shape[0] * p.h.shape[1]
    count = terms if reduction == "sum" else 1
    eager = Eager(dtype, lambda: dense_byol(dtype))

    # 2 - 2 cos: two reciprocal norms, two scaled rows, products and their sum, each rounded.
    each = 16 * unit * count + torch.finfo(loss.dtype).eps * want[0].abs()
    found = [outcome("loss", loss, want[0], each.expand(want[0].shape).norm().item(), lambda: 0, eager(0))]
    length = p.h.norm(dim=-1, keepdim=True)
    weight = torch.where((length / eps - 1).abs() < 1e-5, 0, length.clamp_min(eps))
    share = (upstream if reduction == "none" else upstream / (terms if reduction == "mean" else 1)).expand(
        p.h.shape[:2]
    )
    allowed = 2 * relative(grad.dtype) * (want[1] * weight).norm().item()
    allowed += 32 * unit * share.norm().item() + rounding_of_result(grad.dtype, weight, p.h.shape[-1], place)
    found.append(outcome("grad", grad, want[1], allowed, lambda: 0, eager(1), weight))
    return worst(found)
