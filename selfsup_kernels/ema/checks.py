"""Check the lists of tensors of a multi-tensor update, and choose how each pair is updated.

The checks run on every step for hundreds of tensors. An op of the C++ extension first decides whether the lists are
fine; if not, Python checks pair by pair and names the tensor. No check reads values.
"""

from collections.abc import Iterable, Mapping
from operator import add, attrgetter, eq, gt
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from selfsup_kernels.core import backends, ops, shards
from selfsup_kernels.core import validate as check
from selfsup_kernels.ema import overlap

Tensor = torch.Tensor


def kind(dtype: torch.dtype):
    """Return a key shared by dtypes that convert into each other: the kernels' floating dtypes, the complex dtypes;
    every other dtype is its own kind."""
    if dtype in check.FLOATING:
        return "floating"
    return "complex" if dtype.is_complex else dtype


def is_averaged(dtype: torch.dtype) -> bool:
    """Return True if tensors of this dtype are averaged; others are copied."""
    return dtype.is_floating_point or dtype.is_complex


def tensor_list(name: str, value) -> list[Tensor]:
    """Return the items of an iterable as a list; :func:`check_update` checks that they are tensors."""
    named = isinstance(value, Mapping) and isinstance(next(iter(value), None), str)  # a state_dict
    if named or isinstance(value, (Tensor, str, bytes)) or not isinstance(value, Iterable):
        remedy = "; pass its values()" if named else ""
        raise TypeError(f"{name}: expected a list of tensors or an nn.Module, got {type(value).__name__}{remedy}")
    return list(value)


class Lanes(NamedTuple):
    """The pairs of an update, by the way they are updated. Pairs without work are in none of the lists."""

    targets: list[Tensor]
    sources: list[Tensor]
    """Pairs whose targets have plain, unshared memory: one call updates all of them, in any order."""
    others: list[tuple[Tensor, Tensor]]
    """Pairs without plain memory or with shared memory: the tensors' own operators update them in sequence."""


def check_update(
    targets: list[Tensor],
    sources: list[Tensor],
    names=None,
    *,
    averaged: bool = True,
    as_torch: bool = False,
    own_memory: bool = False,
) -> Lanes:
    """Raise if an in-place update of ``targets`` from ``sources`` is undefined; else sort the pairs.

    Pairs without work (no elements, or the source is the destination) are omitted; DTensors become their local shards.

    Args:
        names: one per target, for the messages.
        averaged: False if the sources are only copied; targets may then share memory with each other.
        as_torch: accept what consecutive calls of ``lerp_`` and ``copy_`` accept: shapes that broadcast, any dtypes,
            destinations that share memory.
        own_memory: give a target its own copy if it is a different tensor in its source's memory, as after
            ``load_state_dict`` with ``assign=True``. Otherwise it would always equal the source.

    Raises:
        ValueError: lengths, shapes, devices or (for DTensors) placements differ; a destination appears twice.
        TypeError: an item is not a tensor, a dtype cannot be averaged, or only one of a pair is a DTensor.
        RuntimeError: a destination overlaps itself, another one or a source; the memory of a tensor was freed.
    """
    if len(targets) != len(sources):
        raise ValueError(f"sources: expected {len(targets)} tensors, as many as targets, got {len(sources)}")
    rules = _Rules(averaged, as_torch, own_memory, names)
    if torch.compiler.is_compiling():
        # Shape guards make these checks run once per graph. Tensors have no addresses while tracing.
        return _lanes(targets, sources, _traced_plan(targets, sources, rules))
    if are_plain(targets) and are_plain(sources):
        return _plain_lanes(targets, sources, rules)
    local = shards.local(targets, sources, rules.labels)
    if local is not None:
        return check_update(*local, names, averaged=averaged, as_torch=as_torch)
    return _mixed_lanes(targets, sources, rules)


def copy_(lanes: Lanes) -> None:
    """Copy each source's values to its target."""
    if lanes.targets:
        torch._foreach_copy_(lanes.targets, lanes.sources)
    for target, source in lanes.others:
        target.copy_(source)


def lerp_(pairs: list[tuple[Tensor, Tensor]], weight) -> None:
    """Set ``t + weight (s - t)`` for each pair in turn, with the tensors' own ``lerp_``; integers are copied.

    Args:
        weight: a number, or a 0-dim tensor on their device.
    """
    for target, source in pairs:
        dtype = target.dtype
        if is_averaged(dtype):
            step = weight.to(dtype) if isinstance(weight, Tensor) else weight
            target.lerp_(source if source.dtype == dtype else source.to(dtype), step)
        else:
            target.copy_(source)


