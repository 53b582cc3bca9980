"""Draw the views and the upstream gradient of a case, in the form in which the losses get them."""

import math

import torch
from draw import rows

REDUCTIONS = ["none", "mean", "sum"]
EPS = [1e-12, 1e-12, 1e-8, 1e-3, 0.5]


def upstream_of(draw, shape, dtype):
    """Return an upstream gradient that is exact in ``dtype``, scaled so that the gradient stays in range."""
    g = draw.normal(*shape) if shape else torch.ones((), dtype=torch.float64) * draw.choice([1, -1])
    if draw.chance(0.3) and shape:
        g = g * (torch.rand(shape, generator=draw.generator) < 0.5)
    if draw.chance(0.2) and shape:
        g = draw.normal(*[1] * len(shape)).expand(shape)
    if draw.chance(0.3) and dtype != torch.float16:
        g = g * draw.power(-8, 4)
    return g.to(dtype).double()


def gradients(loss, leaves, upstream, draw):
    """Return the gradients of all leaves. The upstream gradient may have any strides."""
    weight = upstream.to(loss.dtype)
    if weight.dim() == 2 and not (weight == weight[0, 0]).all():
        weight = weight.t().contiguous().t() if draw.chance(0.3) else weight
    return torch.autograd.grad(loss, leaves, weight.to(loss.device))


class Rows:
    """The views of a case: the numbers in float64, and the tensors that the call gets."""

    def __init__(self, draw, place, num_views, batch, dim, dtype, lengths=True, most=None):
        self.h, self.kinds = rows(draw, num_views, batch, dim, dtype, lengths)
        if most is not None:
            self.h = (self.h * (most / self.h.norm(dim=-1).max().clamp_min(1e-30))).to(dtype).double()
        self.dtype, self.form = dtype, draw.choice(["stacked", "list", "tuple"])
        # Under autocast the views may have different dtypes. Numbers of 16 bits are exact in float32.
        mixed = place.autocast and dtype != torch.float64 and draw.chance(0.5)
        if self.form == "stacked":
            if draw.chance(0.1):  # one row, or one view, expanded to all
                few = self.h[:, :1] if draw.chance(0.5) else self.h[:1]
                self.h = few.expand_as(self.h).contiguous()
                self.tensors = [few.to(dtype).to(place.device).expand_as(self.h)]
            else:
                self.tensors = [draw.placed(self.h.to(dtype), place.device)[0]]
        else:
            dtypes = [draw.choice([dtype, torch.float32]) if mixed else dtype for _ in self.h]
            self.tensors = [draw.placed(x.to(d), place.device)[0] for x, d in zip(self.h, dtypes, strict=True)]

    def computed_in(self, *others):
        """Return the common dtype of the views and ``others``, or float32 if they differ."""
        kinds = {x.dtype for x in (*self.tensors, *others) if x is not None}
        return kinds.pop() if len(kinds) == 1 else torch.float32

    def leaves(self):
        return [x.detach().requires_grad_() for x in self.tensors]

    def argument(self, leaves):
        return leaves[0] if self.form == "stacked" else list(leaves) if self.form == "list" else tuple(leaves)

    def stacked(self, grads):
        return grads[0] if self.form == "stacked" else torch.stack([g.to(self.dtype) for g in grads])


def spoil(draw, views, queue):
    """Write NaN or an infinity somewhere into the views or the queue, and return which."""
    value = draw.choice([math.nan, math.inf, -math.inf])
    if queue is not None and draw.chance(0.3):
        queue[draw.randrange(len(queue)), draw.randrange(queue.shape[1])] = value
        return "queue"
    v, b, d = (draw.randrange(n) for n in views.h.shape)
    if views.form == "stacked":
        if 0 in views.tensors[0].stride():
            views.tensors[0] = views.tensors[0].clone()
        views.tensors[0][v, b, d] = value
    else:
        views.tensors[v][b, d] = value
    views.h[v, b, d] = value
    return "views"
