"""Groups of processes: which one a call means, and what its processes gather."""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import copy
from typing import NamedTuple

import torch
import torch.distributed as dist

from selfsup_kernels.core import validate as check


class Shares(NamedTuple):
    """How the samples of a batch are spread: rank r has ``sizes[r]`` of them, in the order of the ranks."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

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
    """For modules with a ``group``, which is a handle of this process and no data: their copies share it."""

    def __deepcopy__(self, memo):
        memo[id(self.group)] = self.group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


WORLD, LOCAL = "world", "local"
"""What ``group=`` may be by name: all processes, and this one alone."""


def check_kind(group) -> None:
    """Raise unless ``group`` is something that :func:`resolve` takes, now or later."""
    if group is None or group in (WORLD, LOCAL):
        return
    if not dist.is_available():
        raise RuntimeError(f"group: this build of PyTorch has no torch.distributed; expected None or {LOCAL!r}")
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        what = repr(group) if isinstance(group, str) else type(group).__name__
        raise TypeError(f"group: expected {WORLD!r}, {LOCAL!r}, None or a torch.distributed.ProcessGroup, got {what}")


def resolve(group):
    """What the argument ``group`` stands for in this call: a process group, or None for this process alone.

    ``"world"`` is the default group of this moment, so that it may be given before ``init_process_group``. None warns
    once where several processes run: it may be a group that was taken too early.
    """
    if group is None:
        if _several():
            check.warn_once(
                "group",
                f"{dist.get_world_size()} processes run, and this loss has no group: each takes its negatives from its"
                f" own samples. Pass group={WORLD!r} to take those of all, or group={LOCAL!r} to keep it so.",
            )
        return None
    check_kind(group)
    if group == LOCAL or (group == WORLD and not _several()):
        return None
    return dist.group.WORLD if group == WORLD else group


_AVAILABLE = dist.is_available()


def _several() -> bool:
    """Whether there is a default group, of more processes than this one."""
    return _AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1


def shown(group) -> str:
    """A group in the ``repr`` of a module."""
    if group is None or isinstance(group, str):
        return repr(group)
    return f"{type(group).__name__} of {group.size()}" if hasattr(group, "size") else "NON_GROUP_MEMBER"


def check_group(group) -> None:
    """Raise unless this process is in ``group``."""
    check_kind(group)
    if not dist.is_initialized() or dist.get_rank(group) < 0:
        raise ValueError("group: expected a group that this process is a member of")


# The newer name of the same; the older one warns where both exist.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def all_gather(out, own, group) -> None:
    """``out`` <- the flat tensors ``own`` of all processes, one after the other."""
    getattr(dist, _ALL_GATHER)(out, own, group=group)


def host_device(group) -> torch.device:
    """Where small messages go: the CPU where the group has a backend for it, which spares the GPU a synchronisation."""
    kinds = {device.type for device in group._device_types}
    if "cpu" in kinds:
        return torch.device("cpu")
    if group.bound_device_id is not None:
        return group.bound_device_id
    kind = kinds.pop()
    return torch.device(kind, torch.get_device_module(kind).current_device())


def gather_samples(x: torch.Tensor, shares: Shares) -> torch.Tensor:
    """``(V, own samples, C)`` of each process as the ``(V, all samples, C)`` of the group; no gradient."""
    longest = max(shares.sizes)
    if x.shape[1] < longest:  # the padding of nothing would copy
        x = torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]))
    own = x.contiguous()
    every = own.new_empty((len(shares.sizes), *own.shape))
    # As bytes: not every backend knows every dtype.
    all_gather(_bytes(every), _bytes(own), group=shares.group)
    if min(shares.sizes) == longest:
        return every.transpose(0, 1).reshape(x.shape[0], shares.batch, x.shape[2])
    return torch.cat([part[:, :size] for part, size in zip(every, shares.sizes, strict=True)], dim=1)


def _bytes(x):
    return x.view(-1).view(torch.uint8)


def sum_over(x: torch.Tensor, shares: Shares) -> torch.Tensor:
    """The sum of ``x`` over the processes, in place."""
    dist.all_reduce(x, group=shares.group)
    return x


@torch.no_grad()
def gather_rows(rows: torch.Tensor, group) -> torch.Tensor:
    """The ``(N, D)`` rows of all processes in the order of their ranks; each may bring another number of them.

    Raises:
        ValueError: D differs between processes; on all of them.
    """
    if group is None:
        return rows
    own = torch.tensor(rows.shape, dtype=torch.int64, device=host_device(group))
    every = own.new_empty(dist.get_world_size(group) * 2)
    all_gather(every, own, group=group)
    sizes, widths = every.view(-1, 2).T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"group: expected rows of one width on all processes, got {widths}")
    shares = Shares(group, dist.get_rank(group), tuple(sizes))
    return gather_samples(rows[None], shares)[0]


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
