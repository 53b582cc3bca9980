"""Device code that several kernels share: loading a tile of rows, the score reference, masked log-sum-exp."""

import triton
import triton.language as tl

from selfsup_kernels.info_nce import call
from selfsup_kernels.info_nce.objectives import Columns
from selfsup_kernels.tiles.arguments import Scale

OTHER = tl.constexpr(int(Columns.OTHER))
"""The value of ``Sizes.columns`` for objectives without negatives in their own view."""

LOG2E = tl.constexpr(1.4426950408889634)

HEADROOM = tl.constexpr(70.0)
"""Scores are exponentiated relative to ``max(bound - HEADROOM, 0)``: ``exp(70)``, summed 1e8 times, is a float32."""

SCALE, LONGEST, SLOW, FINISHED = map(tl.constexpr, (call.SCALE, call.LONGEST, call.SLOW, call.FINISHED))
"""Places in ``Saved.scalars``."""


@triton.jit
def load_tile(source, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, tile: tl.constexpr):
    """(ROWS, COLUMNS) of the stored rows from (row, column) on.

    ``source`` is a tensor descriptor (TMA) or a pointer. Nothing needs a mask: storage is padded with rows of zeros,
    and a row consists of whole pieces of BLOCK_K numbers, or one.
    """
    if tile.DESCRIPTOR:
        loaded = source.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        columns = column + tl.arange(0, COLUMNS)
        length = tile.BLOCK_K if tile.RESIDENT else stride
        loaded = tl.load(source + rows[:, None] * length + columns[None, :])
    return loaded


@triton.jit
def load_ids(ids, sample, mask):
    """Return the ids (``SampleIds``) of samples; 0 where ``mask`` is False."""
    return tl.load(ids.data + sample.to(tl.int64) * ids.stride, mask=mask, other=0)


@triton.jit
def half_odds(logq, row, mask):
    """Return exp(-logq / 2) of stored rows. A kernel multiplies by it twice: exp(-logq) may be too small for a float32
    where the product of it and of exp(score - reference) is not."""
    return tl.exp2(tl.load(logq + row, mask=mask, other=0.0) * (-0.5 * LOG2E))


@triton.jit
def tile_products(source_x, source_y, x, y, x_row, y_row, stride, tile: tl.constexpr):
    """Return the inner products (BLOCK_M, BLOCK_N) of two blocks of rows, in float32: of x and y if they are resident,
    that is as wide as the rows, else streamed in pieces of BLOCK_K."""
    if tile.RESIDENT:
        products = tl.dot(x, tl.trans(y), input_precision=tile.PRECISION)
    else:
        BLOCK_M: tl.constexpr = tile.BLOCK_M  # a field is a constant, but not as an element of a shape
        BLOCK_N: tl.constexpr = tile.BLOCK_N
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, stride, tile.BLOCK_K):
            xk = load_tile(source_x, x_row, k, stride, BLOCK_M, tile.BLOCK_K, tile)
            yk = load_tile(source_y, y_row, k, stride, BLOCK_N, tile.BLOCK_K, tile)
            products = tl.dot(xk, tl.trans(yk), products, input_precision=tile.PRECISION)
    return products


@triton.jit
def score_reference(scalars, NORMALIZE: tl.constexpr):
    """1 / temperature and r: every score is at most r + HEADROOM, whatever the rows are.

    The bound is 1 / temperature for unit rows (1 % more, since rows of few bits are not exactly of unit length), else
    that times the largest squared norm. With ``r = 0`` for all but small temperatures nothing underflows either.
    """
    scale = tl.load(scalars + SCALE)
    if NORMALIZE:
        bound = scale * 1.01
    else:
        bound = scale * tl.load(scalars + LONGEST)
    return Scale(scale, tl.where(bound > HEADROOM, bound - HEADROOM, 0.0))


@triton.jit
def relative_exponential(s, scale, NORMALIZE: tl.constexpr):
    """exp(s / temperature - reference) of a tile of inner products.

    One rounding of ``log2(e) / temperature`` moves all scores by 6e-8 of themselves: nothing for unit rows, whose
    scores are at most a few hundred, but much for rows of any length.
    """
    if NORMALIZE:
        exponent = s * (scale.factor * LOG2E) - scale.reference * LOG2E
    else:
        exponent = (s * scale.factor - scale.reference) * LOG2E
    return tl.exp2(exponent)


@triton.jit
def finite_or_zero(x):
    """Return 0 for an infinite maximum: it is -inf without terms, and inf - inf would be NaN where the sum is inf."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def log_sum_exp(x, mask):
    """Over the last axis, of the elements in ``mask``; -inf where there are none. NaN stays: the maximum may drop it,
    the sum does not."""
    top = finite_or_zero(tl.max(tl.where(mask, x, float("-inf")), 1))
    return tl.log(tl.sum(tl.where(mask, tl.exp(x - top[:, None]), 0.0), 1)) + top


@triton.jit
def log1p(x):
    """Kahan's: exact where 1 + x rounds."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def log_add(a, b):
    high, low = tl.where(a < b, b, a), tl.where(a < b, a, b)
    value = high + log1p(tl.exp(low - finite_or_zero(high)))
    value = tl.where(tl.abs(high) < float("inf"), value, high)  # both -inf, or one inf
    return tl.where((a != a) | (b != b), a + b, value)


@triton.jit
def softplus(x):
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))  # NaN comes through the second term


@triton.jit
def log_ratio(rest, positive):
    """log(exp(rest) + exp(positive)) - positive; NaN, as that is, where the positive's score is infinite."""
    return tl.where(positive == float("inf"), float("nan"), softplus(rest - positive))


@triton.jit
def sigmoid(x):
    y = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, y) / (1.0 + y)


@triton.jit
def softplus_and_sigmoid(x):
    """Return log(1 + exp(x)) and 1 / (1 + exp(-x)), from one exponential and one division; NaN stays in both.

    log(1 + y) for y in [0, 1] is a polynomial times y, so that small values are as accurate as large ones: the relative
    error is 2e-7.
    """
    y = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.003176057 * y + 0.019542527
    p = p * y - 0.056373613
    p = p * y + 0.105436238
    p = p * y - 0.152696671
    p = p * y + 0.196632743
    p = p * y - 0.249516163
    p = p * y + 0.333297105
    p = p * y - 0.499998926
    p = p * y + 1.0
    return tl.where(x > 0, x, 0.0) + p * y, tl.where(x > 0, 1.0, y) / (1.0 + y)


@triton.jit
def negatives_meet(u, v, is_queue, core_view, columns):
    """Return whether rows of view ``u`` have negatives in view ``v``, or in the queue, as
    ``objectives.negative_views`` does."""
    meets = (core_view < 0) | (u == v) | (u == core_view) | (v == core_view) | is_queue
    return meets & ((columns != OTHER) | (u != v))
