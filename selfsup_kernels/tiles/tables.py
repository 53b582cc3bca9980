"""From the sums over negatives to the losses and the weights of the backward, for the objectives by views.

Weights are stored relative to the score reference r of the kernels, as ``w = exp(logw + r)``: a pair's gradient is then
``exp(S - r) (w_i + w_j)``, one exponential for both directions. Where a weight is out of range for that (temperatures
below 0.013) a flag sends the backward to a path that adds the logarithms.
"""

import functools

import torch
import triton
import triton.language as tl

from selfsup_kernels.tiles import launcher
from selfsup_kernels.tiles.objectives import OTHER, anchor_tables
from selfsup_kernels.tiles.tile import SLOW, finite_or_zero, negatives_meet, score_reference

FAST_WEIGHT = tl.constexpr(60.0)
"""All scores of a row with a weight above exp(60) lie below reference - 60: exp(S - reference) would flush those to
zero that are 1e-12 of its sum."""

LOST_SHARE = tl.constexpr(1.2e-31)
"""float32 flushes terms below 1.2e-38 to zero, so a sum of n terms has a relative error below 1e-7 above n times this.
"""


@triton.jit
def block_scores(
    stored,
    row,
    other,
    limit,
    scale,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the scores of BLOCK stored rows with BLOCK others; rows from ``limit`` on are not read."""
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    k = tl.arange(0, BLOCK_K)
    at_x = stored + row.to(tl.int64)[:, None] * STRIDE
    at_y = stored + other.to(tl.int64)[:, None] * STRIDE
    for start in range(0, DIM, BLOCK_K):
        inside = (start + k < DIM)[None, :]
        x = tl.load(at_x + (start + k)[None, :], mask=inside, other=0.0)
        y = tl.load(at_y + (start + k)[None, :], mask=(other < limit)[:, None] & inside, other=0.0)
        s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    return s * scale


@triton.jit
def running_log_sum(
    stored,
    row,
    own,
    classes,
    first_row,
    count,
    scale,
    exclude,
    LABELS: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the log-sum-exp, with a running maximum, of the scores of BLOCK rows with ``count`` rows from
    ``first_row`` on. ``exclude``: without those of the row's own sample ``own`` (with labels: of its class)."""
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        other = start + tl.arange(0, BLOCK)
        s = block_scores(
            stored, row, first_row + other, first_row + count, scale, DIM, STRIDE, BLOCK, BLOCK_K, PRECISION
        )
        theirs = tl.load(classes + other, mask=other < count, other=-1) if LABELS else other
        keep = (other < count)[None, :] & ((not exclude) | (own[:, None] != theirs[None, :]))
        high = tl.maximum(top, tl.max(tl.where(keep, s, float("-inf")), 1))
        safe = finite_or_zero(high)
        part = tl.sum(tl.where(keep, tl.exp(s - safe[:, None]), 0.0), 1)
        total = total * tl.exp(tl.where(top == high, 0.0, top - safe)) + part
        top = high
    return tl.log(total.to(tl.float64)) + finite_or_zero(top).to(tl.float64)


@triton.jit
def negatives(
    sums,
    stored,
    row,
    own,
    valid,
    classes,
    c,
    first_row,
    count,
    scale,
    reference,
    rows,
    exclude,
    LABELS: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the log-sum-exp N of BLOCK rows in column c, in float64. Sums that are too small to be accurate are
    computed again with a running maximum: relative to the reference that all rows share, the scores of a row may
    all underflow."""
    total = tl.load(sums + c * rows + row, mask=valid, other=1.0)
    n = tl.log(total.to(tl.float64)) + reference.to(tl.float64)
    doubtful = valid & (total < tl.maximum(count * LOST_SHARE, 1e-30))
    if tl.sum(doubtful.to(tl.int32), 0) > 0:
        again = running_log_sum(
            stored,
            row,
            own,
            classes,
            first_row,
            count,
            scale,
            exclude,
            LABELS,
            DIM,
            STRIDE,
            BLOCK,
            BLOCK_K,
            PRECISION,
        )
        n = tl.where(doubtful, again, n)
    return n


@triton.jit
def store_weights(weights, log_weights, scalars, logw, reference, at, mask):
    """Store exp(logw + reference), and logw for the path that adds logarithms."""
    relative = logw + reference.to(tl.float64)
    tl.store(weights + at, tl.exp(tl.where(relative > 80.0, 80.0, relative)).to(tl.float32), mask=mask)
    tl.store(log_weights + at, logw.to(tl.float32), mask=mask)
    if tl.sum((mask & (relative > FAST_WEIGHT)).to(tl.int32)) > 0:
        tl.atomic_max(scalars + SLOW, 1.0, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "BATCH", "PADDED", "QUEUE_ROWS", "CORE", "first", "count"])
def view_tables_kernel(
    stored,
    sums,
    scalars,
    loss,
    weights,
    log_weights,
    positives,
    rows,
    BATCH,
    PADDED,
    QUEUE_ROWS,
    CORE,
    first,
    count,
    VIEWS: tl.constexpr,
    QUEUE: tl.constexpr,
    WIDTH: tl.constexpr,
    NEGATIVES: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (samples of first .. first + count, view u): the losses of these anchors, ``weights``, ``log_weights``
    (VIEWS [+ 1], rows) and ``positives`` (VIEWS, rows). Positives are inner products of the rows in float32."""
    u = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < count
    sample = first + tl.minimum(place, count - 1)  # rows past the last are read, too
    row = u * PADDED + sample
    column = tl.arange(0, WIDTH)
    k = tl.arange(0, BLOCK_K)
    scale, reference = score_reference(scalars, NORMALIZE)
    n = tl.full((BLOCK, WIDTH), float("-inf"), tl.float64)
    p = tl.zeros((BLOCK, WIDTH), tl.float64)
    for v in range(VIEWS + QUEUE):
        is_queue = v == VIEWS
        if negatives_meet(u, v, is_queue, CORE, NEGATIVES == OTHER):
            value = negatives(
                sums,
                stored,
                row,
                sample,
                valid,
                None,
                v,
                v * PADDED,
                tl.where(is_queue, QUEUE_ROWS, BATCH),
                scale,
                reference,
                rows,
                v != VIEWS,
                False,
                DIM,
                STRIDE,
                BLOCK,
                BLOCK_K,
                PRECISION,
            )
            n = tl.where((column == v)[None, :], value[:, None], n)
        if (v != u) & (v < VIEWS):
            dot = tl.zeros((BLOCK,), tl.float32)
            for at in range(0, DIM, BLOCK_K):
                mask = valid[:, None] & (at + k < DIM)[None, :]
                x = tl.load(stored + row.to(tl.int64)[:, None] * STRIDE + (at + k)[None, :], mask=mask, other=0.0)
                other = (v * PADDED + sample).to(tl.int64)
                y = tl.load(stored + other[:, None] * STRIDE + (at + k)[None, :], mask=mask, other=0.0)
                dot += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
            p = tl.where((column == v)[None, :], (dot.to(tl.float64) * scale.to(tl.float64))[:, None], p)
    value, logw, c = anchor_tables(n, p, u, column, CORE, VIEWS, QUEUE, NEGATIVES, POSITIVES, NUMERATOR)
    tl.store(loss + u.to(tl.int64) * count + place, value.to(tl.float32), mask=valid)
    # (BLOCK, WIDTH) tables, a few columns: element (i, v) goes to [v][i].
    at = column[None, :] * rows + row[:, None]
    there = valid[:, None] & (column < VIEWS + QUEUE)[None, :]
    store_weights(weights, log_weights, scalars, logw, reference, at, there)
    tl.store(positives + at, c.to(tl.float32), mask=there & (column < VIEWS)[None, :])


def view_tables(layout, stored, sums, scalars, precision):
    """Return the losses of this process's anchors (V, own samples), log_weights, weights and positives."""
    call = layout.call
    new = functools.partial(launcher.empty, dtype=torch.float32, device=stored.device)
    loss = new((layout.call.num_views, layout.call.own))
    log_weights, weights = (new((call.columns_of_tables, layout.rows)) for _ in range(2))
    positives = new((call.positives_of_tables, layout.rows))
    launcher.launch(
        view_tables_kernel,
        (launcher.cdiv(layout.call.own, TABLE_BLOCK), layout.views),
        stored,
        sums,
        scalars,
        loss,
        weights,
        log_weights,
        positives,
        layout.rows,
        layout.batch,
        layout.padded,
        layout.call.queue_rows,
        call.core_view,
        layout.call.first,
        layout.call.own,
        VIEWS=layout.views,
        QUEUE=int(layout.call.queue_rows > 0),
        WIDTH=launcher.next_power_of_2(max(2, layout.call.columns_of_tables)),
        NEGATIVES=call.columns,
        POSITIVES=call.inside,
        NUMERATOR=call.numerator,
        NORMALIZE=call.normalize,
        DIM=layout.call.dim,
        STRIDE=layout.stride,
        BLOCK=TABLE_BLOCK,
        BLOCK_K=table_width(layout, stored.dtype),
        PRECISION=precision,
        num_warps=8,
        maxnreg=255,  # the compiler would spill registers to fit one more program on an SM
    )
    return loss, log_weights, weights, positives


TABLE_BLOCK = 32
"""Anchors per program: few, so that a batch of a few hundred samples uses many SMs."""


def table_width(layout, dtype):
    """How many numbers of a row are loaded at a time: fewer in float32, whose exact products need more registers."""
    return min(32 if dtype == torch.float32 else 64, max(16, launcher.next_power_of_2(layout.stride)))
