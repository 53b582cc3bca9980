"""Write the losses in eager PyTorch as a careful user does today: the baseline of every comparison.

``spec.py`` favours clarity; timing against it would flatter the kernels. Here one matrix product makes all
similarities, masks are filled in place, and the positives are picked by index: the fastest of several forms.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def _rows(views):
    return F.normalize(views.reshape(-1, views.shape[-1]), dim=-1)


def _scores(z, views, temperature):
    """Return the ``(M, M)`` scores with -inf on the diagonal, and the columns ``(M, V - 1)`` of the positives."""
    scores = (z / temperature) @ z.T
    scores.fill_diagonal_(-torch.inf)
    anchors, batch = torch.arange(len(z), device=z.device), views.shape[1]
    return scores, torch.stack([anchors.roll(shift * batch) for shift in range(1, len(views))], dim=1)


def _negatives_and_positives(views, temperature):
    """Return the log-sum-exp of each row's negatives ``(M, 1)`` and the scores of its positives ``(M, V - 1)``."""
    z, batch = _rows(views), views.shape[1]
    scores, columns = _scores(z, views, temperature)
    negatives = scores.scatter_(1, columns, -torch.inf).logsumexp(1, keepdim=True)
    positives = [(z * z.roll(shift * batch, 0)).sum(-1) for shift in range(1, len(views))]
    return negatives, torch.stack(positives, dim=1) / temperature


def info_nce_loss(views, temperature):
    """Return N-view NT-Xent (``supcon_out``): ``(V, B, D)`` -> the mean over all V * B anchors."""
    scores, positives = _scores(_rows(views), views, temperature)
    if len(views) == 2:
        return F.cross_entropy(scores, positives[:, 0])
    return -F.log_softmax(scores, dim=-1).gather(1, positives).mean()


def supcon_in_loss(views, temperature):
    scores, columns = _scores(_rows(views), views, temperature)
    inside = scores.gather(1, columns).logsumexp(1)
    return (scores.logsumexp(1) - inside).mean() + math.log(len(views) - 1)


def per_positive_loss(views, temperature):
    negatives, positives = _negatives_and_positives(views, temperature)
    return F.softplus(negatives - positives).mean()


def pairwise_loss(views, temperature):
    pairs = itertools.combinations(views, 2)
    return torch.stack([info_nce_loss(torch.stack(pair), temperature) for pair in pairs]).mean()


def cross_view_loss(views, temperature):
    """Return CLIP's loss of every pair of views: cross-entropy along the rows and the columns of one matrix."""
    z = [F.normalize(view, dim=-1) for view in views]
    samples = torch.arange(len(z[0]), device=z[0].device)
    terms = []
    for one, other in itertools.combinations(z, 2):
        scores = (one / temperature) @ other.T
        terms += [F.cross_entropy(scores, samples), F.cross_entropy(scores.T, samples)]
    return torch.stack(terms).mean()


def decoupled_loss(views, temperature):
    negatives, positives = _negatives_and_positives(views, temperature)
    return negatives.mean() - positives.mean()


OBJECTIVES = {
    "supcon_out": info_nce_loss,
    "supcon_in": supcon_in_loss,
    "per_positive": per_positive_loss,
    "pairwise": pairwise_loss,
    "cross_view": cross_view_loss,
    "decoupled": decoupled_loss,
}
"""Functions of views and temperature, by the name of the objective."""


def chunked_loss(views, temperature, chunk=4096):
    """Return NT-Xent with memory linear in the rows: some rows at a time, recomputed in the backward."""
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    anchors = torch.arange(len(z), device=z.device)
    positives = torch.stack([anchors.roll(shift * batch) for shift in range(1, num_views)], dim=1)

    def some(own, z, start):
        scores = (own / temperature) @ z.T
        diagonal = torch.arange(len(own), device=z.device)
        scores[diagonal, start + diagonal] = -torch.inf
        return -F.log_softmax(scores, dim=-1).gather(1, positives[start : start + len(own)]).sum()

    losses = [checkpoint(some, own, z, start * chunk, use_reentrant=False) for start, own in enumerate(z.split(chunk))]
    return torch.stack(losses).sum() / positives.numel()


def siglip_loss(x, y, scale, bias):
    """Return the sigmoid loss as open_clip writes it: a matrix of labels and ``logsigmoid``."""
    scores = scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T + bias
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * scores).sum() / len(x)


def softplus_loss(x, y, scale, bias):
    """Return the same in fewer passes: ``softplus(-t) = softplus(t) - t`` needs no labels."""
    scores = scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T + bias
    return (F.softplus(scores).sum() - scores.diagonal().sum()) / len(x)


def byol_loss(predictions, targets):
    """Return the mean of ``2 - 2 cos`` over all pairs of different views, or over ``(B, D)`` pairs."""
    if isinstance(predictions, torch.Tensor) and predictions.ndim == 2:
        return (2 - 2 * (F.normalize(predictions, dim=-1) * F.normalize(targets, dim=-1)).sum(-1)).mean()
    p = [F.normalize(x, dim=-1) for x in predictions]
    t = [F.normalize(x.detach(), dim=-1) for x in targets]
    pairs = [(u, v) for u in range(len(p)) for v in range(len(t)) if u != v]
    return torch.stack([(2 - 2 * (p[u] * t[v]).sum(-1)).mean() for u, v in pairs]).mean()


class InfoNCELoss(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, views):
        return info_nce_loss(views if isinstance(views, torch.Tensor) else torch.stack(tuple(views)), self.temperature)


class CrossViewLoss(nn.Module):
    """CLIP's loss for every pair of views; with ``learnable`` it trains the logarithm of the scale, as CLIP does."""

    group = None  # of one process

    def __init__(self, temperature, learnable=False):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)])) if learnable else None

    def forward(self, views):
        return cross_view_loss(views, self.temperature if self.logit_scale is None else (-self.logit_scale).exp())


class SigLIPLoss(nn.Module):
    def __init__(self, scale, bias):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([float(bias)]))

    def forward(self, x, y, duplicates=None):
        return siglip_loss(x, y, self.logit_scale.exp(), self.logit_bias)


class BYOLLoss(nn.Module):
    def forward(self, predictions, targets):
        return byol_loss(predictions, targets)


@torch.no_grad()
def ema_update_(target, source, momentum):
    """Update the moving average of a module: one ``_foreach_lerp_`` for the parameters, copies of the buffers."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)
