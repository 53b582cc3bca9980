"""The BYOL loss over V views in eager PyTorch, linear in V: the ops ``byol_*.reference``.

With unit rows only the sum of the targets matters: over the other views ``v != u``,
``sum_v (2 - 2 <p_u, t_v>) = 2 (V - 1) - 2 <p_u, T - t_u>`` with ``T = sum_v t_v``.
"""

import torch


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
    along = torch.where(rp < 0, 0, cosines * rp)  # below the floor the norm is a constant: no projection
    dp = _opposite(t, rt).addcmul_(p, along.unsqueeze(-1), value=-1).mul_((grad * scale * rp.abs()).unsqueeze(-1))
    dtype = predictions[0].dtype
    if dtype == torch.float16:  # dp / eps of a zero row is finite in float32 only
        limit = torch.finfo(dtype).max
        dp = torch.where((rp < 0).unsqueeze(-1), dp.clamp(-limit, limit), dp)
    return dp.to(dtype)


def _wide(views):
    """(V, B, D), in float32 at least."""
    dtype = torch.float64 if views[0].dtype == torch.float64 else torch.float32
    views = [v.detach().to(dtype) for v in views]
    return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)


def _reciprocal_norm(x, eps):
    """1 / max(|x|, eps), negative where the floor was taken."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return torch.where(norm < eps, -1 / eps, 1 / norm).to(x.dtype)


def _opposite(t, rt):
    """The sum of the other views' unit rows; with one view (pairs) the unit rows themselves."""
    unit = t * rt.abs().unsqueeze(-1)
    return unit if len(unit) == 1 else unit.sum(0) - unit
