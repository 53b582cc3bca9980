"""What MoCo exchanges with other processes. Every call is collective: each process of the group makes it."""

import torch
from torch import distributed


@torch.no_grad()
def gather_rows(rows: torch.Tensor, group) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; each process may bring another number of them."""
    if group is None:
        return rows
    world = distributed.get_world_size(group)
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    distributed.all_gather(counts, count, group=group)
    counts = [int(c) for c in counts]
    longest = max(counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def global_mean(values: torch.Tensor, group) -> torch.Tensor:
    """The mean of all processes' values, on each of them.

    As with the losses' ``group=``, its gradient is that of the sum of what all processes have computed, each doing the
    same with its own: the average that DistributedDataParallel takes is then the gradient of the mean.
    """
    if group is None:
        return values.mean()
    with torch.no_grad():
        total = torch.stack([values.sum().double(), values.new_tensor(values.numel(), dtype=torch.float64)])
        distributed.all_reduce(total, group=group)
    own = values.sum() * (distributed.get_world_size(group) / total[1]).to(values.dtype)
    return own + ((total[0] / total[1]).to(values.dtype) - own.detach())
