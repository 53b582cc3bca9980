"""The BYOL loss over V views in eager PyTorch, in time linear in V: the ops ``byol_*.reference``.

For unit rows the loss depends only on the sum of the targets: over the views ``v != u``,
``sum_v (2 - 2 <p_u, t_v>) = 2 (V - 1) - 2 <p_u, T - t_u>`` with ``T = sum_v t_v``.
"""

import torch

from selfsup_kernels.core.eager import UnitRows, ordinary
from selfsup_kernels.core.ops import REDUCTIONS


def forward(predictions, targets, eps, reduction):
    p, t = _wide(predictions), _wide(targets)
    rp, rt = _reciprocal_norm(p, eps), _reciprocal_norm(t, eps)
    cosines = (p * _opposite(t, rt)).sum(-1).mul_(rp.abs())
    loss = 2 - 2 * cosines / max(len(predictions) - 1, 1)
    if reduction:
        loss = loss.mean() if reduction == 1 else loss.sum()
    return loss, torch.stack([rp, rt, cosines])


def backward(grad, predictions, targets, stats, reduction):
    p, t = _wide(predictions), _wide(targets)
    rp, rt, cosines = stats
    scale = -2 / max(len(predictions) - 1, 1) / (cosines.numel() if reduction == 1 else 1)
    along = torch.where(rp < 0, 0, cosines * rp)  # below eps the norm is a constant: no projection
    dp = _opposite(t, rt).addcmul_(p, along.unsqueeze(-1), value=-1).mul_((grad * scale * rp.abs()).unsqueeze(-1))
    dtype = predictions[0].dtype
    if dtype == torch.float16:  # dp / eps of a zero row overflows float16
        limit = torch.finfo(dtype).max
        dp = torch.where((rp < 0).unsqueeze(-1), dp.clamp(-limit, limit), dp)
    return dp.to(dtype)


def _wide(views):
    """Stack the views as (V, B, D), in float32 or float64."""
    dtype = torch.float64 if views[0].dtype == torch.float64 else torch.float32
    views = [v.detach().to(dtype) for v in views]
    return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)


def _reciprocal_norm(x, eps):
    """Return 1 / max(|x|, eps), negated where |x| < eps."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return torch.where(norm < eps, -1 / eps, 1 / norm).to(x.dtype)


def _opposite(t, rt):
    """Return the sum of the other views' unit rows; with one view (pairs) the unit rows themselves."""
    unit = t * rt.abs().unsqueeze(-1)
    return unit if len(unit) == 1 else unit.sum(0) - unit


_MOST_ELEMENTS = 1 << 16
"""The largest view, in elements, that :func:`by_autograd` takes; above that the op makes fewer passes over memory."""


def takes(tensor, elements):
    """Return True if ``by_autograd`` should handle a call with tensors like ``tensor``, ``elements`` in each view."""
    return ordinary(tensor) and elements <= _MOST_ELEMENTS


def by_autograd(eps, reduction, stacked, num, *tensors):
    """Return the loss, in float32 or float64; the arguments are those of ``byol.autograd.BYOL``."""
    reduction, num_views = REDUCTIONS[reduction], len(tensors[0]) if stacked else num
    p, _ = UnitRows.apply(True, eps, None, *tensors[:num])
    with torch.no_grad():
        t, _ = UnitRows.apply(True, eps, None, *tensors[num:])
        if num_views > 1:  # the mean of the other views suffices
            t = t.view(num_views, -1, t.shape[1])
            t = (t.flip(0) if num_views == 2 else (t.sum(0) - t) / (num_views - 1)).flatten(0, 1)
    cosines = torch.linalg.vecdot(p, t)
    if reduction == "mean":
        return 2 - 2 * cosines.mean()
    loss = 2 - 2 * cosines
    return loss.sum() if reduction == "sum" else loss.view(num_views, -1)