class _Rules(NamedTuple):
    averaged: bool
    as_torch: bool
    own_memory: bool = False
    names: object = None
    positions: object = None
    """The tensors' positions in the user's lists, if these lists are only a part of them."""

    def refuses(self, *targets) -> bool:
        """Return True if these targets may not share memory, because an average would depend on the order."""
        return self.averaged and not self.as_torch and any(is_averaged(t.dtype) for t in targets)

    def labels(self, i) -> tuple[str, str]:
        """Return the names of the target and the source at ``i`` for messages."""
        i = i if self.positions is None else self.positions[i]
        if self.names is None:
            return f"targets[{i}]", f"sources[{i}]"
        return f"{self.names[i]} (target)", f"{self.names[i]} (source)"


class _Plan(NamedTuple):
    """Positions of pairs; pairs without work are in neither list."""

    together: list[int] | range
    in_turn: list[int]


def _lanes(targets, sources, plan) -> Lanes:
    others = [(targets[i], sources[i]) for i in plan.in_turn]
    if len(plan.together) == len(targets):
        return Lanes(targets, sources, others)
    return Lanes([targets[i] for i in plan.together], [sources[i] for i in plan.together], others)


def _plain_lanes(targets, sources, rules) -> Lanes:
    if not targets:
        return Lanes(targets, sources, [])
    if backends.unavailable("cpu") is None and not is_recorded():
        empty = ops.overload("ema_check_pairs", "default")(targets, sources, rules.averaged)
        if empty >= 0:
            together = [i for i, target in enumerate(targets) if target.numel()] if empty else range(len(targets))
            return _lanes(targets, sources, _Plan(together, []))
    plan = _plan(targets, sources, rules)
    if rules.own_memory and _give_memory(targets, sources):
        return _plain_lanes(targets, sources, rules)
    return _lanes(targets, sources, plan)


def _give_memory(targets, sources) -> bool:
    """Give each target that is a different tensor in its source's memory its own copy; return True if there was one."""
    shared = [
        target
        for target, source in zip(targets, sources, strict=True)
        if target is not source
        and target.layout == source.layout == torch.strided
        and not target.is_meta
        and target.untyped_storage().nbytes()
        and target.numel()
        and overlap.identical(target, source)
    ]
    for target in shared:
        target.data = target.detach().clone()
    return bool(shared)


def _mixed_lanes(targets, sources, rules) -> Lanes:
    """Sort lists with tensor subclasses: the plain pairs are handled as if they were alone."""
    plain, others = [], []
    for i, pair in enumerate(zip(targets, sources, strict=True)):
        (plain if all(isinstance(x, Tensor) and is_plain(type(x)) for x in pair) else others).append(i)
    parts = [
        (
            [targets[i] for i in index],
            [sources[i] for i in index],
            rules._replace(positions=index if rules.positions is None else [rules.positions[i] for i in index]),
        )
        for index in (plain, others)
    ]
    _check_pairs(*parts[1], targets[0])
    if plain:
        _check_device(rules.labels(plain[0])[0], targets[plain[0]], rules, targets[0])
    first: dict[int, int] = {}
    for i in others:
        j = first.setdefault(id(targets[i]), i)
        if i != j and rules.refuses(targets[i]):
            raise ValueError(
                f"{rules.labels(i)[0]}: expected every destination once, but {rules.labels(j)[0]} is the same tensor"
            )
    own = [(targets[i], sources[i]) for i in others if targets[i] is not sources[i]]
    lanes = _plain_lanes(*parts[0])
    return lanes._replace(others=lanes.others + own)


_device, _dtype, _layout, _nbytes = map(attrgetter, ("device", "dtype", "layout", "nbytes"))
PLAIN = (Tensor, torch.nn.Parameter)
"""The usual classes of tensors that do not override PyTorch's operators."""
_PLAIN = frozenset(PLAIN)


def is_recorded() -> bool:
    """Return True if operators are recorded, by ``torch.jit.trace`` or a dispatch mode: checks do not belong there."""
    return torch.jit.is_tracing() or is_in_torch_dispatch_mode()


def are_plain(tensors: list) -> bool:
    """Return True if every item is of one of the usual classes."""
    return _PLAIN.issuperset(map(type, tensors))


def is_plain(cls: type) -> bool:
    """Return True if the class does not override PyTorch's operators, so its memory determines its values."""
    if cls in _PLAIN:
        return True
    function = cls.__torch_function__
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and getattr(function, "__func__", function) in _DEFAULTS


_DEFAULTS = (Tensor.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)


