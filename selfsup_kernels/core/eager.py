"""Code shared by the losses in eager PyTorch: differentiable unit rows and the backward of the normalisation."""

import functools

import torch

from selfsup_kernels.core import validate as check
from selfsup_kernels.core.once import once
from selfsup_kernels.core.ops import accumulation_dtype
from selfsup_kernels.core.transforms import active


def ordinary(view):
    """Return True if a call is plain eager PyTorch: not traced, not transformed, not under autocast."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or check.autocasts(view.device) or active())


def unit_rows(h, normalize, eps):
    """Return a copy of the rows (..., D), divided by their norm with ``normalize``, and 1 / max(norm, eps) (...), the
    latter negative where the norm is below eps; 1 without ``normalize``."""
    h = h.detach()
    if not normalize:
        return h.clone(), torch.ones_like(h[..., 0])
    norm = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float64)
    rnorm = torch.where(norm < eps, -1 / eps, 1 / norm)
    return (h * rnorm.abs()[..., None]).to(h.dtype), rnorm.to(h.dtype)


def through_the_norm(dz, z, rnorm, dtype):
    """Return the gradient of the rows in ``dtype`` from that of the unit rows z (..., D).

    rnorm (..., 1) is the reciprocal norm, negated where the norm is below eps.
    """
    # Below eps the norm is a constant: no projection. (An infinite row has rnorm 0 and is projected, to NaN.)
    along = torch.where(rnorm < 0, 0, (z * dz).sum(-1, keepdim=True))
    dz = torch.addcmul(dz, z, along, value=-1) * rnorm.abs()
    if dtype == torch.float16:  # dz / eps of a zero row overflows float16
        limit = torch.finfo(dtype).max
        dz = torch.where(rnorm < 0, dz.clamp(-limit, limit), dz)
    return dz


def scale_of(temperature_tensor, temperature, device):
    """Return 1 / temperature as a 0-dim float64 tensor; NaN if the temperature is not positive and finite."""
    if temperature_tensor is None:
        return torch.full((), 1 / temperature, dtype=torch.float64, device=device)
    t = temperature_tensor.detach().double().reshape(()).to(device)
    return torch.where((t > 0) & t.isfinite(), 1 / t, torch.nan)


def without_autocast(backward):
    """Run the decorated ``backward`` without autocast, which would multiply in 16 bits though the forward did not."""

    @functools.wraps(backward)
    def wrapper(ctx, *arguments):
        if not check.autocasts(ctx.device):
            return backward(ctx, *arguments)
        with torch.autocast(ctx.device.type, enabled=False):
            return backward(ctx, *arguments)

    return wrapper


class UnitRows(torch.autograd.Function):
    """Return (unit rows (M, D), 1 / temperature or None), in float32 or float64. Differentiable once, like the ops."""

    @staticmethod
    def forward(ctx, normalize, eps, temperature, *views):
        h = views[0].flatten(0, -2) if len(views) == 1 else torch.cat(views)
        z = h.to(accumulation_dtype(h.dtype))
        scale = rnorm = None
        if normalize:
            # In float64, since the squares of very long or short rows leave the range of float32.
            norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=torch.float64)
            eps = max(eps, torch.finfo(z.dtype).tiny)  # the reciprocal is finite
            rnorm = norm.clamp_min(eps).reciprocal_().to(z.dtype)
            z = z * rnorm
            rnorm = torch.where(norm < eps, -rnorm, rnorm)
        elif len(views) == 1 and z.dtype == h.dtype:  # the input may be changed before the backward
            z = z.clone()
        if temperature is not None:
            scale = scale_of(temperature, 0.0, z.device).to(z.dtype)
        ctx.save_for_backward(z, rnorm, scale, temperature, *views)  # the inputs: for `once`
        ctx.device = z.device
        return z, scale

    @staticmethod
    @once
    @without_autocast
    def backward(ctx, saved, grad, grad_scale):
        z, rnorm, scale, temperature, *views = saved
        if temperature is not None and ctx.needs_input_grad[2]:
            temperature = (-scale * scale * grad_scale).to(temperature).view(temperature.shape)
        else:
            temperature = None
        dtype = views[0].dtype
        if rnorm is not None:
            grad = through_the_norm(grad, z, rnorm, dtype)
        grad = grad.to(dtype)
        grads = [grad.view(views[0].shape)] if len(views) == 1 else grad.split(views[0].shape[0])
        return None, None, temperature, *grads
