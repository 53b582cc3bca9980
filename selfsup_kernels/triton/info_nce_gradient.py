"""The backward's quadratic part: for every row i, the sum over its pairs of G_ij z_j.

G_ij = exp(S_ij - r) (w_i + w_j): the pair's share in the losses of both its anchors. A program owns a block of rows,
visits all columns, and makes the scores, G and the product with the columns' rows on the way: no atomics, and the same
bits every time. Rows too long for the accumulator go in waves: a block of G into a workspace that fits in the L2
cache, then a plain matrix product from there.
"""

import torch
import triton
import triton.language as tl

from selfsup_kernels.triton import _launch, configs
from selfsup_kernels.triton._tiles import (
    LOG2E,
    STATE_SLOW,
    load_tile,
    relative_exponential,
    score_reference,
    tile_scores,
)
from selfsup_kernels.triton.info_nce_classes import class_gradient


@triton.jit
def masked_blocks(classes, ends, x_local, BATCH, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, LABELS: tl.constexpr):
    """Blocks [low, high) of a view hold columns that rows [x_local, x_local + BLOCK_X) must not take for negatives."""
    if LABELS:
        low = tl.load(classes + x_local)
        high = tl.load(ends + tl.minimum(x_local + BLOCK_X, BATCH) - 1)
    else:
        low = x_local
        high = x_local + BLOCK_X
    return low // BLOCK_Y, tl.cdiv(high, BLOCK_Y)


