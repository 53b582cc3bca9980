"""Collect the tensors of a module by name, and pair those of two modules."""

from typing import NamedTuple

import torch

from selfsup_kernels.core import shards, wrappers
from selfsup_kernels.ema.checks import kind

Tensor = torch.Tensor


class Named(NamedTuple):
    """The tensors of a module by name, each tensor once."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    scratch: set[str]
    """The names of non-persistent buffers."""
    tied: bool
    """True if a tensor, or a non-empty submodule, has several names."""
    modules: list[torch.nn.Module] | None
    """The modules, parents first; None if FSDP2 holds some of their parameters, which every walk has to reshard."""


def named_tensors(module: torch.nn.Module) -> Named:
    """Return parameters and buffers by name, in one fast pass over the modules: every update makes two.

    Names omit the parts that PyTorch's wrappers add (:func:`selfsup_kernels.core.wrappers.is_transparent`), so wrapping
    does not change them.

    If FSDP2 has left parameters gathered (the root's after a forward without backward), they are resharded first:
    writes to gathered parameters would be lost.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    scratch: set[str] = set()
    seen, visited, tied, managed = set(), {}, False, False
    fsdp, wrapped = shards.fsdp_module_type(), wrappers.CHILDREN
    ahead = [("", module)]  # a stack is faster than the nested generators of named_modules
    while ahead:
        prefix, owner = ahead.pop()
        if owner in visited:
            tied = tied or bool(owner._parameters or owner._buffers or owner._modules)
            continue
        visited[owner] = None
        if fsdp is not None and isinstance(owner, fsdp):
            managed = True
            owner.reshard()  # before its submodules are visited: it may manage their parameters too
        parts = owner._modules
        for found, own in ((parameters, owner._parameters), (buffers, owner._buffers)):
            for key, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) in seen:
                    tied = True
                else:
                    seen.add(id(tensor))
                    found[prefix + key] = tensor
        if owner._non_persistent_buffers_set:
            scratch.update([prefix + key for key in owner._non_persistent_buffers_set])
        if parts:
            for key, part in reversed(parts.items()):  # so that the first one is popped first
                if part is not None:
                    transparent = key in wrapped and wrappers.is_transparent(owner, key)
                    ahead.append((prefix if transparent else f"{prefix}{key}.", part))
    return Named(parameters, buffers, scratch, tied, None if managed else list(visited))


def match(
    targets: dict[str, Tensor], sources: dict[str, Tensor], optional=frozenset()
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Pair the tensors of two modules by name and return (targets, sources, names).

    Tensors with ``optional`` names are paired if both modules have one and they fit, and left out otherwise.

    Raises:
        ValueError: one module has a name that the other lacks.
    """
    if optional:
        left = {name for name in optional if not fits(targets.get(name), sources.get(name))}
        targets, sources = ({k: x for k, x in named.items() if k not in left} for named in (targets, sources))
    if targets.keys() != sources.keys():
        only_target = [name for name in targets if name not in sources]
        only_source = [name for name in sources if name not in targets]
        raise ValueError(
            "targets, sources: expected modules with the same names of parameters and buffers;"
            f" only in the target: {_some(only_target)}; only in the source: {_some(only_source)}"
        )
    return list(targets.values()), [sources[name] for name in targets], list(targets)


def optional_names(targets: Named, sources: Named) -> set[str]:
    """Return the names of buffers persistent in neither module; a forward may create or resize them in one of them."""
    if not targets.scratch and not sources.scratch:
        return set()
    saved = (targets.buffers.keys() - targets.scratch) | (sources.buffers.keys() - sources.scratch)
    return (targets.scratch | sources.scratch) - saved


def fits(target: Tensor | None, source: Tensor | None) -> bool:
    """Return True if both exist and one can be averaged or copied to the other."""
    return (
        target is not None
        and source is not None
        and target.shape == source.shape
        and target.device == source.device
        and kind(target.dtype) == kind(source.dtype)
    )


def match_modules(targets, sources) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Run :func:`match` on all parameters and buffers of two modules."""
    for name, module in (("targets", targets), ("sources", sources)):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{name}: expected an nn.Module like the other argument, got {type(module).__name__}")
    own, theirs = named_tensors(targets), named_tensors(sources)
    return match(own.parameters | own.buffers, theirs.parameters | theirs.buffers, optional_names(own, theirs))


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
