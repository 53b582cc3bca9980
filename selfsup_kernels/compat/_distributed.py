"""What drop-ins that gather over processes share."""

import torch
from torch import distributed as dist


def gather_group(gather_distributed):
    """The group of all processes if ``gather_distributed`` and there is more than one, else None."""
    if gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def check_gather(gather_distributed) -> None:
    """Refuse ``gather_distributed`` where PyTorch cannot do it."""
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed: expected False, since this PyTorch was built without torch.distributed")


@torch.no_grad()
def gather_rows(rows):
    """The rows of all processes, one below the other, without gradient; every process has as many."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
