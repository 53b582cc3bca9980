"""The sigmoid loss in eager PyTorch, ``impl="reference"``: the ops ``siglip_*.reference``.

Scores exist for a few rows of x at a time, so that memory is linear in the rows. A score ``t`` of a negative pair adds
``softplus(t)`` to the loss, and its derivative is ``sigmoid(t)``; a positive pair adds ``softplus(-t)`` and has
``-sigmoid(-t)``. So one pass over the scores gives the loss and all gradients.

Shapes: N rows of x, n of them in a block, M rows of y, D features.
"""

import torch
import torch.nn.functional as F

from selfsup_kernels.core.eager import through_the_norm, unit_rows
from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype
from selfsup_kernels.siglip.call import Call

_BLOCK_BYTES = 1 << 22
"""Bytes of scores per block. Smaller blocks pay more for calls of operators, larger ones leave the cache."""


def value(x, y, duplicates, scale_tensor, bias_tensor, *call):
    loss, *_ = value_and_grad(x, y, duplicates, scale_tensor, bias_tensor, None, *call, False, False, scalars=False)
    return loss


def value_and_grad(x, y, duplicates, scale_tensor, bias_tensor, upstream, *rest, scalars=True):
    *call, need_x, need_y = rest
    call = Call(*call)
    acc, reduction = accumulation_dtype(x.dtype), REDUCTIONS[call.reduction]
    with torch.autocast(x.device.type, enabled=False):
        (x, x_rnorm), (y, y_rnorm) = (unit_rows(h.to(acc), call.normalize, call.eps) for h in (x, y))
        scale, bias = _number(scale_tensor, call.scale, x), _number(bias_tensor, call.bias, x)
        if upstream is None:
            upstream = torch.full((), 1 / call.rows if reduction == "mean" else 1.0, dtype=acc, device=x.device)
        weights = upstream.expand(call.rows)

        losses, sums = [], torch.zeros(2, dtype=torch.float64, device=x.device)
        grad_x = x.new_zeros((call.rows if need_x else 0, call.dim))
        grad_y = y.new_zeros((call.columns if need_y else 0, call.dim))
        step = max(1, _BLOCK_BYTES // (call.columns * x.element_size()))
        for start in range(0, call.rows, step):
            block = slice(start, min(start + step, call.rows))
            products = x[block] @ y.T
            scores = torch.addcmul(bias, products, scale)
            row = torch.arange(block.stop - start, device=x.device)
            column = row + (call.first + start)
            positive = scores[row, column]
            left_out = (row, column)
            if duplicates is not None:
                left_out = duplicates[call.first + start : call.first + block.stop, None] == duplicates[None, :]
            scores[left_out] = -torch.inf
            losses.append(_softplus(scores).sum(1) + _softplus(-positive))
            if not (scalars or need_x or need_y):
                continue
            gradient = scores.sigmoid_()
            gradient[row, column] = -torch.sigmoid(-positive)
            gradient *= weights[block, None]
            if scalars:
                along = torch.linalg.vecdot(gradient, products)
                sums += torch.stack([along.sum(dtype=torch.float64), gradient.sum(dtype=torch.float64)])
            if need_x:
                torch.mm(gradient, y, out=grad_x[block])
            if need_y:
                grad_y.addmm_(gradient.T, x[block])
        if need_x:
            grad_x = _of_rows(grad_x, x, x_rnorm, scale, call)
        if need_y:
            grad_y = _of_rows(grad_y, y, y_rnorm, scale, call)
        loss = torch.cat(losses)
        loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return loss, grad_x, grad_y, sums


def _number(tensor, number, like):
    if tensor is None:
        return torch.full((), number, dtype=like.dtype, device=like.device)
    return tensor.detach().reshape(()).to(like)


def _softplus(t):
    """Return ``log(1 + exp(t))``; ``F.softplus`` drops the small term of large t, and ``logsigmoid`` does not."""
    return -F.logsigmoid(-t)


def _of_rows(gradient, z, rnorm, scale, call):
    """Return the gradient of the rows from ``sum_j G_ij y_j`` (N, D)."""
    gradient = gradient * scale
    return through_the_norm(gradient, z, rnorm[:, None], z.dtype) if call.normalize else gradient