@triton.jit
def pair_gradient(
    s,
    x_local,
    y_local,
    x_row,
    y_row,
    u,
    v,
    weights,
    slow,
    upstream,
    classes,
    coef,
    scale,
    reference,
    rows,
    BATCH,
    limit,
    VIEWS,
    MASKED: tl.constexpr,
    LABELS: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """G (BLOCK_X, BLOCK_Y) of rows of view u (x) and of view v (y; v == VIEWS: the queue), from inner products ``s``.

    With MASKED, pairs of one sample (of one class) are told apart, and weights of any size are right, at the price of
    two exponentials. Without, columns past the end need no mask: the rows there are zeros, and no weight is infinite.
    """
    xs = x_local + tl.arange(0, BLOCK_X)
    ys = y_local + tl.arange(0, BLOCK_Y)
    x_at, y_at = x_row + tl.arange(0, BLOCK_X), y_row + tl.arange(0, BLOCK_Y)
    x_in, y_in = xs < BATCH, (ys < limit) & (v != VIEWS)
    if MASKED:
        score = s * scale
        x_slow = tl.load(slow + v * rows + x_at, mask=x_in, other=float("-inf"))
        y_slow = tl.load(slow + u * rows + y_at, mask=y_in, other=float("-inf"))
        gx = tl.exp2((score + x_slow[:, None]) * LOG2E)
        gy = tl.exp2((score + y_slow[None, :]) * LOG2E)
        if upstream is None:
            g = (gx + gy) * FACTOR
        else:
            x_scale = FACTOR * tl.load(upstream + x_at, mask=x_in, other=0.0)
            y_scale = FACTOR * tl.load(upstream + y_at, mask=y_in, other=0.0)
            g = gx * x_scale[:, None] + gy * y_scale[None, :]
        if LABELS:
            if v != VIEWS:
                g = class_gradient(g, score, xs, ys, upstream, classes, coef, rows, BATCH, OBJECTIVE, FACTOR)
        else:
            g = tl.where((xs[:, None] == ys[None, :]) & (v != VIEWS), 0.0, g)
        # A row of zeros past the end has score 0, which may be infinitely far above those of a row's own.
        g = tl.where((ys < limit)[None, :], g, 0.0)
    else:
        wx = FACTOR * tl.load(weights + v * rows + x_at, mask=x_in, other=0.0)
        wy = FACTOR * tl.load(weights + u * rows + y_at, mask=y_in, other=0.0)
        if upstream is not None:
            wx *= tl.load(upstream + x_at, mask=x_in, other=0.0)
            wy *= tl.load(upstream + y_at, mask=y_in, other=0.0)
        g = relative_exponential(s, scale, reference, NORMALIZE) * (wx[:, None] + wy[None, :])
    return g


@triton.jit(do_not_specialize=["rows", "BATCH", "PADDED", "QUEUE", "VIEWS", "CORE", "SHARES", "SLOT", "QUEUE_SLOT"])
def gradient_kernel(
    source_x,
    source_y,
    weights,
    slow,
    upstream,
    state,
    classes,
    ends,
    coef,
    partial,
    rows,
    BATCH,
    PADDED,
    QUEUE,
    VIEWS,
    CORE,
    SHARES,
    SLOT,
    QUEUE_SLOT,
    PART: tl.constexpr,
    LABELS: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    CROSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[SLOT + k, i, :] <- sum over share k of the columns of G_ij z_j; share SHARES is the queue's.

    Program (block of rows, share). Each share has as many blocks of every view. PART: the blocks of which no pair is
    left out ("clean"; none of them where weights are out of its range), the others ("masked"), or "all".
    """
    blocks_m = tl.cdiv(BATCH, BLOCK_M)
    u = tl.program_id(0) // blocks_m
    x_local = tl.program_id(0) % blocks_m * BLOCK_M
    x_row = u * PADDED + x_local
    share = tl.program_id(1)
    scale, reference = score_reference(state, NORMALIZE)
    is_slow = tl.load(state + STATE_SLOW) > 0
    low, high = masked_blocks(classes, ends, x_local, BATCH, BLOCK_M, BLOCK_N, LABELS)
    x = load_tile(source_x, x_row, 0, STRIDE, BLOCK_M, BLOCK_K, DESCRIPTOR)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    from_queue = share == SHARES
    limit = tl.where(from_queue, QUEUE, BATCH)
    blocks = tl.cdiv(limit, BLOCK_N)
    per = tl.where(from_queue, blocks, tl.cdiv(blocks, SHARES))
    first = tl.where(from_queue, 0, share * per)
    last = tl.minimum(first + per, blocks)
    # Masked blocks of this share: [low, high), or all of them.
    if PART == "all":
        low, high = first, last
    else:
        low = tl.where(is_slow, first, tl.where(from_queue, last, tl.minimum(tl.maximum(low, first), last)))
        high = tl.where(is_slow, last, tl.where(from_queue, last, tl.minimum(tl.maximum(high, low), last)))
    if PART == "clean":
        start, steps = first, last - first - (high - low)
    else:
        start, steps = low, high - low
    for v in range(tl.where(from_queue, VIEWS, 0), tl.where(from_queue, VIEWS + 1, VIEWS)):
        meets = (CORE < 0) | (u == v) | (u == CORE) | (v == CORE) | from_queue
        if CROSS:
            meets = meets & (u != v)
        if meets:
            for t in range(0, steps):
                block = start + t
                if PART == "clean":
                    block = tl.where(block < low, block, block + high - low)
                y_local = block * BLOCK_N
                y_row = v * PADDED + y_local
                y = load_tile(source_y, y_row, 0, STRIDE, BLOCK_N, BLOCK_K, DESCRIPTOR)
                s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
                g = pair_gradient(
                    s,
                    x_local,
                    y_local,
                    x_row,
                    y_row,
                    u,
                    v,
                    weights,
                    slow,
                    upstream,
                    classes,
                    coef,
                    scale,
                    reference,
                    rows,
                    BATCH,
                    limit,
                    VIEWS,
                    PART != "clean",
                    LABELS,
                    OBJECTIVE,
                    NORMALIZE,
                    BLOCK_M,
                    BLOCK_N,
                    FACTOR,
                )
                total = tl.dot(g.to(y.dtype), y, total, input_precision=PRECISION)
    at = x_row + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    to = (
        partial
        + (tl.where(from_queue, QUEUE_SLOT, SLOT + share).to(tl.int64) * rows + at)[:, None] * STRIDE
        + k[None, :]
    )
    inside = (x_local + tl.arange(0, BLOCK_M) < BATCH)[:, None] & (k < STRIDE)[None, :]
    tl.store(to, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "BATCH", "PADDED", "QUEUE", "VIEWS", "CORE", "x_first", "y_first", "u", "v"])
def wave_kernel(
    source_x,
    source_y,
    weights,
    slow,
    upstream,
    state,
    classes,
    ends,
    coef,
    workspace,
    rows,
    BATCH,
    PADDED,
    QUEUE,
    VIEWS,
    u,
    v,
    x_first,
    y_first,
    LABELS: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """workspace[i, j] <- G of a wave: rows of view u from x_first on with rows of view v from y_first on."""
    x_local = x_first + tl.program_id(1) * BLOCK_M
    y_local = y_first + tl.program_id(0) * BLOCK_N
    x_row, y_row = u * PADDED + x_local, v * PADDED + y_local
    scale, reference = score_reference(state, NORMALIZE)
    s = tile_scores(
        source_x,
        source_y,
        None,
        None,
        x_row,
        y_row,
        STRIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        False,
        DESCRIPTOR,
        PRECISION,
    )
    limit = tl.where(v == VIEWS, QUEUE, BATCH)
    low, high = masked_blocks(classes, ends, x_local, BATCH, BLOCK_M, BLOCK_N, LABELS)
    block = y_local // BLOCK_N
    mixed = (v != VIEWS) & (block >= low) & (block < high)
    if mixed | (tl.load(state + STATE_SLOW) > 0):
        g = pair_gradient(
            s,
            x_local,
            y_local,
            x_row,
            y_row,
            u,
            v,
            weights,
            slow,
            upstream,
            classes,
            coef,
            scale,
            reference,
            rows,
            BATCH,
            limit,
            VIEWS,
            True,
            LABELS,
            OBJECTIVE,
            NORMALIZE,
            BLOCK_M,
            BLOCK_N,
            FACTOR,
        )
    else:
        g = pair_gradient(
            s,
            x_local,
            y_local,
            x_row,
            y_row,
            u,
            v,
            weights,
            slow,
            upstream,
            classes,
            coef,
            scale,
            reference,
            rows,
            BATCH,
            limit,
            VIEWS,
            False,
            LABELS,
            OBJECTIVE,
            NORMALIZE,
            BLOCK_M,
            BLOCK_N,
            FACTOR,
        )
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(workspace + i[:, None] * WIDTH + j[None, :], g.to(workspace.dtype.element_ty))


@triton.jit(do_not_specialize=["x_row", "y_row", "x_count", "columns"])
def product_kernel(
    source_g,
    source_y,
    partial,
    x_row,
    y_row,
    x_count,
    columns,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[x_row + i, d] (+)= sum over the wave's columns j of workspace[i, j] z[y_row + j, d]."""
    i = tl.program_id(1) * BLOCK_M
    d = tl.program_id(0) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, columns, BLOCK_K):
        g = load_tile(source_g, i, j, WIDTH, BLOCK_M, BLOCK_K, DESCRIPTOR)
        y = load_tile(source_y, y_row + j, d, STRIDE, BLOCK_K, BLOCK_N, DESCRIPTOR)
        total = tl.dot(g, y, total, input_precision=PRECISION)
    at, k = i + tl.arange(0, BLOCK_M), d + tl.arange(0, BLOCK_N)
    to = partial + (x_row + at).to(tl.int64)[:, None] * STRIDE + k[None, :]
    mask = (at < x_count)[:, None] & (k < STRIDE)[None, :]
    if not FIRST:
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total, mask=mask)


