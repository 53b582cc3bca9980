"""What the processes of a group tell each other for a loss over the batch of all of them.

A call exchanges a header (sizes and arguments, which must agree), the rows, labels where there are any, the sum of the
losses, and in the backward one small table. Each process computes the tables and the gradient of its own samples
against the rows of all; the gradient of pairs is symmetric, so no gradients are sent.
"""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import copy
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist

from selfsup_kernels import _validate as check
from selfsup_kernels import ops
from selfsup_kernels.objectives import OBJECTIVES


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


class Header(NamedTuple):
    """What a process says of its call. All fields but ``samples`` and ``queue_rows`` have to be the same on all of
    them: what the result is made of, and whether a backward, with its exchange, will follow."""

    refused: int  # 1: this process raised an error of its own instead
    samples: int
    views: int
    features: int
    dtype: int
    objective: int
    core_view: int
    normalize: int
    eps: float
    reduction: int
    labels: int
    queue: int
    temperature: float  # NaN: not known on the host
    gradient: int
    impl: int
    queue_rows: int

    def shown(self, field: str) -> str:
        value = getattr(self, field)
        names = {
            "dtype": [str(d).removeprefix("torch.") for d in check.FLOATING],
            "objective": OBJECTIVES,
            "reduction": ops.REDUCTIONS,
            "impl": ops.IMPLS,
        }
        if field in names:
            return repr(names[field][value])
        if field in ("labels", "queue"):
            return "given" if value else "None"
        if field == "gradient":
            return "wanted" if value else "not wanted"
        if field == "normalize":
            return str(bool(value))
        if field == "core_view":
            return str(value if value >= 0 else None)
        return repr(value)


_FLOATS = ("eps", "temperature")
_OWN = ("samples", "queue_rows")
_REFUSED = Header(1, *[0] * (len(Header._fields) - 1))


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


def announced(group, check, *args):
    """``check(*args)``. If it raises, the other processes of the group, which wait for a header, are told first."""
    try:
        return check(*args)
    except Exception:
        _exchange(group, _REFUSED)
        raise


def agree(group: dist.ProcessGroup, header: Header) -> tuple[Shares, int]:
    """The shares of all processes, whose headers agree, and the rows of the longest queue.

    Raises:
        RuntimeError: another process refused its arguments.
        ValueError: an argument differs between processes, or they have one sample together and no queue.
    """
    headers = _exchange(group, header)
    refused = [rank for rank, other in enumerate(headers) if other.refused]
    if refused:
        raise RuntimeError(f"group: the arguments were refused on rank {', '.join(map(str, refused))} of the group")
    for field in Header._fields:
        for rank, other in enumerate(headers):
            ours, theirs = getattr(headers[0], field), getattr(other, field)
            if field not in _OWN and ours != theirs and not (ours != ours and theirs != theirs):
                raise ValueError(
                    f"group: {field} has to be the same on every rank, got {headers[0].shown(field)} on rank 0"
                    f" and {other.shown(field)} on rank {rank}"
                )
    shares = Shares(group, dist.get_rank(group), tuple(other.samples for other in headers))
    if shares.batch < 2 and not header.queue:
        check.samples(shares.batch, " in the group")
    return shares, max(other.queue_rows for other in headers)


def _exchange(group, header) -> list[Header]:
    words = [
        _bits(value) if field in _FLOATS else int(value) for field, value in zip(header._fields, header, strict=True)
    ]
    own = torch.tensor(words, dtype=torch.int64, device=_host_device(group))
    every = own.new_empty(dist.get_world_size(group) * len(words))
    _all_gather(every, own, group=group)
    return [
        Header(*(_number(w) if field in _FLOATS else w for field, w in zip(Header._fields, row, strict=True)))
        for row in every.view(-1, len(words)).tolist()
    ]


# The newer name of the same; the older one warns where both exist.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def _all_gather(out, own, group) -> None:
    """``out`` <- the flat tensors ``own`` of all processes, one after the other."""
    getattr(dist, _ALL_GATHER)(out, own, group=group)


def _host_device(group) -> torch.device:
    """Where small messages go: the CPU where the group has a backend for it, which spares the GPU a synchronisation."""
    kinds = {device.type for device in group._device_types}
    if "cpu" in kinds:
        return torch.device("cpu")
    if group.bound_device_id is not None:
        return group.bound_device_id
    kind = kinds.pop()
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def gather_samples(x: torch.Tensor, shares: Shares) -> torch.Tensor:
    """``(V, own samples, C)`` of each process as the ``(V, all samples, C)`` of the group; no gradient."""
    longest = max(shares.sizes)
    if x.shape[1] < longest:  # the padding of nothing would copy
        x = torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]))
    own = x.contiguous()
    every = own.new_empty((len(shares.sizes), *own.shape))
    # As bytes: not every backend knows every dtype.
    _all_gather(_bytes(every), _bytes(own), group=shares.group)
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
    own = torch.tensor(rows.shape, dtype=torch.int64, device=_host_device(group))
    every = own.new_empty(dist.get_world_size(group) * 2)
    _all_gather(every, own, group=group)
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
