"""The first and the last pass over the rows: normalise them; turn the gradient of unit rows into that of the input."""

import triton
import triton.language as tl

from selfsup_kernels.tiles.arguments import Finish, Source
from selfsup_kernels.tiles.kernels.tile import FINISHED, LONGEST, SCALE, SLOW


@triton.jit
def _source_rows(sources, strides, order, row, padded, samples, NUM_VIEWS: tl.constexpr):
    """Return pointers to the user's rows that the stored rows ``row`` hold, their views and samples, and a mask of
    those that hold one."""
    if order is not None:  # row = place in the order of the classes * views + view
        view = row % NUM_VIEWS
        valid = row < samples * NUM_VIEWS
        sample = tl.load(order + row // NUM_VIEWS, mask=valid, other=0)
    else:
        view = row // padded
        sample = row % padded
        valid = (sample < samples) & (view < NUM_VIEWS)
    sample = sample.to(tl.int64)
    pointers = sources[0] + sample * strides[0]
    for v in tl.static_range(1, NUM_VIEWS):
        pointers = tl.where(view == v, sources[v] + sample * strides[v], pointers)
    return pointers, view, sample, valid


@triton.jit(do_not_specialize_on_alignment=["out"])
def clear_kernel(out):
    """out[0] <- 0."""
    tl.store(out, 0.0)


# temperature_tensor and grad_scale may point into a larger tensor. Their alignment must not compile another variant.
@triton.jit(do_not_specialize=Source._fields, do_not_specialize_on_alignment=["logq", "temperature_tensor"])
def load_rows_kernel(
    sources, strides, order, logq, saved, sums, temperature_tensor, temperature: tl.float64, eps: tl.float64,
    padded, samples, rows, first_row, columns, is_tensor, dim, stride,
    NUM_VIEWS: tl.constexpr, NORMALIZE: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """saved.rows <- unit rows, zeros in the padding; saved.inverse_norms <- 1 / norm, negative at the floor; sums <- 0;
    saved.logq <- ``logq`` (V, B), which may be None.

    ``sources``: V matrices (B, D) of row strides ``strides``; ``order``: ``Saved.order``, or None. The first program
    writes the scale: of ``temperature``, or of ``temperature_tensor`` if ``is_tensor``. ``sums`` and ``saved.scalars``
    are None for a loss that has neither."""
    BLOCK: tl.constexpr = tile.BLOCK
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, tile.BLOCK_K)
    pointers, view, sample, valid = _source_rows(sources, strides, order, row, padded, samples, NUM_VIEWS)
    mask = valid[:, None] & (d < dim)[None, :]
    h = tl.load(pointers[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float64)
    square = tl.sum(h * h, 1)
    if NORMALIZE:
        norm = tl.sqrt(square)
        reciprocal = tl.where(norm < eps, -1.0 / eps, 1.0 / norm)
        h = h * tl.abs(reciprocal)[:, None]
    else:
        reciprocal = square * 0.0 + 1.0
        if saved.scalars is not None:
            longest = tl.where(square < float("inf"), tl.where(square < 3.4e38, square, 3.4e38), 0.0).to(tl.float32)
            tl.atomic_max(saved.scalars + LONGEST, tl.max(longest), sem="relaxed")
    h = tl.where(valid[:, None], h, 0.0)  # padding is zeros whatever 1 / eps is
    at = saved.rows + (first_row + row).to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, h.to(saved.rows.dtype.element_ty), mask=(row < rows)[:, None] & (d < stride)[None, :])
    # The queue's part of inverse_norms has no padding: the backward derives K from its length.
    kept = row < tl.where(columns > 0, rows, samples)
    tl.store(saved.inverse_norms + first_row + row, reciprocal.to(tl.float32), mask=kept)
    if logq is not None:
        of_row = tl.load(logq + view * samples + sample, mask=valid, other=0.0)
        tl.store(saved.logq + row, of_row, mask=row < rows)
    if sums is not None:
        if columns > 0:
            for c in range(columns):
                tl.store(sums + c * rows + row, tl.zeros((BLOCK,), tl.float32), mask=row < rows)
            if tl.program_id(0) == 0:
                t = tl.load(temperature_tensor, mask=is_tensor != 0, other=0.0).to(tl.float64)
                t = tl.where(is_tensor != 0, t, temperature)
                good = (t > 0) & (t < float("inf"))
                tl.store(saved.scalars + SCALE, tl.where(good, 1.0 / t, float("nan")).to(tl.float32))
                tl.store(saved.scalars + SLOW, 0.0)
                tl.store(saved.scalars + FINISHED, 0.0)


@triton.jit(
    do_not_specialize=["view_stride", "sample_stride", "samples", "padded", "rows", "views"],
    do_not_specialize_on_alignment=["grad"],
)
def upstream_kernel(
    grad, order, upstream, grad_scale, view_stride, sample_stride, samples, padded, rows, views, BLOCK: tl.constexpr
):
    """grad_scale () <- the largest of the gradients ``grad`` (V, samples), 1 if all are 0; upstream (M,) <- the
    gradients divided by it, in the order of the stored rows, 0 in the padding. One program reads ``grad`` twice."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        g = _gradients(grad, order, start, view_stride, sample_stride, samples, padded, rows, views, BLOCK)
        largest = tl.maximum(largest, tl.abs(g))
    scale = tl.max(largest, 0)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(grad_scale, scale)
    for start in range(0, rows, BLOCK):
        g = _gradients(grad, order, start, view_stride, sample_stride, samples, padded, rows, views, BLOCK)
        row = start + tl.arange(0, BLOCK)
        tl.store(upstream + row, g / scale, mask=row < rows)


@triton.jit
def _gradients(grad, order, start, view_stride, sample_stride, samples, padded, rows, views, BLOCK: tl.constexpr):
    """Return the gradients of BLOCK stored rows from ``start`` on, 0 for rows of the padding."""
    row = start + tl.arange(0, BLOCK)
    if order is not None:
        view = row % views
        valid = row < samples * views
        sample = tl.load(order + row // views, mask=valid, other=0)
    else:
        view = row // padded
        sample = (row % padded).to(tl.int64)
        valid = (sample < samples) & (row < rows)
    at = view.to(tl.int64) * view_stride + sample * sample_stride
    return tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(values, out, count, BLOCK: tl.constexpr):
    """out (R,) <- the sums of ``values`` (R, count) float64, each added in a fixed order by one program."""
    i = tl.arange(0, BLOCK)
    values += tl.program_id(0) * count
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(values + start + i, mask=start + i < count, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def through_the_norm(dz, z, r):
    """Return the gradient of the input rows from ``dz``, that of the unit rows z. r: ``Saved.inverse_norms``."""
    along = tl.where(r > 0, tl.sum(z * dz, 1), 0.0)  # below the floor the norm is a constant: no projection
    return (dz - z * along[:, None]) * tl.abs(r)[:, None]


@triton.jit(do_not_specialize=Finish._fields, do_not_specialize_on_alignment=["grad_scale"])
def finish_rows_kernel(
    partial, saved, upstream, grad_scale, out, grad_temperature, scale_gradient, constant: tl.float64,
    padded, samples, rows, splits, first, own, part_first, part_rows, views, queues, dim, stride,
    LABELLED: tl.constexpr, NORMALIZE: tl.constexpr, FACTOR: tl.constexpr, LIMIT: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """out (V, own, D) <- the gradient of samples first .. first + own, in the order of the user's rows.

    Adds the partial sums over pairs of different samples in a fixed order; recomputes the part of the positives from
    the rows, in float32. ``partial`` is (splits + queues, rows from part_first on of each view, S), multiplied by
    FACTOR. ``scale_gradient`` (M,) float64 <- each row's part of the temperature's gradient; if it is None,
    ``grad_temperature`` () <- 0.
    """
    BLOCK: tl.constexpr = tile.BLOCK
    BLOCK_K: tl.constexpr = tile.BLOCK_K
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_K)
    if LABELLED:
        view = row % views
        valid = row < samples * views
        sample = tl.load(saved.order + row // views, mask=valid, other=0).to(tl.int32)
        place = row
        size = part_rows.to(tl.int64) * stride
    else:
        view = row // padded
        sample = row % padded
        valid = (sample < samples) & (view < views)
        place = view * part_rows + sample - part_first
        size = views * part_rows.to(tl.int64) * stride
    valid = valid & (sample >= first) & (sample < first + own)
    mask = valid[:, None] & (d < dim)[None, :]
    at = row.to(tl.int64)[:, None] * stride + d[None, :]
    sums = partial + place.to(tl.int64)[:, None] * stride + d[None, :]
    z = tl.load(saved.rows + at, mask=mask, other=0.0).to(tl.float32)

    total = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    of_queue = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for k in range(splits + queues):
        part = tl.load(sums + k * size, mask=mask, other=0.0) * (1.0 / FACTOR)
        if scale_gradient is not None:
            of_queue += tl.where(k < splits, 0.0, part)
            part = tl.where(k < splits, part, 0.0)
        total += part
    if not LABELLED:
        here = 1.0
        if upstream is not None:
            here = tl.load(upstream + row, mask=valid, other=0.0)
        for v in range(views):
            other = v * padded + sample
            there = valid & (view != v)
            c = here * tl.load(saved.positives + v * rows + row, mask=there, other=0.0)
            back = tl.load(saved.positives + view * rows + other, mask=there, other=0.0)
            if upstream is not None:
                back *= tl.load(upstream + other, mask=there, other=0.0)
            at_v = other.to(tl.int64)[:, None] * stride + d[None, :]
            zv = tl.load(saved.rows + at_v, mask=mask & there[:, None], other=0.0)
            total += (c + back)[:, None] * zv.to(tl.float32)

    scale = tl.load(saved.scalars + SCALE)
    weight = (constant * tl.load(grad_scale).to(tl.float64)).to(tl.float32)
    if scale_gradient is not None:
        # A score of the batch has both its rows here, and each of them all of its gradient; one with the queue has one.
        inside = tl.sum(z.to(tl.float64) * total.to(tl.float64), 1)
        outside = tl.sum(z.to(tl.float64) * of_queue.to(tl.float64), 1)
        total += of_queue
        wide = scale.to(tl.float64)
        part = -(wide * wide) * (0.5 * inside + outside) * weight.to(tl.float64)
        tl.store(scale_gradient + row, tl.where(valid, part, 0.0), mask=row < rows)
    elif tl.program_id(0) == 0:
        tl.store(grad_temperature, 0.0)

    dz = total * (scale * weight)
    if NORMALIZE:
        r = tl.load(saved.inverse_norms + row, mask=valid, other=1.0)
        dz = through_the_norm(dz, z, r)
        if LIMIT > 0:  # dz / eps of a zero row is finite in float32 only
            clamped = tl.where(dz > LIMIT, LIMIT, tl.where(dz < -LIMIT, -LIMIT, dz))
            dz = tl.where((r < 0)[:, None], clamped, dz)
    to = (view.to(tl.int64) * own + sample - first) * dim
    tl.store(out + to[:, None] + d[None, :], dz.to(out.dtype.element_ty), mask=mask)
