"""A tile of G, the gradient of pairs: G_ij = exp(S_ij - reference) (w_i + w_j), from both rows as anchors."""

import triton
import triton.language as tl

from selfsup_kernels.tiles.kernels.classes import class_gradient
from selfsup_kernels.tiles.kernels.tile import LOG2E, half_odds, load_ids, relative_exponential


@triton.jit
def masked_blocks(classes, x_local, sizes, LABELLED: tl.constexpr, tile: tl.constexpr):
    """Return [low, high): the blocks of a view with columns that are no negatives of the rows around x_local.

    Rows and columns are rounded to spans, the blocks of the launch without masks, since both launches must divide the
    work along the same lines; a block of either launch is a span or a piece of one.
    """
    PIECES: tl.constexpr = tile.SPAN_N // tile.BLOCK_N
    x_local = x_local // tile.SPAN_M * tile.SPAN_M
    if LABELLED:
        low = tl.load(classes.first + x_local)
        high = tl.load(classes.end + tl.minimum(x_local + tile.SPAN_M, sizes.batch) - 1)
    else:
        low = x_local
        high = x_local + tile.SPAN_M
    return low // tile.SPAN_N * PIECES, tl.cdiv(high, tile.SPAN_N) * PIECES


@triton.jit
def pair_gradient(
    s, x, y, limit, saved, ids, upstream, scale, sizes, MASKED: tl.constexpr, rules: tl.constexpr, tile: tl.constexpr
):
    """Return G (BLOCK_M, BLOCK_N) of the blocks of rows x and y, from inner products ``s``; ``limit``: the rows of y's
    view, or of the queue; ``ids``: ``SampleIds``, or None without duplicates and across views.

    With MASKED, pairs of one sample (with labels: of one class) are excluded, and weights of any size are right; it
    takes two exponentials per pair. Without, columns past the end need no mask: their rows are zeros, and G is finite.
    Pairs of samples with one id may be anywhere.
    """
    i, j = tl.arange(0, tile.BLOCK_M), tl.arange(0, tile.BLOCK_N)
    xs, ys = x.local + i, y.local + j
    x_at, y_at = x.row + i, y.row + j
    x_in, y_in = xs < sizes.batch, (ys < limit) & (y.view != sizes.views)
    if MASKED:
        score = s * scale.factor
        x_slow = tl.load(saved.log_weights + y.view * sizes.rows + x_at, mask=x_in, other=float("-inf"))
        y_slow = tl.load(saved.log_weights + x.view * sizes.rows + y_at, mask=y_in, other=float("-inf"))
        # These are probabilities, so at most 1 even where the score of a long row was rounded differently in its sum.
        # tl.minimum may drop NaN.
        of_x, of_y = score, score  # of the rows as anchors, and of the columns
        if saved.logq is not None:
            of_x -= tl.load(saved.logq + y_at, mask=y_in, other=0.0)[None, :]
            of_y -= tl.load(saved.logq + x_at, mask=x_in, other=0.0)[:, None]
        gx, gy = of_x + x_slow[:, None], of_y + y_slow[None, :]
        gx = tl.exp2(tl.where(gx > 0, 0.0, gx) * LOG2E)
        gy = tl.exp2(tl.where(gy > 0, 0.0, gy) * LOG2E)
        if upstream is None:
            g = (gx + gy) * tile.FACTOR
        else:
            x_scale = tile.FACTOR * tl.load(upstream + x_at, mask=x_in, other=0.0)
            y_scale = tile.FACTOR * tl.load(upstream + y_at, mask=y_in, other=0.0)
            g = gx * x_scale[:, None] + gy * y_scale[None, :]
        if rules.labelled:
            if y.view != sizes.views:
                g = class_gradient(g, of_x, of_y, xs, ys, saved, upstream, sizes, rules, tile)
        else:
            itself = (xs[:, None] == ys[None, :]) & (y.view != sizes.views)
            if rules.crossed:  # a class of several samples has its own sample's pair among the others
                share = tl.load(saved.positives + sizes.views * sizes.rows + x_at, mask=x_in, other=0.0)
                itself = itself & (share == 0)[:, None]
            g = tl.where(itself, 0.0, g)
        # A row of zeros past the end has score 0, which may lie far above all real scores of a row.
        g = tl.where((ys < limit)[None, :], g, 0.0)
    else:
        wx = tile.FACTOR * tl.load(saved.weights + y.view * sizes.rows + x_at, mask=x_in, other=0.0)
        wy = tile.FACTOR * tl.load(saved.weights + x.view * sizes.rows + y_at, mask=y_in, other=0.0)
        if upstream is not None:
            wx *= tl.load(upstream + x_at, mask=x_in, other=0.0)
            wy *= tl.load(upstream + y_at, mask=y_in, other=0.0)
        e = relative_exponential(s, scale, rules.normalize)
        if saved.logq is None:
            g = e * (wx[:, None] + wy[None, :])
        else:  # in an order in which no product leaves float32's range
            x_odds = half_odds(saved.logq, x_at, x_in)[:, None]
            y_odds = half_odds(saved.logq, y_at, y_in)[None, :]
            g = e * y_odds * wx[:, None] * y_odds + e * x_odds * wy[None, :] * x_odds
        if tile.FACTOR != 1.0:
            if y.local + tile.BLOCK_N > limit:  # only in float16, where it may be infinite
                g = tl.where((ys < limit)[None, :], g, 0.0)
    if ids is not None:
        x_id, y_id = load_ids(ids, xs, x_in), load_ids(ids, ys, y_in)
        same = (x_id[:, None] == y_id[None, :]) & y_in[None, :]
        if rules.crossed:
            # One number for both parts of a positive, which nearly cancel. Both rows have the share of their class.
            share = tl.load(saved.positives + sizes.views * sizes.rows + x_at, mask=x_in, other=0.0)
            share = (tile.FACTOR * share)[:, None]
            if upstream is None:
                g = tl.where(same, g - 2 * share, g)
            else:
                x_scale = tl.load(upstream + x_at, mask=x_in, other=0.0)
                y_scale = tl.load(upstream + y_at, mask=y_in, other=0.0)
                g = tl.where(same, g - share * (x_scale[:, None] + y_scale[None, :]), g)
        else:
            g = tl.where(same, 0.0, g)
    return g