WORKSPACE_BYTES = 16 << 20
"""A block of G at a time: small beside the L2 cache of every supported data-centre GPU (40 MB and more)."""


def gradient(
    layout, stored, weights, upstream, state, classes, ends, coef, objective, cross, core, normalize, factor, precision
):
    """(partial sums, how many of them are of pairs in the batch): ``finish_rows`` adds them up. The others are the
    queue's."""
    arch = _launch.arch_of(stored)
    config = configs.lookup("gradient", arch, stored.dtype, layout.stride)
    constants = {"LABELS": layout.labels, "OBJECTIVE": objective, "NORMALIZE": normalize, "STRIDE": layout.stride}
    constants |= {"FACTOR": factor, "PRECISION": precision}
    tables = (*weights, upstream, state, classes, ends, coef)
    queue = int(layout.queue > 0)
    if config is None or config.block_k < layout.stride:
        return _in_waves(layout, stored, tables, cross, core, constants), 1
    programs = config.programs * _launch.processors_of(stored)
    blocks, columns = (layout.views * triton.cdiv(layout.batch, b) for b in (config.block_m, config.block_n))
    # Few rows leave most of the machine idle: give each block's columns to several programs.
    shares = max(1, min(columns // layout.views, programs // blocks))
    # Few tiles are one launch, at the speed of masked ones; of many, those with masks are a small share.
    if blocks * columns < 16 * programs:
        parts = (("all", config, shares, 0, shares),)
        splits = shares
    else:
        masked = configs.lookup("masked_gradient", arch, stored.dtype, layout.stride)
        splits = shares + 1
        parts = (("clean", config, shares, 0, splits), ("masked", masked, 1, shares, splits + 1))
    partial = _partial(layout, splits, queue * len(parts), stored)
    for part, config, shares, slot, queue_slot in parts:
        x, y = _launch.tile_sources(stored, config)
        _launch.launch(
            gradient_kernel,
            (triton.cdiv(layout.batch, config.block_m) * layout.views, shares + queue),
            x,
            y,
            *tables,
            partial,
            layout.rows,
            layout.batch,
            layout.padded,
            layout.queue,
            layout.views,
            core,
            shares,
            slot,
            queue_slot,
            PART=part,
            CROSS=cross,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            DESCRIPTOR=config.descriptor,
            **constants,
            **(config.options if part == "clean" else config.uncapped),
        )
    return partial, splits


def _partial(layout, splits, queues, stored):
    return _launch.empty((splits + queues, layout.rows, layout.stride), torch.float32, stored.device)


def _in_waves(layout, stored, tables, cross, core, constants):
    arch = _launch.arch_of(stored)
    pairs = configs.lookup("wave", arch, stored.dtype, layout.stride)
    product = configs.lookup("product", arch, stored.dtype, layout.stride)
    padded = max(layout.padded, layout.queue_padded)
    height, width = wave_shape(padded, layout.padded, stored.element_size())
    partial = _partial(layout, 1, int(layout.queue > 0), stored)
    workspace = _launch.empty((height, width), stored.dtype, stored.device)
    x, y = _launch.tile_sources(stored, pairs)
    product_sources = _launch.product_sources(workspace, stored, product)
    for u, v in visits(layout, cross, core):
        slot = int(v == layout.views)
        limit = layout.queue if slot else layout.batch
        for x_first in range(0, layout.batch, height):
            x_count = min(height, layout.batch - x_first)
            for y_first in range(0, limit, width):
                y_count = min(width, limit - y_first)
                _launch.launch(
                    wave_kernel,
                    (triton.cdiv(y_count, pairs.block_n), triton.cdiv(x_count, pairs.block_m)),
                    x,
                    y,
                    *tables,
                    workspace,
                    layout.rows,
                    layout.batch,
                    layout.padded,
                    layout.queue,
                    layout.views,
                    u,
                    v,
                    x_first,
                    y_first,
                    BLOCK_M=pairs.block_m,
                    BLOCK_N=pairs.block_n,
                    BLOCK_K=pairs.block_k,
                    WIDTH=width,
                    DESCRIPTOR=pairs.descriptor,
                    **constants,
                    **pairs.options,
                )
                first = y_first == 0 and (slot or v == next(w for t, w in visits(layout, cross, core) if t == u))
                _launch.launch(
                    product_kernel,
                    (triton.cdiv(layout.stride, product.block_n), triton.cdiv(x_count, product.block_m)),
                    *product_sources,
                    partial[slot],
                    u * layout.padded + x_first,
                    v * layout.padded + y_first,
                    x_count,
                    y_count,
                    FIRST=bool(first),
                    STRIDE=layout.stride,
                    WIDTH=width,
                    BLOCK_M=product.block_m,
                    BLOCK_N=product.block_n,
                    BLOCK_K=product.block_k,
                    DESCRIPTOR=product.descriptor,
                    PRECISION=constants["PRECISION"],
                    **product.options,
                )
    return partial


def wave_shape(columns, rows, element_size):
    """(rows, columns) of the workspace: as long as it may be, since each pass over its columns reads and writes the
    accumulators of its rows once. Multiples of 256, the padding of the views."""
    width = min(8192, columns)
    height = min(rows, max(256, WORKSPACE_BYTES // (element_size * width) // 256 * 256))
    return height, width


def visits(layout, cross, core):
    """The ordered pairs (u, v) of views that meet; v == views is the queue."""
    for u in range(layout.views):
        for v in range(layout.views):
            if (core < 0 or u == v or core in (u, v)) and not (cross and u == v):
                yield u, v
        if layout.queue:
            yield u, layout.views