def _all_fine(targets, sources) -> bool:
    both = targets + sources
    return (
        list(map(Tensor.size, targets)) == list(map(Tensor.size, sources))
        and len(set(map(_device, both))) <= 1
        and targets[0].device.type != "meta"
        and set(map(_dtype, both)).issubset(check.FLOATING)
        and set(map(_layout, both)) <= {torch.strided}
        and not any(map(Tensor.is_neg, both))
    )


def _plan(targets, sources, rules) -> _Plan:
    together, in_turn = range(len(targets)), set()
    has_memory = together
    if not _all_fine(targets, sources):
        _check_pairs(targets, sources, rules, targets[0])
        has_memory, in_turn = _by_memory(targets, sources, rules)
    idle, shared = _check_memory(targets, sources, has_memory, rules)
    if in_turn or idle or shared:
        in_turn = sorted((in_turn | shared) - idle)
        idle.update(in_turn)
        together = [i for i in together if i not in idle]
    return _Plan(together, list(in_turn))


def _traced_plan(targets, sources, rules) -> _Plan:
    _check_pairs(targets, sources, rules, targets[0] if targets else None)
    together, in_turn = [], []
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        plain = is_plain(type(target)) and is_plain(type(source))
        (together if plain and _in_one_call(target, source, rules) else in_turn).append(i)
    return _Plan(together, in_turn)


def _by_memory(targets, sources, rules) -> tuple[list[int], set[int]]:
    """Return (positions of pairs with memory, positions of pairs that a multi-tensor call cannot take)."""
    has_memory, in_turn = [], set()
    for i, pair in enumerate(zip(targets, sources, strict=True)):
        if all(x.layout == torch.strided and not x.is_meta for x in pair):
            has_memory.append(i)
            if not any(map(_has_bit, pair)) and _in_one_call(*pair, rules):
                continue
        in_turn.add(i)
    return has_memory, in_turn


def _has_bit(tensor) -> bool:
    """Return True if the tensor has its conjugate or negative bit set: its memory holds other numbers."""
    return tensor.is_conj() or tensor.is_neg()


def _in_one_call(target, source, rules) -> bool:
    if target.is_meta or target.shape != source.shape:
        return False
    if not rules.averaged:
        return True
    return kind(target.dtype) == kind(source.dtype) and not target.dtype.is_complex


