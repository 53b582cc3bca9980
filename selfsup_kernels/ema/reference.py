"""The moving average in eager PyTorch: the op ``ema_update_.reference``.

``t <- m t + (1 - m) s`` (arXiv:2006.07733, eq. 1) in float32 at least, as ``t + (1 - m) (s - t)`` where that is finite.
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
    """Update the pairs of one wide dtype by one ``torch._foreach_lerp``; returns the numbers of those that it took:
    none where an average is not finite (:func:`average` says what that takes), or the host may not wait to see it."""
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
    """``torch.lerp``, and the sum ``(1 - weight) t + weight s`` where that is not finite: an end is infinite, or
    ``s - t`` overflows. An infinity of weight 0 does not count; NaN in either end is NaN."""
    step = torch.lerp(t, s, weight)
    if step.device.type == "cpu" and math.isfinite(step.sum()):  # the usual case; elsewhere reading would wait
        return step
    return torch.where(step.isfinite(), step, _share(t, 1 - weight) + _share(s, weight))


def _share(x, weight):
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
    return torch.where((weight == 0) & x.isinf(), -0.0, weight * x)  # -0 + y is y, also where that is -0


def _same(target, source):
    return target is source or (target.dtype == source.dtype and target.is_set_to(source))


_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _round_stochastically(value, dtype, seed, stream):
    """Round float32 to one of its two neighbours in ``dtype``, with a probability that makes the mean exact.

    The neighbours come from the bits: both formats are sign and magnitude, so that the next number away from zero is
    the next integer, from one subnormal to another and on into the normal numbers. Where that is infinity the value
    is rounded to nearest.
    """
    nearest = value.to(dtype)
    bits = nearest.view(_BITS[dtype])
    inner = torch.where(nearest.float().abs() > value.abs(), bits - 1, bits)  # the neighbour towards zero
    near, far = inner.view(dtype).double(), (inner + 1).view(dtype).double()
    share = (value.double() - near) / (far - near)
    generator = torch.Generator(device=value.device).manual_seed((int(seed) + stream * 0x9E3779B97F4A7C15) % (1 << 63))
    # float64 draws: float32's are multiples of 2^-24, coarser than the share of a number far below the smallest one.
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=torch.float64)
    rounded = torch.where(draw < share, inner + 1, inner).view(dtype)
    # Not where(isfinite(far)): NaN and infinity have no neighbours to choose from either.
    return torch.where(value.isfinite() & far.isfinite(), rounded, nearest)
