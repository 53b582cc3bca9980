"""What the methods exchange with other processes. Every call is collective: each process of the group makes it."""

import torch
from torch import distributed as dist

from selfsup_kernels import distributed


@torch.no_grad()
def gather_rows(rows: torch.Tensor, group) -> torch.Tensor:
    """The ``(N, D)`` rows of all processes in the order of their ranks; each may bring another number of them.

    Raises:
        ValueError: D differs between processes; on all of them.
    """
    if group is None:
        return rows
    own = torch.tensor(rows.shape, dtype=torch.int64, device=distributed._host_device(group))
    every = own.new_empty(dist.get_world_size(group) * 2)
    distributed._all_gather(every, own, group=group)
    sizes, widths = every.view(-1, 2).T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"group: expected rows of one width on all processes, got {widths}")
    shares = distributed.Shares(group, dist.get_rank(group), tuple(sizes))
    return distributed.gather_samples(rows[None], shares)[0]


def global_mean(values: torch.Tensor, group) -> torch.Tensor:
    """The mean of all processes' values, on each of them.

    As with the losses' ``group=``, its gradient is that of the sum of what all processes have computed, each doing the
    same with its own: the average that DistributedDataParallel takes is then the gradient of the mean.
    """
    if group is None:
        return values.mean()
    with torch.no_grad():
        total = torch.stack(
            [values.sum().double(), torch.full((), values.numel(), dtype=torch.float64, device=values.device)]
        )
        dist.all_reduce(total, group=group)
    own = values.sum() * (dist.get_world_size(group) / total[1]).to(values.dtype)
    return own + ((total[0] / total[1]).to(values.dtype) - own.detach())