def _check_pairs(targets, sources, rules, first) -> None:
    """Check every pair; ``first`` is the tensor whose device all must share."""
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        t, s = rules.labels(i)
        for name, tensor in ((t, target), (s, source)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            if rules.averaged and tensor.layout != torch.strided and is_plain(type(tensor)):
                raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
            _check_device(name, tensor, rules, first)
        if target.shape != source.shape and not (rules.as_torch and _expands(source, target)):
            raise ValueError(f"{s}: expected the shape of {t}, {tuple(target.shape)}, got {tuple(source.shape)}")
        dtype, other = target.dtype, source.dtype
        if not rules.as_torch and kind(dtype) != kind(other):
            raise TypeError(f"{s}: expected the dtype of {t}, {dtype}, got {other}")
        if rules.averaged and dtype.is_floating_point and dtype not in check.FLOATING:
            raise TypeError(
                f"{t}: expected float64, float32, bfloat16, float16, complex numbers, integers or bool, got {dtype}"
            )


def _check_device(name, tensor, rules, first) -> None:
    if tensor.device != first.device:
        label = f"{rules.names[0]} (target)" if rules.names is not None else "targets[0]"
        raise ValueError(f"{name}: expected the device of {label}, {first.device}, got {tensor.device}")


def _expands(source, target) -> bool:
    """Return True if ``source`` broadcasts to the shape of ``target``."""
    lacking = target.dim() - source.dim()
    return lacking >= 0 and all(n in (1, m) for n, m in zip(source.shape, target.shape[lacking:], strict=True))


def _check_memory(targets, sources, index, rules) -> tuple[set[int], set[int]]:
    """Return ``(idle, shared)`` of the positions ``index``: pairs without work, and pairs with shared memory.

    Shared memory raises if an average would depend on the order of the pairs.
    """
    idle: set[int] = set()
    shared: set[int] = set()
    if len(index) < len(targets):
        targets, sources = ([tensors[i] for i in index] for tensors in (targets, sources))
    t_start, s_start = list(map(Tensor.data_ptr, targets)), list(map(Tensor.data_ptr, sources))
    t_bytes, s_bytes = list(map(_nbytes, targets)), list(map(_nbytes, sources))
    if 0 in t_bytes:
        idle.update(i for i, size in zip(index, t_bytes, strict=True) if not size)
    for k, j in _twice(t_start, t_bytes):
        labels = rules.labels(index[j])[0], rules.labels(index[k])[0]
        if rules.refuses(targets[k], targets[j]):
            if overlap.identical(targets[k], targets[j]):
                raise ValueError(f"{labels[0]}: expected every destination once, but {labels[1]} is the same tensor")
            raise RuntimeError(_OVERLAP.format(*labels))
        shared.update((index[k], index[j]))
    if any(map(eq, t_start, s_start)):
        pairs = zip(index, targets, sources, strict=True)
        idle.update(i for i, target, source in pairs if overlap.identical(target, source))
    if idle:
        kept = [k for k, i in enumerate(index) if i not in idle]
        targets, sources, t_start, s_start, t_bytes, s_bytes, index = (
            [values[k] for k in kept] for values in (targets, sources, t_start, s_start, t_bytes, s_bytes, index)
        )
    if index:
        _check_freed(targets, sources, t_start, s_start, index, rules)

    t_end, s_end = list(map(add, t_start, t_bytes)), list(map(add, s_start, s_bytes))
    if not all(map(Tensor.is_contiguous, targets)):
        for position in _not_dense(targets):
            t_end[position] = overlap.bounds(targets[position])[1]
            _check_inside(targets[position], rules.labels(index[position])[0])
    if not all(map(Tensor.is_contiguous, sources)):
        for position in _not_dense(sources):
            s_end[position] = overlap.bounds(sources[position])[1]
    # With starts and ends sorted, the ranges are disjoint if and only if each ends before the next one starts.
    if any(map(gt, sorted(t_end + s_end), sorted(t_start + s_start)[1:])):
        ranges = [(start, end, True, i) for start, end, i in zip(t_start, t_end, index, strict=True)]
        ranges += [(start, end, False, i) for start, end, i in zip(s_start, s_end, index, strict=True)]
        pairs = dict(zip(index, zip(sources, targets, strict=True), strict=True))
        for one, other in _crossings(sorted(ranges), pairs):
            i, j = one[1], other[1]
            if rules.refuses(pairs[i][1], pairs[j][1]):
                # Name the destination first: it is the one that must not share memory.
                labels = [rules.labels(i)[not target] for target, i in sorted((one, other), key=lambda x: not x[0])]
                raise RuntimeError(_OVERLAP.format(*labels))
            shared.update((i, j))
    return idle, shared


_OVERLAP = "{}: expected memory of its own, but it partly overlaps {}"


def _twice(starts, sizes) -> list[tuple[int, int]]:
    """Return (first, other) for non-empty tensors that start at the same address."""
    if len(set(starts)) == len(starts):
        return []
    first: dict[int, int] = {}
    found = [(first.setdefault(start, k), k) for k, start in enumerate(starts) if sizes[k]]
    return [(k, j) for k, j in found if k != j]


def _check_freed(targets, sources, t_start, s_start, index, rules) -> None:
    # The address of a tensor in a freed storage is its offset, lower than any allocator's addresses.
    if min(min(t_start), min(s_start)) >= 1 << 32:
        return
    for k, pair in enumerate(zip(targets, sources, strict=True)):
        for name, tensor in zip(rules.labels(index[k]), pair, strict=True):
            if tensor.untyped_storage().nbytes() == 0:
                raise RuntimeError(f"{name}: expected a tensor with memory, but its storage has been freed")


def _not_dense(tensors) -> list[int]:
    """Return the positions of tensors that may have gaps or elements that share memory."""
    return [
        i
        for i, x in enumerate(tensors)
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    ]


def _check_inside(target, name) -> None:
    if overlap.overlaps_itself(target):
        raise RuntimeError(
            f"{name}: expected elements that do not share memory (an expanded tensor?),"
            f" got shape {tuple(target.shape)} with strides {target.stride()}"
        )


def _crossings(ranges, pairs):
    """Yield ``((is_target, i), (is_target, j))`` for every destination and other tensor that share memory (exact).

    ``ranges`` are sorted ``(first, last, is_target, i)``, and ``pairs[i]`` is ``(source, target)``.
    """
    crossing: list[tuple] = []
    for one in ranges:
        crossing = [other for other in crossing if other[1] > one[0]]
        for other in crossing:
            (_, _, target, i), (_, _, other_target, j) = one, other
            if (target or other_target) and overlap.shares_memory(pairs[i][target], pairs[j][other_target]):
                yield one[2:], other[2:]
        crossing.append(one)
