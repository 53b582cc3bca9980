"""The loss over the batch of many processes: what they tell each other, and the autograd Function.

A call exchanges a header (sizes and arguments, which must agree), the rows, labels where there are any, the sum of the
losses, and in the backward one small table. Each process computes the tables and the gradient of its own samples
against the rows of all; the gradient of pairs is symmetric, so no gradients are sent.
"""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import functools
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist

from selfsup_kernels.core import backends, ops, processes
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.once import once
from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype
from selfsup_kernels.core.processes import Shares, gather_samples, host_device, sum_over
from selfsup_kernels.info_nce.objectives import OBJECTIVES
from selfsup_kernels.tiles.layout import PADDING, STATE_NORM, STATE_SCALE, STATE_SLOW


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
    own = torch.tensor(words, dtype=torch.int64, device=host_device(group))
    every = own.new_empty(dist.get_world_size(group) * len(words))
    processes.all_gather(every, own, group=group)
    return [
        Header(*(_number(w) if field in _FLOATS else w for field, w in zip(Header._fields, row, strict=True)))
        for row in every.view(-1, len(words)).tolist()
    ]


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def without_autocast(function):
    """Autocast would change the dtypes of what is put together here, or refuse to put it together."""

    @functools.wraps(function)
    def wrapper(*args):
        device = next(x for x in reversed(args) if isinstance(x, torch.Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return function(*args)

    return wrapper


class GroupInfoNCE(torch.autograd.Function):
    """As ``InfoNCE``, for this process's share of the samples. The gradient is that of the sum over the processes of
    what each makes of its result: both directions communicate, in the same order everywhere."""

    @staticmethod
    @without_autocast
    def forward(
        ctx,
        shares: Shares,
        impl: str,
        temperature: float,
        objective: int,
        core_view: int,
        normalize: bool,
        eps: float,
        reduction: int,
        stacked: bool,
        temperature_tensor: torch.Tensor | None,
        labels: torch.Tensor | None,
        queue: torch.Tensor | None,
        *views: torch.Tensor,
    ):
        own = views[0] if stacked else torch.stack(views)
        if labels is not None:
            labels = gather_samples(labels.to(torch.int64).view(1, -1, 1), shares).view(-1)
        loss, *saved = backends.op("info_nce_forward", impl)(
            list(gather_samples(own, shares).unbind(0)),
            labels,
            queue,
            temperature_tensor,
            temperature,
            objective,
            core_view,
            normalize,
            eps,
            0,
            shares.first,
            shares.count,
        )
        ctx.save_for_backward(*saved, labels, temperature_tensor, *views)  # views: for `once` alone
        ctx.num_saved = len(saved)
        ctx.shares = shares
        ctx.impl = impl
        ctx.stacked = stacked
        ctx.sizes = (len(own), shares.batch, own.shape[2])
        ctx.dtype = own.dtype
        ctx.arguments = (temperature, objective, core_view, normalize, reduction)
        if REDUCTIONS[reduction] == "none":
            return loss
        total = sum_over(loss.double().sum(), shares)
        return (total / (len(own) * shares.batch) if REDUCTIONS[reduction] == "mean" else total).to(loss.dtype)

    @staticmethod
    @once
    @without_autocast
    def backward(ctx, saved, grad):
        *saved, labels, temperature_tensor = saved[: ctx.num_saved + 2]
        temperature, objective, core_view, normalize, reduction = ctx.arguments
        shares, labelled = ctx.shares, labels is not None
        num_views, batch, _ = ctx.sizes
        own = own_rows(ctx.impl, saved, labelled, normalize, num_views, batch, shares.first, shares.count)
        upstream = grad.to(own.dtype).expand(num_views, shares.count).unsqueeze(-1)
        rows = gather_samples(torch.cat([own, upstream], -1), shares)
        rows, upstream = rows[..., :-1], rows[..., -1]
        if REDUCTIONS[reduction] != "none":
            # Every process has the same loss of all anchors, and may weigh it as it likes.
            each = torch.stack([part[0, 0] for part in upstream.split(shares.sizes, 1)])
            share = 1 / (num_views * batch) if REDUCTIONS[reduction] == "mean" else 1
            upstream = (each.sum() * share).expand(num_views, batch)
        upstream = upstream.to(accumulation_dtype(ctx.dtype)).contiguous()
        need_temperature = ctx.needs_input_grad[9]
        grad_views, grad_temperature = backends.op("info_nce_backward", ctx.impl)(
            upstream,
            *with_all_rows(ctx.impl, saved, labelled, normalize, rows),
            labels,
            temperature_tensor,
            temperature,
            *ctx.sizes,
            objective,
            core_view,
            normalize,
            0,
            need_temperature,
            ctx.dtype,
            shares.first,
            shares.count,
        )
        grads = (grad_views,) if ctx.stacked else grad_views.unbind(0)
        grad_temperature = grad_temperature.to(temperature_tensor) if need_temperature else None
        if need_temperature and temperature_tensor.dim():  # of one element, whatever its shape
            grad_temperature = grad_temperature.view(temperature_tensor.shape)
        return (*[None] * 9, grad_temperature, None, None, *grads)


def own_rows(impl, saved, labelled, normalize, num_views, batch, first, count):
    """``(V, count, C)``: all that the other processes need of the tables of samples first .. first + count."""
    logw, coef, state, order = saved[2:6]
    if impl == "triton":
        columns = [_gpu_by_sample(t, order, labelled, num_views, batch) for t in (*logw, coef)]
        # What concerns all rows of a process goes along with each: no exchange of its own.
        whole = torch.stack([state[STATE_SLOW], _bound(state, normalize), state[STATE_SCALE]])
        whole = whole.expand(num_views, batch, 3)
        return torch.cat([*columns, whole], -1)[:, first : first + count]
    if impl == "cpu" and labelled:
        place = torch.argsort(order[:count])  # this process's samples come first, sorted by class
        return torch.cat([t.view(batch, num_views, -1)[place].transpose(0, 1) for t in (logw, coef)], -1)
    return torch.cat([t.view(num_views, batch, -1)[:, first : first + count] for t in (logw, coef)], -1)


def with_all_rows(impl, saved, labelled, normalize, rows):
    """``saved`` with the tables of all samples, ``rows`` (V, B, C) as the processes gathered them."""
    z, rnorm, logw, coef, state, order = saved
    if impl == "triton":
        width = logw.shape[1]
        parts = rows[..., : 2 * width + len(coef)].split([width, width, len(coef)], -1)
        fast, slow, coef = (_gpu_by_row(t, order, labelled) for t in parts)
        others = rows[..., -3:].reshape(-1, 3)
        # Weights are relative to a score reference; where a process had another one (un-normalised rows and queues
        # that differ), only the absolute ones will do.
        apart = (others[:, 1] != _bound(state, normalize)).any()
        state = state.clone()
        state[STATE_SLOW] = torch.maximum(others[:, 0].amax(), apart.to(state.dtype))
        # A temperature on the device was not compared when the call began; a mixed gradient must not look right.
        same = (others[:, 2] == state[STATE_SCALE]).all()
        state[STATE_SCALE] = torch.where(same, state[STATE_SCALE], torch.nan)
        return z, rnorm, torch.stack([fast, slow]), coef, state, order
    width = logw.shape[1]
    if impl == "cpu" and labelled:
        rows = rows[:, order].transpose(0, 1)
    logw, coef = (t.reshape(-1, t.shape[-1]).contiguous() for t in rows.split([width, coef.shape[1]], -1))
    return z, rnorm, logw, coef, state, order


def _bound(state, normalize):
    """What the score reference depends on besides the temperature: the longest row."""
    return state.new_zeros(()) if normalize else state[STATE_NORM]


def _gpu_by_sample(table, order, labelled, num_views, batch):
    """(C, stored rows) -> (V, B, C)."""
    if labelled:
        place = torch.argsort(order[:batch])
        return table[:, : num_views * batch].view(-1, batch, num_views)[:, place].permute(2, 1, 0)
    return table.view(len(table), num_views, -1)[..., :batch].permute(1, 2, 0)


def _gpu_by_row(rows, order, labelled):
    """(V, B, C) -> (C, stored rows), each view's padded with zeros."""
    _, batch, columns = rows.shape
    by_view = not labelled
    table = rows.permute(2, 0, 1) if by_view else rows[:, order[:batch]].permute(2, 1, 0).reshape(columns, 1, -1)
    return torch.nn.functional.pad(table, (0, -table.shape[2] % PADDING)).reshape(columns, -1).contiguous()
