"""A tile of G, the gradient of pairs: G_ij = exp(S_ij - reference) (w_i + w_j), from both rows as anchors."""

import torch
import triton
import triton.language as tl

from selfsup_kernels.tiles import launcher
from selfsup_kernels.tiles.classes import class_gradient
from selfsup_kernels.tiles.tile import LOG2E, relative_exponential


@triton.jit
def masked_blocks(
    classes,
    ends,
    x_local,
    BATCH,
    SPAN_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Return [low, high): the blocks of a view with columns that are no negatives of the rows around x_local.

    Rows and columns are rounded to spans, the blocks of the launch without masks, since both launches must divide the
    work along the same lines; a block of either launch is a span or a piece of one.
    """
    x_local = x_local // SPAN_X * SPAN_X
    if LABELS:
        low = tl.load(classes + x_local)
        high = tl.load(ends + tl.minimum(x_local + SPAN_X, BATCH) - 1)
    else:
        low = x_local
        high = x_local + SPAN_X
    return low // SPAN_Y * (SPAN_Y // BLOCK_Y), tl.cdiv(high, SPAN_Y) * (SPAN_Y // BLOCK_Y)


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
    log_weights,
    upstream,
    classes,
    positives,
    scale,
    reference,
    rows,
    BATCH,
    limit,
    VIEWS,
    MASKED: tl.constexpr,
    LABELS: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Return G (BLOCK_X, BLOCK_Y) of rows of view u (x) and of view v (y; v == VIEWS: the queue), from inner products
    ``s``.

    With MASKED, pairs of one sample (with labels: of one class) are excluded, and weights of any size are right; it
    takes two exponentials per pair. Without, columns past the end need no mask: their rows are zeros, and G is finite.
    """
    xs = x_local + tl.arange(0, BLOCK_X)
    ys = y_local + tl.arange(0, BLOCK_Y)
    x_at, y_at = x_row + tl.arange(0, BLOCK_X), y_row + tl.arange(0, BLOCK_Y)
    x_in, y_in = xs < BATCH, (ys < limit) & (v != VIEWS)
    if MASKED:
        score = s * scale
        x_slow = tl.load(log_weights + v * rows + x_at, mask=x_in, other=float("-inf"))
        y_slow = tl.load(log_weights + u * rows + y_at, mask=y_in, other=float("-inf"))
        # These are probabilities, so at most 1 even where the score of a long row was rounded differently in its sum.
        # tl.minimum may drop NaN.
        gx, gy = score + x_slow[:, None], score + y_slow[None, :]
        gx = tl.exp2(tl.where(gx > 0, 0.0, gx) * LOG2E)
        gy = tl.exp2(tl.where(gy > 0, 0.0, gy) * LOG2E)
        if upstream is None:
            g = (gx + gy) * FACTOR
        else:
            x_scale = FACTOR * tl.load(upstream + x_at, mask=x_in, other=0.0)
            y_scale = FACTOR * tl.load(upstream + y_at, mask=y_in, other=0.0)
            g = gx * x_scale[:, None] + gy * y_scale[None, :]
        if LABELS:
            if v != VIEWS:
                g = class_gradient(
                    g, score, xs, ys, upstream, classes, positives, rows, BATCH, POSITIVES, NUMERATOR, FACTOR
                )
        else:
            g = tl.where((xs[:, None] == ys[None, :]) & (v != VIEWS), 0.0, g)
        # A row of zeros past the end has score 0, which may lie far above all real scores of a row.
        g = tl.where((ys < limit)[None, :], g, 0.0)
    else:
        wx = FACTOR * tl.load(weights + v * rows + x_at, mask=x_in, other=0.0)
        wy = FACTOR * tl.load(weights + u * rows + y_at, mask=y_in, other=0.0)
        if upstream is not None:
            wx *= tl.load(upstream + x_at, mask=x_in, other=0.0)
            wy *= tl.load(upstream + y_at, mask=y_in, other=0.0)
        g = relative_exponential(s, scale, reference, NORMALIZE) * (wx[:, None] + wy[None, :])
        if FACTOR != 1.0:
            if y_local + BLOCK_Y > limit:  # only in float16, where it may be infinite
                g = tl.where((ys < limit)[None, :], g, 0.0)
    return g


def partial_sums(layout, splits, queues, stored):
    """Allocate ``partial`` (splits + queues, own rows, S), which ``finish_rows`` adds up."""
    return launcher.empty((splits + queues, layout.views * layout.part[1], layout.stride), torch.float32, stored.device)
