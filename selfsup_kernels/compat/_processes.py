"""Drop-ins whose originals gather the embeddings of all processes by themselves."""

import torch.distributed as dist


def every_process():
    """The default process group where there is more than one process, None otherwise."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD
