"""Process groups: resolve the ``group=`` argument and gather tensors from its processes."""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import copy
from typing import NamedTuple

import torch
import torch.distributed as dist

from selfsup_kernels.core import validate as check


class Shares(NamedTuple):
    """Distribution of a batch over processes: rank r has ``sizes[r]`` samples, in rank order."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, group, sizes) -> Shares:
        """Return the shares of these sizes, one per process."""
        return cls(group, dist.get_rank(group), tuple(sizes))

    @property
    def batch(self) -> int:
        return sum(self.sizes)

    @property
    def first(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def count(self) -> int:
        return self.sizes[self.rank]


class SharesGroup:
    """Mixin for modules with a ``group``, which is a handle, not data: copies of the module share it."""

    def __deepcopy__(self, memo):
        memo[id(self.group)] = self.group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


WORLD, LOCAL = "world", "local"
"""The strings that ``group=`` accepts: all processes, and only this one."""


def check_kind(group) -> None:
    """Raise unless :func:`resolve` accepts ``group``, now or later."""
    if group is None or group in (WORLD, LOCAL):
        return
    if not dist.is_available():
        raise RuntimeError(f"group: this build of PyTorch has no torch.distributed; expected None or {LOCAL!r}")
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        what = repr(group) if isinstance(group, str) else type(group).__name__
        raise TypeError(f"group: expected {WORLD!r}, {LOCAL!r}, None or a torch.distributed.ProcessGroup, got {what}")


def resolve(group):
    """Return the process group that the argument ``group`` selects in this call, or None for this process only.

    ``"world"`` is looked up on every call, so it may be passed before ``init_process_group``. None warns once if
    several processes run: it may be a group that was read before it existed.
    """
    if group is None:
        if _several():
            check.warn_once(
                "group",
                f"{dist.get_world_size()} processes run, and this loss has no group: each uses only its own samples as"
                f" negatives. Pass group={WORLD!r} to use those of all processes, or group={LOCAL!r} to keep this.",
            )
        return None
    check_kind(group)
    if group == LOCAL or (group == WORLD and not _several()):
        return None
    return dist.group.WORLD if group == WORLD else group


_AVAILABLE = dist.is_available()


def _several() -> bool:
    """Return True if there is a default group with more than one process."""
    return _AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1


def shown(group) -> str:
    """Return how the ``repr`` of a module shows a group."""
    if group is None or isinstance(group, str):
        return repr(group)
    return f"{type(group).__name__} of {group.size()}" if hasattr(group, "size") else "NON_GROUP_MEMBER"


def check_group(group) -> None:
    """Raise unless this process is in ``group``."""
    check_kind(group)
    if not dist.is_initialized() or dist.get_rank(group) < 0:
        raise ValueError("group: expected a group that this process is a member of")


# all_gather_single is the newer name; the older one warns if both exist.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather(out, own, group) -> None:
    """Fill ``out`` with the concatenated flat tensors ``own`` of all processes."""
    getattr(dist, _ALL_GATHER)(out, own, group=group)


def host_device(group) -> torch.device:
    """Return the device for small messages: the CPU if the group has a backend for it, to avoid a GPU sync."""
    kinds = {device.type for device in group._device_types}
    if "cpu" in kinds:
        return torch.device("cpu")
    if group.bound_device_id is not None:
        return group.bound_device_id
    kind = kinds.pop()
    return torch.device(kind, torch.get_device_module(kind).current_device())


def gather_samples(x: torch.Tensor, shares: Shares) -> torch.Tensor:
    """Gather each process' ``(V, own samples, C)`` into the group's ``(V, all samples, C)``, without gradient."""
    longest = max(shares.sizes)
    if x.shape[1] < longest:  # padding by 0 would copy
        x = torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]))
    own = x.contiguous()
    every = own.new_empty((len(shares.sizes), *own.shape))
    # As bytes, since not every backend supports every dtype.
    all_gather(_bytes(every), _bytes(own), group=shares.group)
    if min(shares.sizes) == longest:
        return every.transpose(0, 1).reshape(x.shape[0], shares.batch, x.shape[2])
    return torch.cat([part[:, :size] for part, size in zip(every, shares.sizes, strict=True)], dim=1)


def _bytes(x):
    return x.view(-1).view(torch.uint8)


def sum_over(x: torch.Tensor, shares: Shares) -> torch.Tensor:
    """Sum ``x`` over the processes, in place."""
    dist.all_reduce(x, group=shares.group)
    return x


def scatter_sum(x: torch.Tensor, shares: Shares) -> torch.Tensor:
    """Sum the processes' ``(all samples, C)`` and return this process's ``(own samples, C)`` of it."""
    longest = max(shares.sizes)
    if min(shares.sizes) < longest:
        parts = [torch.nn.functional.pad(part, (0, 0, 0, longest - len(part))) for part in x.split(shares.sizes)]
        x = torch.cat(parts)
    own = x.new_empty((longest, x.shape[1]))
    getattr(dist, _REDUCE_SCATTER)(own, x.contiguous(), group=shares.group)
    return own[: shares.count]


@torch.no_grad()
def gather_rows(rows: torch.Tensor, group) -> torch.Tensor:
    """Return the ``(N, D)`` rows of all processes in rank order; N may differ between processes.

    Raises:
        ValueError: D differs between processes; raised on all of them.
    """
    if group is None:
        return rows
    own = torch.tensor(rows.shape, dtype=torch.int64, device=host_device(group))
    every = own.new_empty(dist.get_world_size(group) * 2)
    all_gather(every, own, group=group)
    sizes, widths = every.view(-1, 2).T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"group: expected rows of one width on all processes, got {widths}")
    shares = Shares.of(group, sizes)
    return gather_samples(rows[None], shares)[0]


def global_mean(values: torch.Tensor, group) -> torch.Tensor:
    """Return the mean of the values of all processes, on each process.

    As with the losses' ``group=``, the gradient is that of the sum of the results over the processes, so that
    DistributedDataParallel's average is the gradient of the mean.
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
