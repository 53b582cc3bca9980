"""Draw the parts of a case from the seed and its number: choices, rows of every kind, memory layouts."""

import math
import random

import torch

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Draw(random.Random):
    """Python's random choices, and tensors of random numbers."""

    def __init__(self, *key):
        super().__init__("/".join(map(str, key)))
        self.generator = torch.Generator().manual_seed(self.getrandbits(60))

    def __reduce__(self):
        raise TypeError("a case is made again from its number")

    def chance(self, share):
        return self.random() < share

    def power(self, low, high):
        """Return 10 to a power drawn uniformly."""
        return 10 ** self.uniform(low, high)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def some(self, count, share=0.3):
        """Return a random mask of ``count`` elements, at least one of them true."""
        mask = torch.rand(count, generator=self.generator) < share
        mask[self.randrange(count)] = True
        return mask

    def placed(self, x, device):
        """Return (tensor, its whole memory): ``x`` contiguous, or inside a larger tensor of NaN with its dimensions in
        any order and its elements any steps apart."""
        kind = self.choice(["plain", "plain", "swapped", "apart"]) if x.dim() else "plain"
        if kind == "plain":
            x = x.to(device, copy=True).contiguous()
            return x, x
        order = self.sample(range(x.dim()), x.dim())
        apart = kind == "apart"
        step = [self.randint(1, 3) if apart else 1 for _ in x.shape]
        start = [self.randint(0, 3) if apart else 0 for _ in x.shape]
        size = [a + n * s for a, n, s in zip(start, x.shape, step, strict=True)]
        memory = torch.empty([size[d] for d in order], dtype=x.dtype, device=device)
        memory.fill_(math.nan) if x.is_floating_point() else memory.zero_()
        place = memory.permute([order.index(d) for d in range(x.dim())])
        place = place[tuple(slice(a, a + n * s, s) for a, n, s in zip(start, x.shape, step, strict=True))]
        place.copy_(x)
        return place, memory


def farthest(dtype):
    """Return the largest power of ten by which rows of ``dtype`` are scaled up or down. Elements stay normal numbers;
    in float64 their squares do too, since the dense float64 loss has nothing wider to compare with."""
    return {torch.float16: 4, torch.float64: 100}.get(dtype, 36)


KINDS = ["normal", "equal", "collapsed", "opposite", "near", "duplicates", "zero", "long", "short", "lengths", "sparse"]


def rows(draw, num_views, batch, dim, dtype, lengths=True):
    """Return float64 rows (V, B, D) that are exact in ``dtype``, and the kinds of degenerate rows among them."""
    kinds = {"normal"} if draw.chance(0.35) else set(draw.choices(KINDS, k=draw.choice([1, 1, 2])))
    if not lengths:
        kinds -= {"zero", "long", "short", "lengths"}
    h = draw.normal(num_views, batch, dim)
    if "equal" in kinds:
        h = draw.normal(1, 1, dim).expand(num_views, batch, dim).clone()
    if "collapsed" in kinds:
        h = draw.normal(1, 1, dim) + draw.power(-6, -1) * draw.normal(num_views, batch, dim)
    if "near" in kinds:
        h = h[:1] + draw.choice([0, draw.power(-6, -1)]) * draw.normal(num_views, batch, dim)
    if "opposite" in kinds:
        h[draw.randrange(num_views)] = -h[draw.randrange(num_views)]
    if "duplicates" in kinds:
        h = h[:, torch.randint(batch, (batch,), generator=draw.generator)]
    if "sparse" in kinds:
        h = h * (torch.rand(h.shape, generator=draw.generator) < 0.2)
    if "lengths" in kinds:
        h = h * draw.normal(num_views, batch, 1).mul(3).clamp(-6, 6).exp()
    end = farthest(dtype)
    for kind, low, high in (("long", 0, end), ("short", -end, 0)):
        if kind in kinds:
            mask = torch.ones(num_views * batch, dtype=torch.bool) if draw.chance(0.2) else draw.some(num_views * batch)
            h = h.reshape(-1, dim)
            h[mask] *= draw.power(low, high)
            h = h.view(num_views, batch, dim)
    if "zero" in kinds:
        h = h.reshape(-1, dim)
        h[draw.some(num_views * batch)] = 0
        h = h.view(num_views, batch, dim)
    largest = torch.finfo(dtype).max / 8
    return h.clamp(-largest, largest).to(dtype).double(), kinds


def size(draw, place):
    """Return (V, B, D): mostly small, some around tile boundaries. On a GPU only a few widths, and any batch."""
    num_views = draw.choice([2, 2, 2, 3, 4, 5])
    batch = draw.choice([2, 3, draw.randint(2, 16), draw.randint(2, 32), draw.choice([15, 16, 17, 31, 32, 33])])
    dim = draw.choice([1, 2, draw.randint(2, 16), draw.randint(2, 64), draw.choice([15, 16, 17, 31, 32, 33, 63, 64])])
    if draw.chance(0.02) and not place.slow:
        batch = draw.choice([63, 64, 65, 127, 128, 129, 255, 256, 257, draw.randint(33, 300)])
        num_views = min(num_views, 3)
    if draw.chance(0.04) and not place.slow:
        dim = draw.choice([65, 127, 128, 129, 255, 256, 257, draw.randint(65, 300)])
    if place.classes is not None:
        num_views, dim = place.classes.choice([2, 2, 3]), place.classes.choice([16, 33, 64, 128, 256, 300])
        batch = draw.choice([batch, draw.randint(2, 300)])
    return num_views, batch, dim
