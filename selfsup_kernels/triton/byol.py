"""The ops ``byol_forward.triton`` and ``byol_backward.triton``: one launch each way.

A program holds whole rows of one tile of samples in registers and goes from view to view. Up to two views the row that
a prediction is compared with is one row of the targets, and every row is read once. From three views on the sum of the
unit targets comes first, and a target is read a second time, from the cache, for the difference ``T - t_u``.
"""

import torch
import triton
import triton.language as tl

from selfsup_kernels import ops
from selfsup_kernels.reference import byol as reference
from selfsup_kernels.triton import _launch

MAX_VIEWS = 64
"""Each view is two pointers and two strides among a kernel's arguments, which have 4 KB. Beyond it: reference."""

MAX_DIM = 8192
"""A row has to fit the registers of one program. Beyond it: reference."""

MAX_PROGRAMS = tl.constexpr(1024)
"""The last program of the forward adds up one number of each program, all of them in one step: 8 a thread, so that
the step does not decide how many registers the kernel has."""

ARRIVED = tl.constexpr(0x7FA5B1C3D2E60000)
"""Zero arrivals, in the upper 48 bits a mark that no computed number has; see :func:`_add_up`."""


@triton.jit
def _place(base, rows, stride, inside, start, DIM: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to columns ``start`` to ``start + WIDTH`` of the rows, and which of them exist."""
    columns = start + tl.arange(0, WIDTH)[None, :]
    pointers = base + (rows * stride)[:, None] + columns
    if ALIGNED:  # 128-bit accesses, although the run-time stride may be anything for all that the compiler knows
        pointers = tl.multiple_of(pointers, (1, 16))
    exists = inside[:, None]
    if DIM % WIDTH != 0:
        exists = exists & (columns < DIM)
    return pointers, exists


@triton.jit
def _nth(values, index):
    """``values[index]`` of a tuple by a run-time index, so that loops over views are not unrolled: the loads of all
    views at once would need more registers than there are, and minutes to compile."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _load(bases, strides, view, rows, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """The rows of one view in float32, zero where there are none: a tuple of chunks, each (ROWS, WIDTH).

    A chunk is as wide as the warps of a row load at a time. The compiler then gives every warp rows of its own (in one
    tile of whole rows it would spread the warps over the columns), and a sum over a row needs no shared memory.
    """
    base, stride = _nth(bases, view), _nth(strides, view)
    chunks = ()
    for start in tl.static_range(0, DIM, WIDTH):
        pointers, exists = _place(base, rows, stride, inside, start, DIM, WIDTH, ALIGNED)
        chunks += (tl.load(pointers, mask=exists, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def _zeros(ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(0, DIM, WIDTH):
        chunks += (tl.zeros([ROWS, WIDTH], tl.float32),)
    return chunks


@triton.jit
def _times(rows, factor):
    scaled = ()
    for i in tl.static_range(len(rows)):
        scaled += (rows[i] * factor[:, None],)
    return scaled


@triton.jit
def _plus(first, second):
    result = ()
    for i in tl.static_range(len(first)):
        result += (first[i] + second[i],)
    return result


@triton.jit
def _dot(first, second):
    result = first[0] * second[0]
    for i in tl.static_range(1, len(first)):
        result += first[i] * second[i]
    return tl.sum(result, axis=1)


@triton.jit
def _scaled(rows, NARROW: tl.constexpr):
    """The rows times a power of two that brings their largest element near 1; that power; its reciprocal.

    So that no square leaves the range of float32, as those of 1e19 and 1e-22 do. Squares of float16 do not. The largest
    exponent is found among integers: one instruction for 32 lanes, and NaN is not lost in it.
    """
    if NARROW:
        one = tl.full([rows[0].shape[0]], 1.0, tl.float32)
        return rows, one, one
    largest = rows[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i in tl.static_range(1, len(rows)):
        largest = tl.maximum(largest, rows[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = tl.minimum(tl.max(largest, axis=1) >> 23, 253)
    power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return _times(rows, power), power, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal_norm(squares, power, reciprocal_power, eps):
    """From the sum of squares of scaled rows: 1 / max(norm, eps), negative where the floor was taken, of the rows as
    they were; and its absolute value for the scaled rows, which has the range of a float where the former may not."""
    floor = tl.minimum(eps * power, 1e18)  # whose square is a number, and above that of any scaled row
    floored = (squares < floor * floor) | (squares == 0)
    reciprocal = tl.rsqrt(tl.where(floored, 1.0, squares))
    outer = tl.where(floored, -1 / eps, reciprocal * power)
    inner = tl.where(floored, (1 / eps) * reciprocal_power, reciprocal)
    return outer, inner


@triton.jit
def _add_up(loss, workspace, total, programs, factor):
    """The sum of every program's ``total``, times ``factor``, by the program that arrives last, in a fixed order.

    ``workspace[0]`` counts the arrivals. Nobody has zeroed it, for that would be a launch of its own: it holds what
    the allocator left there until the first arrival. Whoever reads something other than a marked count swaps it for
    zero arrivals, and a swap that fails shows that another program has done so. Then everyone adds 1. The last one
    takes the mark away, so that no later launch, nor the replay of a captured graph, finds this one's count; and since
    every call has a workspace of its own, calls on several streams do not meet.
    """
    program = tl.program_id(0)
    tl.store(workspace + 1 + program, total.to(tl.float64).to(tl.int64, bitcast=True))
    # By an atomic, which reads once for the whole program: threads that load may each see another value.
    found = tl.atomic_add(workspace, 0)
    marked = (found & ~0xFFFF) == ARRIVED
    tl.atomic_cas(workspace, found, tl.where(marked, found, ARRIVED))
    if tl.atomic_add(workspace, 1) - ARRIVED == programs - 1:
        each = tl.arange(0, MAX_PROGRAMS)
        parts = tl.load(workspace + 1 + each, mask=each < programs, other=0).to(tl.float64, bitcast=True)
        tl.store(loss, (tl.sum(parts, axis=0) * factor).to(tl.float32))
        tl.store(workspace, 0)


# Of a tuple's members Triton always distinguishes those that 16 divides. Where rows are aligned that is one case for
# every batch size, elsewhere a few.
@triton.jit(do_not_specialize=["views", "batch", "programs"])
def forward_kernel(
    p,
    t,
    p_strides,
    t_strides,
    loss,
    stats,
    workspace,
    views,
    batch,
    programs,
    eps,
    per_cosine,
    factor,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NARROW: tl.constexpr,
):
    """``p``, ``t`` and their strides are tuples of one entry a view; up to two views ``t`` and its strides in reverse
    order, so that a prediction and what it is compared with stand at the same place. ``workspace`` is None for
    reduction "none"."""
    stats_rp, stats_rt, stats_cosine = stats, stats + views * batch.to(tl.int64), stats + 2 * views * batch.to(tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, batch, programs * ROWS):
        rows = tl.arange(0, ROWS).to(tl.int64) + start
        inside = rows < batch
        if not PAIRS:
            everyone = _zeros(ROWS, DIM, WIDTH)
            for v in range(views):
                b, power, reciprocal_power = _scaled(_load(t, t_strides, v, rows, inside, DIM, WIDTH, ALIGNED), NARROW)
                rt, inner_t = _reciprocal_norm(_dot(b, b), power, reciprocal_power, eps)
                everyone = _plus(everyone, _times(b, inner_t))
                tl.store(stats_rt + v * batch.to(tl.int64) + rows, rt, mask=inside)
            tl.debug_barrier()  # the threads of a row load below what one of them has stored
        for u in range(views):
            at = u * batch.to(tl.int64) + rows
            a = _load(p, p_strides, u, rows, inside, DIM, WIDTH, ALIGNED)
            b = _load(t, t_strides, u, rows, inside, DIM, WIDTH, ALIGNED)
            a, power, reciprocal_power = _scaled(a, NARROW)
            rp, inner_p = _reciprocal_norm(_dot(a, a), power, reciprocal_power, eps)
            if PAIRS:
                b, power, reciprocal_power = _scaled(b, NARROW)
                rt, inner_t = _reciprocal_norm(_dot(b, b), power, reciprocal_power, eps)
                cosine = _dot(a, b) * inner_p * inner_t
                tl.store(stats_rt + (views - 1 - u) * batch.to(tl.int64) + rows, rt, mask=inside)
            else:
                rt = tl.abs(tl.load(stats_rt + at, mask=inside, other=0.0))
                cosine = _dot(a, _plus(everyone, _times(b, -rt))) * inner_p
            tl.store(stats_rp + at, rp, mask=inside)
            tl.store(stats_cosine + at, cosine, mask=inside)
            value = 2 - cosine * per_cosine
            if workspace is None:
                tl.store(loss + at, value, mask=inside)
            else:
                total += tl.where(inside, value, 0.0)
    if workspace is not None:
        _add_up(loss, workspace, tl.sum(total, axis=0), programs, factor)


@triton.jit(
    do_not_specialize=["grad_view_stride", "grad_row_stride", "views", "batch"],
    do_not_specialize_on_alignment=["grad"],
)
def backward_kernel(
    p,
    t,
    p_strides,
    t_strides,
    grad,
    grad_view_stride,
    grad_row_stride,
    stats,
    out,
    views,
    batch,
    factor,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
):
    """The arguments are those of :func:`forward_kernel`; ``factor`` is what the loss multiplies a cosine by, and
    the strides of the upstream gradient are zero where it is one number."""
    stats_rp, stats_rt, stats_cosine = stats, stats + views * batch.to(tl.int64), stats + 2 * views * batch.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < batch
    if not PAIRS:
        everyone = _zeros(ROWS, DIM, WIDTH)
        for v in range(views):
            rt = tl.abs(tl.load(stats_rt + v * batch.to(tl.int64) + rows, mask=inside, other=0.0))
            everyone = _plus(everyone, _times(_load(t, t_strides, v, rows, inside, DIM, WIDTH, ALIGNED), rt))
    for u in range(views):
        at = u * batch.to(tl.int64) + rows
        view_t = views - 1 - u if PAIRS else u
        rp = tl.load(stats_rp + at, mask=inside, other=0.0)
        rt = tl.abs(tl.load(stats_rt + view_t * batch.to(tl.int64) + rows, mask=inside, other=0.0))
        cosine = tl.load(stats_cosine + at, mask=inside, other=0.0)
        upstream = grad + u * grad_view_stride.to(tl.int64) + rows * grad_row_stride
        upstream = tl.load(upstream, mask=inside, other=0.0).to(tl.float32) * factor
        a = _load(p, p_strides, u, rows, inside, DIM, WIDTH, ALIGNED)
        b = _load(t, t_strides, u, rows, inside, DIM, WIDTH, ALIGNED)

        opposite = _times(b, rt) if PAIRS else _plus(everyone, _times(b, -rt))
        along = tl.where(rp < 0, 0.0, cosine)  # below the floor the norm is a constant: no projection
        da = _times(_plus(opposite, _times(a, -tl.abs(rp) * along)), upstream * tl.abs(rp))
        for i in tl.static_range(len(da)):
            part = da[i]
            if out.dtype.element_ty == tl.float16:  # of a zero row, over eps: finite in float32 only; NaN stays NaN
                floored = (rp < 0)[:, None]
                part = tl.where(floored & (part > 65504.0), 65504.0, part)
                part = tl.where(floored & (part < -65504.0), -65504.0, part)
            to, exists = _place(out, at, DIM, inside, i * WIDTH, DIM, WIDTH, ALIGNED_OUT)
            tl.store(to, part.to(out.dtype.element_ty), mask=exists)


def configuration(dim: int, item_size: int, aligned: bool) -> dict[str, int]:
    """WIDTH, ROWS and num_warps for rows of ``dim`` numbers. Chosen by counting registers; not tuned yet.

    A warp has rows of its own up to 1024 numbers, which is 32 a thread; of short rows so many that a thread has 16
    numbers of each tensor, so that two to four 128-bit loads of p and as many of t are on their way in it. Longer rows
    have a power of two of warps, up to 16, that leaves 8 to 16 numbers to a thread.
    """
    length = _launch.next_power_of_2(dim)
    per_row = 1 if dim <= 1024 else min(16, length // 512)
    num_warps = max(4, per_row)
    chunk = 32 * per_row * (16 // item_size if aligned else 1)
    return {
        "WIDTH": min(length, chunk),
        "ROWS": num_warps // per_row * min(64, max(1, 512 // length)),
        "num_warps": num_warps,
    }


def forward(predictions, targets, eps, reduction):
    num_views, (batch, dim) = len(predictions), predictions[0].shape
    if num_views > MAX_VIEWS or dim > MAX_DIM:
        return reference.forward(predictions, targets, eps, reduction)
    p, t = _with_rows(predictions), _with_rows(targets if num_views > 2 else targets[::-1])
    aligned = _aligned(p + t)
    config = configuration(dim, p[0].element_size(), aligned)
    # Enough programs to fill the device once: each takes several tiles, so that few numbers are left to add up.
    resident = _launch.processors_of(p[0]) * (32 // config["num_warps"])
    programs = min(_launch.cdiv(batch, config["ROWS"]), resident, MAX_PROGRAMS.value)
    stats = p[0].new_empty((3, num_views, batch), dtype=torch.float32)
    if ops.REDUCTIONS[reduction] == "none":
        loss, workspace = stats.new_empty((num_views, batch)), None
    else:
        loss, workspace = stats.new_empty(()), stats.new_empty(1 + programs, dtype=torch.int64)
    with _launch.on_device_of(stats):
        _launch.launch(
            forward_kernel,
            (programs,),
            p,
            t,
            tuple(x.stride(0) for x in p),
            tuple(x.stride(0) for x in t),
            loss,
            stats,
            workspace,
            num_views,
            batch,
            programs,
            eps,
            2 / max(num_views - 1, 1),
            1 / (num_views * batch) if ops.REDUCTIONS[reduction] == "mean" else 1.0,
            PAIRS=num_views <= 2,
            DIM=dim,
            ALIGNED=aligned,
            NARROW=p[0].dtype == torch.float16,
            **config,
        )
    return loss, stats


def backward(grad, predictions, targets, stats, reduction):
    num_views, (batch, dim) = len(predictions), predictions[0].shape
    if num_views > MAX_VIEWS or dim > MAX_DIM:
        return reference.backward(grad, predictions, targets, stats, reduction)
    p, t = _with_rows(predictions), _with_rows(targets if num_views > 2 else targets[::-1])
    aligned = _aligned(p + t)
    config = configuration(dim, p[0].element_size(), aligned)
    out = p[0].new_empty((num_views, batch, dim))
    factor = -2 / max(num_views - 1, 1)
    with _launch.on_device_of(stats):
        _launch.launch(
            backward_kernel,
            (_launch.cdiv(batch, config["ROWS"]),),
            p,
            t,
            tuple(x.stride(0) for x in p),
            tuple(x.stride(0) for x in t),
            grad,
            *grad.expand(num_views, batch).stride(),
            stats,
            out,
            num_views,
            batch,
            factor / (num_views * batch) if ops.REDUCTIONS[reduction] == "mean" else factor,
            PAIRS=num_views <= 2,
            DIM=dim,
            ALIGNED=aligned,
            ALIGNED_OUT=dim * out.element_size() % 16 == 0,
            **config,
        )
    return out


def _with_rows(views):
    """The views as a tuple of matrices whose rows are contiguous; a copy only of those that are not so."""
    return tuple(x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in views)


def _aligned(matrices) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in matrices)
