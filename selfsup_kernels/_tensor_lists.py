"""Checks of the lists of tensors (or the two modules) that a multi-tensor update gets.

They run on every step for hundreds of tensors. So each list goes through a test that is made of C calls and only says
"fine" or "look closer"; what looks closer goes pair by pair and names the tensor. Nothing reads a value.
"""

from collections.abc import Iterable
from operator import add, attrgetter, eq, gt

import torch

from selfsup_kernels import _overlap, _shards
from selfsup_kernels import _validate as check

Tensor = torch.Tensor


def named_tensors(module: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters, buffers) by name, each tensor once.

    As ``named_parameters`` and ``named_buffers``, in one pass over the modules, which every update makes twice, and
    without the ``_orig_mod.`` that ``torch.compile`` puts into the names: a compiled module has the parameters of the
    module that it wraps.

    Where FSDP2 has left gathered parameters (the root's after a forward without backward), the shards come back first:
    what is written into gathered ones would be lost.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen, visited = set(), set()
    fsdp = _shards.fsdp_module_type()
    ahead = [("", module)]  # a stack: ``named_modules`` has a generator for every module instead
    while ahead:
        prefix, owner = ahead.pop()
        if owner in visited:
            continue
        visited.add(owner)
        if fsdp is not None and isinstance(owner, fsdp):
            owner.reshard()  # before its parts are visited, whose parameters it may hold too
        for found, own in ((parameters, owner._parameters), (buffers, owner._buffers)):
            for key, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[prefix + key] = tensor
        for key, part in reversed(owner._modules.items()):  # so that the first one is taken first
            if part is not None:
                ahead.append((prefix if key == "_orig_mod" else f"{prefix}{key}.", part))
    return parameters, buffers


def match(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """(targets, sources, names): the tensors of two modules, paired by name.

    Raises:
        ValueError: one has a name that the other lacks.
    """
    if targets.keys() != sources.keys():
        only_target = [name for name in targets if name not in sources]
        only_source = [name for name in sources if name not in targets]
        raise ValueError(
            "targets, sources: expected modules with the same names of parameters and buffers;"
            f" only in the target: {_some(only_target)}; only in the source: {_some(only_source)}"
        )
    return list(targets.values()), [sources[name] for name in targets], list(targets)


def match_modules(targets, sources) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """As :func:`match`, for all parameters and buffers of two modules."""
    named = []
    for name, module in (("targets", targets), ("sources", sources)):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{name}: expected an nn.Module like the other argument, got {type(module).__name__}")
        parameters, buffers = named_tensors(module)
        named.append(parameters | buffers)
    return match(*named)


def tensor_list(name: str, value) -> list[Tensor]:
    """What an iterable holds; whether it is tensors is for :func:`check_update`."""
    if isinstance(value, (Tensor, str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of tensors or an nn.Module, got {type(value).__name__}")
    return list(value)


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def check_update(
    targets: list[Tensor], sources: list[Tensor], names=None, *, averaged: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Refuse what an in-place update of ``targets`` from ``sources`` is not defined for.

    Returns both lists without the pairs that have nothing to do: no elements, or the source is the destination. Of
    DTensors it returns the local shards.
    ``names``, one per target, are for the messages. Without ``averaged`` the sources are only copied, which any dtype
    allows.

    Raises:
        ValueError: different lengths, shapes, devices or (DTensors) placements; a destination appears twice.
        TypeError: not tensors, dtypes that cannot be averaged, or only one of a pair is a DTensor.
        RuntimeError: a destination overlaps itself, another one or a source.
    """
    if len(targets) != len(sources):
        raise ValueError(f"sources: expected {len(targets)} tensors, as many as targets, got {len(sources)}")
    if torch.compiler.is_compiling():
        # Guards on the shapes make these checks once per graph. Addresses do not exist while tracing.
        _check_pairs(targets, sources, names, averaged)
        return targets, sources
    signature = _signature(targets, sources, averaged)
    if signature is None:
        shards = _shards.local(targets, sources, lambda i: _names(names, i))
        if shards is not None:
            return check_update(*shards, names, averaged=averaged)
    key = (len(targets), signature[1][0]) if targets and signature is not None else None
    if key is not None and _accepted.get(key) == signature:
        return targets, sources
    if not _all_fine(targets, sources):
        _check_pairs(targets, sources, names, averaged)
    if not targets or targets[0].device.type == "meta":
        return targets, sources
    kept = _check_memory(targets, sources, names)
    if key is not None and len(kept[0]) == len(targets):
        if len(_accepted) >= _MOST_ACCEPTED:
            _accepted.clear()
        _accepted[key] = signature
    return kept


_accepted: dict[tuple[int, int], tuple] = {}
"""Signatures of lists that passed whole, by length and first address: a training loop brings the same every step."""
_MOST_ACCEPTED = 16


def _signature(targets, sources, averaged):
    """All that the checks depend on; None if some are not plain tensors with memory of their own."""
    both = targets + sources
    if not _PLAIN.issuperset(map(type, both)):
        return None
    try:
        # Memory of another device has other addresses.
        return (
            averaged,
            list(map(Tensor.data_ptr, both)),
            list(map(Tensor.size, both)),
            list(map(Tensor.stride, both)),
            list(map(_dtype, both)),
        )
    except RuntimeError:  # sparse tensors
        return None


_device, _dtype, _layout, _nbytes = map(attrgetter, ("device", "dtype", "layout", "nbytes"))
_PLAIN = {Tensor, torch.nn.Parameter}


def _all_fine(targets, sources) -> bool:
    both = targets + sources
    return (
        _PLAIN.issuperset(map(type, both))
        and list(map(Tensor.size, targets)) == list(map(Tensor.size, sources))
        and len(set(map(_device, both))) <= 1
        and set(map(_dtype, both)).issubset(check.FLOATING)
        and set(map(_layout, both)) <= {torch.strided}
    )


def _check_pairs(targets, sources, names, averaged) -> None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        t, s = _names(names, i)
        for name, tensor in ((t, target), (s, source)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
            if tensor.device != targets[0].device:
                first = _names(names, 0)[0]
                raise ValueError(f"{name}: expected the device of {first}, {targets[0].device}, got {tensor.device}")
        if target.shape != source.shape:
            raise ValueError(f"{s}: expected the shape of {t}, {tuple(target.shape)}, got {tuple(source.shape)}")
        if target.dtype in check.FLOATING and source.dtype in check.FLOATING:
            continue
        if target.dtype != source.dtype:
            raise TypeError(f"{s}: expected the dtype of {t}, {target.dtype}, got {source.dtype}")
        if averaged and (target.is_floating_point() or target.is_complex()):
            raise TypeError(f"{t}: expected float64, float32, bfloat16, float16, integers or bool, got {target.dtype}")


def _names(names, i) -> tuple[str, str]:
    if names is None:
        return f"targets[{i}]", f"sources[{i}]"
    return f"{names[i]} (target)", f"{names[i]} (source)"


def _check_memory(targets, sources, names):
    t_start, s_start = list(map(Tensor.data_ptr, targets)), list(map(Tensor.data_ptr, sources))
    t_bytes, s_bytes = list(map(_nbytes, targets)), list(map(_nbytes, sources))
    index = [i for i, size in enumerate(t_bytes) if size] if 0 in t_bytes else range(len(targets))
    _check_twice(targets, t_start, index, names)
    if any(map(eq, t_start, s_start)):
        index = [i for i in index if not _overlap.identical(targets[i], sources[i])]
    if len(index) < len(targets):
        targets, sources, t_start, s_start, t_bytes, s_bytes = (
            [values[i] for i in index] for values in (targets, sources, t_start, s_start, t_bytes, s_bytes)
        )

    t_end, s_end = list(map(add, t_start, t_bytes)), list(map(add, s_start, s_bytes))
    if not all(map(Tensor.is_contiguous, targets)):
        for position in _not_dense(targets):
            t_end[position] = _overlap.bounds(targets[position])[1]
            _check_inside(targets[position], index[position], names)
    if not all(map(Tensor.is_contiguous, sources)):
        for position in _not_dense(sources):
            s_end[position] = _overlap.bounds(sources[position])[1]
    # Ranges are disjoint if and only if, both sorted, each ends before the next one starts.
    if any(map(gt, sorted(t_end + s_end), sorted(t_start + s_start)[1:])):
        ranges = [(start, end, True, i) for start, end, i in zip(t_start, t_end, index, strict=True)]
        ranges += [(start, end, False, i) for start, end, i in zip(s_start, s_end, index, strict=True)]
        _check_crossings(sorted(ranges), dict(zip(index, zip(sources, targets, strict=True), strict=True)), names)
    return targets, sources


def _check_twice(targets, starts, index, names) -> None:
    if len(set(starts)) == len(starts):
        return
    first: dict[int, int] = {}
    for i in index:
        j = first.setdefault(starts[i], i)
        if i != j:
            t, other = _names(names, i)[0], _names(names, j)[0]
            if _overlap.identical(targets[i], targets[j]):
                raise ValueError(f"{t}: expected every destination once, but {other} is the same tensor")
            raise RuntimeError(f"{t}: expected memory of its own, but it partly overlaps {other}")


def _not_dense(tensors) -> list[int]:
    """The positions of those that may have gaps, or elements that share memory."""
    return [
        i
        for i, x in enumerate(tensors)
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    ]


def _check_inside(target, i, names) -> None:
    if _overlap.overlaps_itself(target):
        raise RuntimeError(
            f"{_names(names, i)[0]}: expected elements that do not share memory (an expanded tensor?),"
            f" got shape {tuple(target.shape)} with strides {target.stride()}"
        )


def _check_crossings(ranges, pairs, names) -> None:
    """The exact answer for every two address ranges that cross, one of them a destination's.

    ``ranges`` are sorted ``(first, last, is_target, i)``, and ``pairs[i]`` is ``(source, target)``.
    """
    crossing: list[tuple] = []
    for one in ranges:
        crossing = [other for other in crossing if other[1] > one[0]]
        for other in crossing:
            (_, _, target, i), (_, _, other_target, j) = one, other
            if (target or other_target) and _overlap.shares_memory(pairs[i][target], pairs[j][other_target]):
                labels = [_names(names, i)[not target], _names(names, j)[not other_target]]
                if not target:  # the destination first: it is what must not be shared
                    labels.reverse()
                raise RuntimeError(f"{labels[0]}: expected memory of its own, but it partly overlaps {labels[1]}")
        crossing.append(one)
