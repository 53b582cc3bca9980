"""The first and the last pass over the rows: normalise them; turn the gradient of unit rows into that of the input."""

import torch
import triton
import triton.language as tl

from selfsup_kernels.tiles import launcher
from selfsup_kernels.tiles.tile import LONGEST, SCALE, SLOW


@triton.jit
def _source_rows(sources, strides, order, row, BATCH_PADDED, BATCH, VIEWS: tl.constexpr, LABELS: tl.constexpr):
    """Return pointers to the user's rows that the stored rows ``row`` hold, and a mask of those that hold one."""
    if LABELS:  # row = place in the order of the classes * views + view
        view = row % VIEWS
        valid = row < BATCH * VIEWS
        sample = tl.load(order + row // VIEWS, mask=valid, other=0)
    else:
        view = row // BATCH_PADDED
        sample = row % BATCH_PADDED
        valid = (sample < BATCH) & (view < VIEWS)
    sample = sample.to(tl.int64)
    pointers = sources[0] + sample * strides[0]
    for v in tl.static_range(1, VIEWS):
        pointers = tl.where(view == v, sources[v] + sample * strides[v], pointers)
    return pointers, valid


# temperature_tensor and grad_scale may point into a larger tensor. Their alignment must not compile another variant.
@triton.jit(
    do_not_specialize=["BATCH_PADDED", "BATCH", "rows", "first_row"],
    do_not_specialize_on_alignment=["temperature_tensor"],
)
def load_rows_kernel(
    sources,
    strides,
    order,
    stored,
    inverse_norms,
    sums,
    scalars,
    temperature_tensor,
    temperature: tl.float64,
    eps: tl.float64,
    BATCH_PADDED,
    BATCH,
    rows,
    first_row,
    VIEWS: tl.constexpr,
    LABELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """stored <- unit rows, zeros in the padding; inverse_norms <- 1 / norm, negative at the floor; sums <- 0.

    ``sources``: V matrices (B, D) of row strides ``strides``. The first program writes the scale. COLUMNS: C, or 0 for
    the rows of the queue."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    pointers, valid = _source_rows(sources, strides, order, row, BATCH_PADDED, BATCH, VIEWS, LABELS)
    mask = valid[:, None] & (d < DIM)[None, :]
    h = tl.load(pointers[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float64)
    square = tl.sum(h * h, 1)
    if NORMALIZE:
        norm = tl.sqrt(square)
        reciprocal = tl.where(norm < eps, -1.0 / eps, 1.0 / norm)
        h = h * tl.abs(reciprocal)[:, None]
    else:
        reciprocal = square * 0.0 + 1.0
        longest = tl.where(square < float("inf"), tl.where(square < 3.4e38, square, 3.4e38), 0.0).to(tl.float32)
        tl.atomic_max(scalars + LONGEST, tl.max(longest), sem="relaxed")
    h = tl.where(valid[:, None], h, 0.0)  # padding is zeros whatever 1 / eps is
    at = stored + (first_row + row).to(tl.int64)[:, None] * STRIDE + d[None, :]
    tl.store(at, h.to(stored.dtype.element_ty), mask=(row < rows)[:, None] & (d < STRIDE)[None, :])
    # The queue's part of inverse_norms has no padding: the backward derives K from its length.
    tl.store(
        inverse_norms + first_row + row, reciprocal.to(tl.float32), mask=(row < rows) if COLUMNS > 0 else (row < BATCH)
    )
    if COLUMNS > 0:
        for c in tl.static_range(COLUMNS):
            tl.store(sums + c * rows + row, tl.zeros((BLOCK,), tl.float32), mask=row < rows)
        if tl.program_id(0) == 0:
            if temperature_tensor is None:
                t = temperature
            else:
                t = tl.load(temperature_tensor).to(tl.float64)
            good = (t > 0) & (t < float("inf"))
            tl.store(scalars + SCALE, tl.where(good, 1.0 / t, float("nan")).to(tl.float32))
            tl.store(scalars + SLOW, 0.0)


@triton.jit(
    do_not_specialize=["BATCH_PADDED", "BATCH", "rows", "SPLITS", "first", "count", "part_first", "part_rows"],
    do_not_specialize_on_alignment=["grad_scale"],
)
def finish_rows_kernel(
    partial,
    stored,
    inverse_norms,
    positives,
    upstream,
    grad_scale,
    scalars,
    order,
    out,
    scale_gradient,
    constant: tl.float64,
    BATCH_PADDED,
    BATCH,
    rows,
    SPLITS,
    first,
    count,
    part_first,
    part_rows,
    VIEWS: tl.constexpr,
    LABELS: tl.constexpr,
    QUEUES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FACTOR: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """out (V, count, D) <- the gradient of samples first .. first + count, in the order of the user's rows.

    Adds the partial sums over pairs of different samples in a fixed order; recomputes the part of the positives from
    the rows, in float32. ``partial`` is (SPLITS + QUEUES, rows from part_first on of each view, STRIDE), multiplied by
    FACTOR. ``scale_gradient`` (M,) float64 <- each row's part of the temperature's gradient.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    if LABELS:
        view = row % VIEWS
        valid = row < BATCH * VIEWS
        sample = tl.load(order + row // VIEWS, mask=valid, other=0).to(tl.int32)
        place = row
        size = part_rows.to(tl.int64) * STRIDE
    else:
        view = row // BATCH_PADDED
        sample = row % BATCH_PADDED
        valid = (sample < BATCH) & (view < VIEWS)
        place = view * part_rows + sample - part_first
        size = VIEWS * part_rows.to(tl.int64) * STRIDE
    valid = valid & (sample >= first) & (sample < first + count)
    mask = valid[:, None] & (d < DIM)[None, :]
    at = row.to(tl.int64)[:, None] * STRIDE + d[None, :]
    sums = partial + place.to(tl.int64)[:, None] * STRIDE + d[None, :]
    z = tl.load(stored + at, mask=mask, other=0.0).to(tl.float32)

    in_batch = tl.load(sums, mask=mask, other=0.0)
    for k in range(1, SPLITS):
        in_batch += tl.load(sums + k * size, mask=mask, other=0.0)
    in_batch *= 1.0 / FACTOR
    if not LABELS:
        own = 1.0
        if upstream is not None:
            own = tl.load(upstream + row, mask=valid, other=0.0)
        for v in range(VIEWS):
            other = v * BATCH_PADDED + sample
            there = valid & (view != v)
            c = own * tl.load(positives + v * rows + row, mask=there, other=0.0)
            back = tl.load(positives + view * rows + other, mask=there, other=0.0)
            if upstream is not None:
                back *= tl.load(upstream + other, mask=there, other=0.0)
            zv = tl.load(
                stored + other.to(tl.int64)[:, None] * STRIDE + d[None, :], mask=mask & there[:, None], other=0.0
            )
            in_batch += (c + back)[:, None] * zv.to(tl.float32)
    total = in_batch
    for k in range(SPLITS, SPLITS + QUEUES):
        total += tl.load(sums + k * size, mask=mask, other=0.0) * (1.0 / FACTOR)

    scale = tl.load(scalars + SCALE)
    weight = (constant * tl.load(grad_scale).to(tl.float64)).to(tl.float32)
    if NEED_SCALE:
        # A score of the batch has both its rows here, and each of them all of its gradient; one with the queue has one.
        inside = tl.sum(z.to(tl.float64) * in_batch.to(tl.float64), 1)
        outside = tl.sum(z.to(tl.float64) * (total - in_batch).to(tl.float64), 1) if QUEUES > 0 else inside * 0.0
        wide = scale.to(tl.float64)
        part = -(wide * wide) * (0.5 * inside + outside) * weight.to(tl.float64)
        tl.store(scale_gradient + row, tl.where(valid, part, 0.0), mask=row < rows)

    dz = total * (scale * weight)
    if NORMALIZE:
        r = tl.load(inverse_norms + row, mask=valid, other=1.0)
        along = tl.where(r > 0, tl.sum(z * dz, 1), 0.0)  # below the floor the norm is a constant: no projection
        dz = (dz - z * along[:, None]) * tl.abs(r)[:, None]
        if LIMIT > 0:  # dz / eps of a zero row is finite in float32 only
            clamped = tl.where(dz > LIMIT, LIMIT, tl.where(dz < -LIMIT, -LIMIT, dz))
            dz = tl.where((r < 0)[:, None], clamped, dz)
    to = (view.to(tl.int64) * count + sample - first) * DIM
    tl.store(out + to[:, None] + d[None, :], dz.to(out.dtype.element_ty), mask=mask)


def _blocks(dim):
    """Return (rows of a program, padded width, warps): about 4096 numbers in registers, whole rows."""
    width = max(16, launcher.next_power_of_2(dim))
    rows = max(1, min(64, 4096 // width))
    return rows, width, 4 if width <= 4096 else 16


def load_rows(layout, views, queue, order, temperature_tensor):
    """Return (stored rows, inverse_norms, sums, scalars) of a call."""
    call, temperature = layout.call, layout.call.temperature
    device = views[0].device
    views = [v if v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous() for v in views]
    stored = launcher.empty((layout.stored_rows, layout.stride), views[0].dtype, device)
    inverse_norms = launcher.empty(layout.rows + layout.call.queue_rows, torch.float32, device)
    sums = launcher.empty((layout.call.columns_of_tables, layout.rows), torch.float32, device)
    scalars = launcher.empty(4, torch.float32, device)
    if not call.normalize:
        scalars.zero_()  # a maximum is taken in it
    if temperature_tensor is not None and temperature_tensor.device != device:
        temperature, temperature_tensor = float(temperature_tensor), None  # on the CPU: no synchronisation
    block, width, warps = _blocks(layout.stride)

    def fill(sources, rows, first, columns, count, batch, padded, labels):
        launcher.launch(
            load_rows_kernel,
            (launcher.cdiv(rows, block),),
            tuple(sources),
            tuple(s.stride(0) for s in sources),
            order if labels else None,
            stored,
            inverse_norms,
            sums,
            scalars,
            temperature_tensor,
            float(temperature),
            call.eps,
            padded,
            batch,
            rows,
            first,
            VIEWS=count,
            LABELS=labels,
            COLUMNS=columns,
            NORMALIZE=call.normalize,
            DIM=layout.call.dim,
            STRIDE=layout.stride,
            BLOCK=block,
            BLOCK_D=width,
            num_warps=warps,
        )

    if queue is not None and layout.call.queue_rows:
        queue = queue if queue.stride(1) == 1 or queue.shape[1] == 1 else queue.contiguous()
        fill([queue], layout.queue_padded, layout.rows, 0, 1, layout.call.queue_rows, layout.queue_padded, False)
    fill(
        views,
        layout.rows,
        0,
        layout.call.columns_of_tables,
        len(views),
        layout.call.batch,
        layout.padded,
        layout.call.labelled,
    )
    return stored, inverse_norms, sums, scalars


def finish_rows(layout, partial, splits, saved, upstream, grad_scale, constant, need_temperature, factor, dtype):
    """Return the gradient of the views (V, own samples, D), and (M,) float64 parts of the temperature's or None."""
    call, stored = layout.call, saved.rows
    device = stored.device
    out = launcher.empty((layout.call.num_views, layout.call.own, layout.call.dim), dtype, device)
    parts = launcher.empty(layout.rows, torch.float64, device) if need_temperature else None
    block, width, warps = _blocks(layout.stride)
    launcher.launch(
        finish_rows_kernel,
        (launcher.cdiv(layout.rows, block),),
        partial,
        stored,
        saved.inverse_norms,
        saved.positives,
        upstream,
        grad_scale,
        saved.scalars,
        saved.order if call.labelled else None,
        out,
        parts,
        constant,
        layout.padded,
        layout.call.batch,
        layout.rows,
        splits,
        layout.call.first,
        layout.call.own,
        *layout.part,
        VIEWS=layout.call.num_views,
        LABELS=layout.call.labelled,
        QUEUES=partial.shape[0] - splits,
        NORMALIZE=call.normalize,
        NEED_SCALE=need_temperature,
        DIM=layout.call.dim,
        STRIDE=layout.stride,
        BLOCK=block,
        BLOCK_D=width,
        FACTOR=factor,
        LIMIT=65504.0 if dtype == torch.float16 else 0.0,
        num_warps=warps,
    )
    return out, parts
