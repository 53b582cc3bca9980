"""Compare random calls of `contrastive_stats` with its definitions in float64."""

import math

import torch
from bounds import Wrong
from draw import FLOATING, size
from torch.nn import functional as F
from views import Rows, spoil

import selfsup_kernels as sk


def stats(draw, place):
    chosen = place.classes or draw
    place.autocast = False
    dtype = chosen.choice(FLOATING if place.device == "cpu" else place.dtypes)
    num_views, batch, dim = size(draw, place)
    normalize = draw.chance(0.8)
    views = Rows(
        draw, place, num_views, batch, dim, dtype, lengths=normalize, most=None if normalize else draw.power(-1, 1)
    )
    labels = None
    if draw.chance(0.4):
        labels = torch.randint(0, draw.choice([1, 2, batch]), (batch,), generator=draw.generator)
    spoiled = draw.chance(0.03) and spoil(draw, views, None)
    place.say(dtype, size=tuple(views.h.shape), kinds=sorted(views.kinds), normalize=normalize, labels=labels)
    got = sk.contrastive_stats(
        views.argument(views.tensors), normalize=normalize, labels=None if labels is None else labels.to(place.device)
    )
    got = [x.cpu().double() for x in got]
    if spoiled:
        if not all(x.isnan() for x in got):
            raise Wrong("a statistic of rows that are not finite")
        return f"{dtype}", "right", ""
    h = views.h.reshape(-1, dim)
    z = F.normalize(h, dim=-1, eps=1e-12) if normalize else h
    group = (torch.arange(batch) if labels is None else labels).repeat(num_views)
    same = group[:, None] == group
    positive = same & ~torch.eye(len(z), dtype=torch.bool)
    scores = z @ z.T
    best = scores.masked_fill(~positive, -math.inf).amax(-1)
    worst_ = scores.masked_fill(same, -math.inf).amax(-1)
    anchors = positive.any(-1)
    square = (z * z).sum(-1)
    eps = 2.0**-23 if dtype != torch.float64 and normalize else 2.0**-50
    near = 64 * eps * square.max().item() + 64 * torch.finfo(torch.float32).tiny  # below it products may be zero
    sure, possible = ((best - worst_ > margin)[anchors].double().mean() for margin in (near, 0.0))
    if not anchors.any():
        if not got[0].isnan():
            raise Wrong("top1: a number where no row has a positive")
    elif not sure - 1e-6 <= got[0] <= possible + 1e-6:
        raise Wrong(f"top1: {got[0]}, expected {sure} to {possible}")
    distance = (square[:, None] + square - 2 * scores).clamp_min(0)
    other = ~torch.eye(len(z), dtype=torch.bool)
    negatives = worst_[worst_ > -math.inf]
    want = [scores[positive].mean(), negatives.mean(), distance[positive].mean()]
    want.append((-2 * distance[other]).logsumexp(0) - math.log(len(z) * (len(z) - 1)))
    for name, ours, truth in zip(sk.ContrastiveStats._fields[1:], got[1:], want, strict=True):
        allowed = 8 * near + 2.0**-21 * (truth.abs() + 1)  # float32 results
        if truth.isnan() != ours.isnan() or (truth - ours).abs() > allowed:
            raise Wrong(f"{name}: {ours}, expected {truth}")
    return f"{dtype}", "right", ""
