"""A tile of G, the gradient of pairs: G_ij = exp(S_ij - r) (w_i + w_j), the pair's share in both anchors' losses."""

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
    """Blocks [low, high) of a view hold columns that the rows around x_local must not take for negatives.

    Rows and columns are counted in spans, the blocks of the launch without masks: both launches must draw the same
    line, and a block of either is a span or a piece of one.
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
    POSITIVES: tl.constexpr,
    NUMERATOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """G (BLOCK_X, BLOCK_Y) of rows of view u (x) and of view v (y; v == VIEWS: the queue), from inner products ``s``.

    With MASKED, pairs of one sample (of one class) are told apart, and weights of any size are right, at the price of
    two exponentials. Without, columns past the end need no mask: the rows there are zeros, and G is finite.
    """
    xs = x_local + tl.arange(0, BLOCK_X)
    ys = y_local + tl.arange(0, BLOCK_Y)
    x_at, y_at = x_row + tl.arange(0, BLOCK_X), y_row + tl.arange(0, BLOCK_Y)
    x_in, y_in = xs < BATCH, (ys < limit) & (v != VIEWS)
    if MASKED:
        score = s * scale
        x_slow = tl.load(slow + v * rows + x_at, mask=x_in, other=float("-inf"))
        y_slow = tl.load(slow + u * rows + y_at, mask=y_in, other=float("-inf"))
        # Probabilities: where a long row's score was rounded otherwise than in its sum, at most 1 all the same. Not by
        # a minimum, which may drop NaN.
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
                g = class_gradient(g, score, xs, ys, upstream, classes, coef, rows, BATCH, POSITIVES, NUMERATOR, FACTOR)
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
        if FACTOR != 1.0:
            if y_local + BLOCK_Y > limit:  # float16 alone: there it may be infinite
                g = tl.where((ys < limit)[None, :], g, 0.0)
    return g


def partial_sums(layout, splits, queues, stored):
    """Memory for (splits + queues, own rows, stride) of sums over pairs, which ``finish_rows`` adds up."""
    return launcher.empty((splits + queues, layout.views * layout.part[1], layout.stride), torch.float32, stored.device)
