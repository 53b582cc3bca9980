"""Simulate the truncation error of tensor-core sums, which limits the columns per sum in the Triton gradient.

The model is the published one of Hopper: the products of one instruction and the accumulator are aligned to the largest
of them and truncated 25 bits below its leading bit; the sum is truncated to 24 bits. It was not compared with a GPU.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from selfsup_kernels.tiles.gradient import MOST_COLUMNS

DEPTH, BITS, DIM = 16, 25, 32  # 16-bit products per instruction; bits kept; features (independent sums)


def add_up(products):
    """Sum float64 products (columns, DIM) over the columns as a tensor core does."""
    total = np.zeros(products.shape[1])
    for part in products.reshape(-1, DEPTH, products.shape[1]):
        terms = np.vstack([total, part])
        step = np.ldexp(1.0, np.frexp(np.abs(terms).max(0))[1] - 1 - BITS)
        mantissa, exponent = np.frexp((np.trunc(terms / step) * step).sum(0))
        total = np.ldexp(np.trunc(mantissa * 2**24), exponent - 24)
    return total


def loss_of(columns, shared):
    """Return the relative error of sums of weighted unit rows; ``shared`` rows have a common direction."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((columns, DIM)) + (0.7 * generator.standard_normal(DIM) if shared else 0)
    rows = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).bfloat16().double().numpy()
    weights = torch.from_numpy(np.exp(generator.standard_normal((columns, 1)))).bfloat16().double().numpy()
    exact = (weights * rows).sum(0)
    return np.linalg.norm(add_up(weights * rows) - exact) / np.linalg.norm(exact)


def test_the_column_limit_keeps_the_error_below_the_rounding_of_the_result():
    half = torch.finfo(torch.float16).eps / 2
    assert loss_of(MOST_COLUMNS, shared=False) < half
    assert loss_of(MOST_COLUMNS, shared=True) < half
    assert loss_of(4 * MOST_COLUMNS, shared=True) > 2 * half  # the error is proportional to the number of columns
