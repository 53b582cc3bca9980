"""Parameters sharded over processes: DTensors, and the FSDP2 modules that hold them.

An average is elementwise, so every process updates its own shard without communication. The torch modules are not
imported here: if they are not imported yet, there are no such tensors.
"""

import sys

import torch


def fsdp_module_type():
    """Return the class of modules that ``fully_shard`` was called on; None if its module is not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def is_fsdp(module: torch.nn.Module) -> bool:
    """Return True if ``fully_shard`` was called on this module or a submodule."""
    kind = fsdp_module_type()
    return kind is not None and any(isinstance(part, kind) for part in module.modules())


def dtensor_type():
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor) -> bool:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def gathered(tensor):
    """Return the tensor; a DTensor is gathered into a plain tensor, which every process of its mesh must do.

    Its gradient is averaged over the processes, as ``fully_shard`` does.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


@torch.no_grad()
def local(targets, sources, pair_names):
    """Return both lists with each DTensor replaced by its local shard, or None if there are no DTensors.

    Args:
        pair_names: a function from a position to the names of target and source for the messages.

    Raises:
        TypeError: only one tensor of a pair is a DTensor, or a target is a view of a DTensor.
        ValueError: shapes, meshes or placements of a pair differ, so its shards hold different elements.
    """
    kind = dtensor_type()
    if kind is None or not any(isinstance(x, kind) for x in (*targets, *sources)):
        return None
    shards: tuple[list, list] = ([], [])
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        spread = isinstance(target, kind)
        if spread != isinstance(source, kind):
            t, s = pair_names(i)
            raise TypeError(
                f"{s}: expected {'a DTensor' if spread else 'a plain tensor'} like {t}, got"
                f" {type(source).__name__} (call reshard() on a module that fully_shard left gathered)"
            )
        if spread:
            _check_same(target, source, pair_names(i))
            if target._is_view():
                raise TypeError(
                    f"{pair_names(i)[0]}: expected a DTensor of its own, got a view of one, whose local part may be"
                    " gathered memory: writes to it would be lost"
                )
            target, source = target.to_local(), source.to_local()
        shards[0].append(target)
        shards[1].append(source)
    return shards


def _check_same(target, source, names) -> None:
    t, s = names
    if target.shape != source.shape:
        raise ValueError(f"{s}: expected the shape of {t}, {tuple(target.shape)}, got {tuple(source.shape)}")
    if target.device_mesh != source.device_mesh or target.placements != source.placements:
        raise ValueError(
            f"{s}: expected the mesh and placements of {t}, {target.device_mesh} {target.placements},"
            f" got {source.device_mesh} {source.placements}"
        )
