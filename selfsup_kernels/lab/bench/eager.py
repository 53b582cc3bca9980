"""Write the losses in eager PyTorch as a careful user does today: the baseline of every comparison.

``reference.dense`` is the specification and favours clarity; timing against it would flatter the kernels. Here one
matrix product makes all similarities, the diagonal is filled in place, and the positives are picked from one
log-softmax, which was the fastest of several forms.
"""

import torch
import torch.nn.functional as F
from torch import nn


def info_nce_loss(views, temperature):
    """Return N-view NT-Xent (``supcon_out``): ``(V, B, D)`` -> the mean over all V * B anchors."""
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    scores = (z / temperature) @ z.T
    scores.fill_diagonal_(-torch.inf)
    anchors = torch.arange(num_views * batch, device=z.device)
    if num_views == 2:
        return F.cross_entropy(scores, anchors.roll(batch))
    positives = torch.stack([anchors.roll(shift * batch) for shift in range(1, num_views)], dim=1)
    return -F.log_softmax(scores, dim=-1).gather(1, positives).mean()


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


class BYOLLoss(nn.Module):
    def forward(self, predictions, targets):
        return byol_loss(predictions, targets)


@torch.no_grad()
def ema_update_(target, source, momentum):
    """Update the moving average of a module: one ``_foreach_lerp_`` for the parameters, copies of the buffers."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)
