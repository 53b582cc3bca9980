"""The fused optimizer steps in eager PyTorch: the ops ``fused_sgd_.reference`` and ``fused_adamw_.reference``.

The arithmetic is that of ``torch.optim.SGD`` and ``torch.optim.AdamW``, in float32 or float64, and each result is
rounded to its tensor's dtype once. The moving average reads the parameters as stored.
"""

import math

import torch

from selfsup_kernels.ema.reference import update_


def sgd_(
    params,
    grads,
    momentum_buffers,
    targets,
    lr_tensor,
    lr,
    ema_tensor,
    ema_momentum,
    seed,
    scales,
    weight_decay,
    momentum,
    dampening,
    nesterov,
    maximize,
    first,
):
    rate = _number(lr_tensor, lr)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        p, g = _wide(param), _wide(grad)
        g = -g if maximize else g
        if weight_decay != 0:  # 0 times an infinite parameter would be NaN
            g = weight_decay * p + g
        if scales is not None:
            g = g * scales[i].to(g.dtype)
        if momentum_buffers:
            buffer = g if first else momentum * _wide(momentum_buffers[i]) + (1 - dampening) * g
            momentum_buffers[i].copy_(buffer)
            g = g + momentum * buffer if nesterov else buffer
        param.copy_(p - rate.to(p.dtype) * g if isinstance(rate, torch.Tensor) else p - rate * g)
    _average(targets, params, ema_tensor, ema_momentum, seed)


def adamw_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    targets,
    lr_tensor,
    lr,
    ema_tensor,
    ema_momentum,
    seed,
    step,
    beta1,
    beta2,
    eps,
    weight_decay,
    maximize,
):
    rate = _number(lr_tensor, lr)
    unbias1, unbias2 = 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g = _wide(param), -_wide(grad) if maximize else _wide(grad)
        m = torch.lerp(_wide(exp_avg), g, 1 - beta1)
        v = beta2 * _wide(exp_avg_sq) + (1 - beta2) * g * g
        keep, size = 1 - rate * weight_decay, rate * unbias1
        if isinstance(rate, torch.Tensor):
            keep, size = keep.to(p.dtype), size.to(p.dtype)
        param.copy_(keep * p - size * (m / (unbias2 * v.sqrt() + eps)))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    _average(targets, params, ema_tensor, ema_momentum, seed)


def _number(tensor, number):
    return number if tensor is None else tensor.detach().double()


def _wide(tensor):
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _average(targets, params, ema_tensor, ema_momentum, seed):
    pairs = [(t, p) if t.numel() else (t, t) for t, p in zip(targets, params, strict=True)]
    update_([t for t, _ in pairs], [p for _, p in pairs], ema_tensor, ema_momentum, seed)
