"""The moving average in eager PyTorch: the op ``ema_update_.reference``.

``t <- m t + (1 - m) s`` (arXiv:2006.07733, eq. 1) in float32 or float64, as ``t + (1 - m) (s - t)`` if that is finite.
"""

import math

import torch


def update_(targets, sources, momentum_tensor, momentum, seed):
    pairs = list(zip(targets, sources, strict=True))
    done = _together(pairs, momentum) if momentum_tensor is None else ()
    weight = 1 - (momentum if momentum_tensor is None else momentum_tensor.detach().double())
    for i, (target, source) in enumerate(pairs):
        if i in done or target.numel() == 0 or _same(target, source):
            continue
        if not target.is_floating_point():
            target.copy_(source)
            continue
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        step = torch.as_tensor(weight, dtype=wide, device=target.device)
        value = average(target.detach().to(wide), source.detach().to(wide), step)
        if seed is not None and target.dtype in _BITS:
            value = _round_stochastically(value, target.dtype, seed, i)
        target.copy_(value)


def _together(pairs, momentum):
    """Update float32 and float64 pairs with one ``torch._foreach_lerp`` each; return the positions of updated pairs.

    A group with a non-finite average is skipped (:func:`average` handles it), and so are all groups during CUDA graph
    capture, where the host cannot read values.
    """
    done = set()
    if any(t.is_cuda for t, _ in pairs) and torch.cuda.is_current_stream_capturing():
        return done
    for dtype in (torch.float32, torch.float64):
        mine = [i for i, (t, s) in enumerate(pairs) if t.dtype == s.dtype == dtype and t.numel() and not _same(t, s)]
        if len(mine) < 2 or len({pairs[i][0].device for i in mine}) > 1:
            continue
        ours = [pairs[i][0].detach() for i in mine]
        averages = torch._foreach_lerp(ours, [pairs[i][1].detach() for i in mine], 1 - momentum)
        if torch.stack(torch._foreach_norm(averages)).isfinite().all():
            torch._foreach_copy_(ours, averages)
            done.update(mine)
    return done


def average(t, s, weight):
    """Return ``torch.lerp``, or the sum ``(1 - weight) t + weight s`` where that is not finite: ``t`` or ``s`` is
    infinite, or ``s - t`` overflows. An infinity with weight 0 counts as 0; NaN in either one gives NaN."""
    step = torch.lerp(t, s, weight)
    if step.device.type == "cpu" and math.isfinite(step.sum()):  # usual; other devices would sync
        return step
    return torch.where(step.isfinite(), step, _share(t, 1 - weight) + _share(s, weight))


def _share(x, weight):
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
    return torch.where((weight == 0) & x.isinf(), -0.0, weight * x)  # -0 + y is y, even for y = -0


def _same(target, source):
    return target is source or (target.dtype == source.dtype and target.is_set_to(source))


_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _round_stochastically(value, dtype, seed, stream):
    """Round float32 to one of its two neighbours in ``dtype``, with a probability that makes the mean exact.

    The neighbours come from the bits: both formats are sign and magnitude, so the next number away from zero has the
    next integer as its bits, for subnormal and normal numbers. If that number is infinite, the value is rounded to
    nearest.
    """
    nearest = value.to(dtype)
    bits = nearest.view(_BITS[dtype])
    inner = torch.where(nearest.float().abs() > value.abs(), bits - 1, bits)  # neighbour towards zero
    near, far = inner.view(dtype).double(), (inner + 1).view(dtype).double()
    share = (value.double() - near) / (far - near)
    generator = torch.Generator(device=value.device).manual_seed((int(seed) + stream * 0x9E3779B97F4A7C15) % (1 << 63))
    # Draw in float64: float32 draws are multiples of 2^-24, coarser than the share of a value far below the smallest
    # number of ``dtype``.
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=torch.float64)
    rounded = torch.where(draw < share, inner + 1, inner).view(dtype)
    # Checks value too: NaN and infinity have no neighbours.
    return torch.where(value.isfinite() & far.isfinite(), rounded, nearest)
