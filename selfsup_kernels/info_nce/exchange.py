"""The loss over the batch of several processes: their communication and the autograd Function.

The forward exchanges a header (sizes and arguments, which must agree), the rows, their ids and logq if there are any,
and the sum of the losses; the backward exchanges one small table. Each process computes the tables and the gradient of
its own samples against all rows. The gradient of a pair is symmetric, so no gradients are sent.
"""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import functools

import torch

from selfsup_kernels.core import ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.agreement import Agreement, known
from selfsup_kernels.core.once import once
from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype
from selfsup_kernels.core.processes import Shares, gather_samples, sum_over
from selfsup_kernels.info_nce.autograd import SAVED, as_given
from selfsup_kernels.info_nce.call import LONGEST, SCALE, SLOW, Call, Saved
from selfsup_kernels.info_nce.objectives import TABLE, Objective


def _shown(field: str, header: dict) -> str | None:
    """Return the value of a field's argument as the user wrote it, or None for the usual form."""
    value = header[field]
    if field in Objective._fields:
        known_names = {objective: name for name, objective in TABLE.items()}
        return repr(known_names[Objective(*(header[name] for name in Objective._fields))])
    if field == "ids":
        return ("None", "labels", "duplicates")[value]
    if field == "core_view":
        return str(value if value >= 0 else None)
    return None


AGREEMENT = Agreement(
    Call,
    own={"batch", "queue_rows", "first", "count"},
    argument={"num_views": "views", "dim": "features", "ids": "labels or duplicates"}
    | dict.fromkeys(Objective._fields, "objective"),
    given=("queue", "logq"),
    shown=_shown,
)


def agree(group, impl: str, call: Call, tensors, value_and_grad: bool) -> tuple[Shares, Call, int]:
    """Check that the calls of all processes agree.

    Returns:
        The shares of the processes, the call over the whole batch, and the number of rows of the longest queue.

    Raises:
        RuntimeError: another process refused its arguments.
        ValueError: an argument differs between processes, or they have only one sample together and no queue.
    """
    call = call._replace(temperature=known(tensors[0], call.temperature))
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    gradient = 2 if value_and_grad else int(wanted)
    headers = AGREEMENT.headers(
        group, (call.queue_rows > 0, tensors[2] is not None), tensors[-1].dtype, gradient, impl, call
    )
    shares = Shares.of(group, [header["batch"] for header in headers])
    if shares.batch < 2 and not call.queue_rows:
        check.samples(shares.batch, " in the group")
    longest = max(header["queue_rows"] for header in headers)
    return shares, call._replace(batch=shares.batch, first=shares.first, count=shares.count), longest


