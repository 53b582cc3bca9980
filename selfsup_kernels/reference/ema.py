"""The moving average in eager PyTorch: the op ``ema_update_.reference``."""

import torch


def update_(targets, sources, momentum_tensor, momentum, seed):
    weight = 1 - (momentum if momentum_tensor is None else momentum_tensor.detach().double())
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.numel() == 0 or target is source:
            continue
        if not target.is_floating_point():
            target.copy_(source)
            continue
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        step = torch.as_tensor(weight, dtype=wide, device=target.device)
        value = torch.lerp(target.detach().to(wide), source.detach().to(wide), step)
        if seed is not None and target.dtype in (torch.bfloat16, torch.float16):
            value = _round_stochastically(value, target.dtype, seed, i)
        target.copy_(value)


def _round_stochastically(value, dtype, seed, stream):
    """Round float32 to one of its two neighbours in ``dtype``, up with probability its distance from the lower one."""
    down = value.to(dtype)
    above = down.float().abs() > value.abs()
    # `down` is rounded to nearest; step back towards zero where that went past the value.
    down = torch.where(above, torch.nextafter(down, torch.zeros_like(down)), down)
    up = torch.nextafter(down, torch.copysign(torch.full_like(down, torch.inf), value.to(dtype)))
    share = (value - down.float()) / (up.float() - down.float())
    generator = torch.Generator(device=value.device).manual_seed(int(seed) * 1_000_003 + stream)
    draw = torch.rand(value.shape, generator=generator, device=value.device)
    rounded = torch.where(draw < share, up, down)
    return torch.where(value.isfinite() & up.isfinite(), rounded, value.to(dtype))