def without_autocast(function):
    """Run ``function`` without autocast, which would change the dtypes of concatenated tensors or raise."""

    @functools.wraps(function)
    def wrapper(*args):
        device = next(x for x in reversed(args) if isinstance(x, torch.Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return function(*args)

    return wrapper


class GroupInfoNCE(torch.autograd.Function):
    """``InfoNCE`` for this process's share of the samples. The gradient is that of the sum, over the processes, of the
    values that each computes from its result. Forward and backward both communicate, in the same order everywhere."""

    @staticmethod
    def forward(
        ctx,
        shares: Shares,
        impl: str,
        stacked: bool,
        call: Call,
        temperature_tensor: torch.Tensor | None,
        ids: torch.Tensor | None,
        logq: torch.Tensor | None,
        queue: torch.Tensor | None,
        *views: torch.Tensor,
    ):
        loss, saved, ids = forward(shares, impl, stacked, call, temperature_tensor, ids, logq, queue, *views)
        ctx.save_for_backward(*saved, ids, temperature_tensor, *views)  # only `once` needs the views
        ctx.arguments = shares, impl, stacked, call, views[0].dtype
        return loss

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        shares, impl, stacked, call, dtype = ctx.arguments
        ids, temperature_tensor = saved[SAVED : SAVED + 2]
        need_temperature = ctx.needs_input_grad[4]
        grad_views, grad_temperature = backward(
            shares, impl, call, dtype, need_temperature, Saved(*saved[:SAVED]), ids, grad
        )
        grads = (grad_views,) if stacked else grad_views.unbind(0)
        return (*[None] * 4, as_given(grad_temperature, temperature_tensor, need_temperature), None, None, None, *grads)


@without_autocast
def forward(shares, impl, stacked, call, temperature_tensor, ids, logq, queue, *views):
    """Return the loss, ``Saved``, and the ids of all samples or None."""
    own = views[0] if stacked else torch.stack(views)
    if ids is not None:
        ids = gather_samples(ids.to(torch.int64).view(1, -1, 1), shares).view(-1)
    if logq is not None:
        logq = relative(gather_samples(logq.unsqueeze(-1), shares).squeeze(-1), own.dtype)
    every = list(gather_samples(own, shares).unbind(0))
    of_each = call._replace(reduction=REDUCTIONS.index("none"))
    loss, *saved = ops.run("info_nce_forward", impl, every, ids, logq, queue, temperature_tensor, *of_each)
    if REDUCTIONS[call.reduction] != "none":
        total = sum_over(loss.double().sum(), shares)
        rows = call.num_views * call.batch
        loss = (total / rows if REDUCTIONS[call.reduction] == "mean" else total).to(loss.dtype)
    return loss, Saved(*saved), ids


@without_autocast
def backward(shares, impl, call, dtype, need_temperature, saved, ids, grad):
    """Return the gradients of the own views (V, own samples, D) in ``dtype`` and of the temperature, from that of the
    loss."""
    own = own_rows(saved, call)
    upstream = grad.to(own.dtype).expand(call.num_views, shares.count).unsqueeze(-1)
    rows = gather_samples(torch.cat([own, upstream], -1), shares)
    rows, upstream = rows[..., :-1], rows[..., -1]
    if REDUCTIONS[call.reduction] != "none":
        # All processes have the same loss over all anchors, but each may weight it differently.
        each = torch.stack([part[0, 0] for part in upstream.split(shares.sizes, 1)])
        share = 1 / (call.num_views * call.batch) if REDUCTIONS[call.reduction] == "mean" else 1
        upstream = (each.sum() * share).expand(call.num_views, call.batch)
    upstream = upstream.to(accumulation_dtype(dtype)).contiguous()
    of_each = call._replace(reduction=REDUCTIONS.index("none"))
    saved = with_all_rows(saved, call, rows)
    return ops.run("info_nce_backward", impl, upstream, *saved, ids, *of_each, need_temperature, dtype)


def relative(logq: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return ``logq`` less its least number in float32 or float64, as the ops take it for views in ``dtype``.

    No loss depends on what is common to all columns, and an exponential of what is left does not overflow. All numbers
    are NaN if one is, or if one is -inf.
    """
    if logq is None:
        return None
    least = logq.min()
    return (logq - least + (least - least)).to(accumulation_dtype(dtype)).contiguous()


_TABLES = ("log_weights", "weights", "positives")


def own_rows(saved: Saved, call: Call) -> torch.Tensor:
    """Return the part of this process's tables that the other processes need, ``(V, own samples, C)``."""
    tables = torch.cat([getattr(saved, name) for name in _TABLES])
    mine = slice(call.first, call.first + call.own)
    if len(saved.order):
        place = torch.argsort(saved.order)[mine]
        tables = (
            tables[:, : call.num_views * call.batch].view(len(tables), -1, call.num_views)[:, place].permute(2, 1, 0)
        )
    else:
        tables = tables.view(len(tables), call.num_views, -1)[..., mine].permute(1, 2, 0)
    if not len(saved.weights):
        return tables
    # Values common to all rows of a process are repeated in each row, which saves a separate exchange.
    return torch.cat([tables, _whole(saved, call).to(tables.dtype).expand(*tables.shape[:2], 3)], -1)


def with_all_rows(saved: Saved, call: Call, rows: torch.Tensor) -> Saved:
    """Return ``saved`` with the tables of all samples, from the gathered ``rows`` (V, B, C)."""
    scalars = saved.scalars
    if len(saved.weights):
        whole, scalars = _whole(saved, call), scalars.clone()
        others, rows = rows[..., -3:].reshape(-1, 3).to(whole.dtype), rows[..., :-3]
        # Weights are relative to a score reference. If processes had different ones (rows that are not normalised and
        # different queues), only the absolute log weights can be used.
        apart = (others[:, 1] != whole[1]).any()
        scalars[SLOW] = torch.maximum(others[:, 0].amax(), apart.to(scalars.dtype))
        # A temperature on the device was not compared at the start of the call; if it differs, the gradient is NaN.
        scalars[SCALE] = torch.where((others[:, 2] == whole[2]).all(), scalars[SCALE], torch.nan)
    if len(saved.order):
        table = rows[:, saved.order].permute(2, 1, 0).reshape(rows.shape[-1], 1, -1)
    else:
        table = rows.permute(2, 0, 1)
    columns = saved.log_weights.shape[1]  # on GPUs padded per view
    padding = columns // table.shape[1] - table.shape[2]
    table = torch.nn.functional.pad(table, (0, padding)).reshape(-1, columns)
    tables = table.split([len(getattr(saved, name)) for name in _TABLES])
    tables = {name: part.contiguous() for name, part in zip(_TABLES, tables, strict=True)}
    return saved._replace(scalars=scalars, **tables)


def _whole(saved, call):
    """Return (1 if a weight is out of the fast path's range, the largest squared norm if the score reference depends on
    it, the scale)."""
    longest = torch.zeros_like(saved.scalars[LONGEST]) if call.normalize else saved.scalars[LONGEST]
    return torch.stack([saved.scalars[SLOW], longest, saved.scalars[SCALE]])
