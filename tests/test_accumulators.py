"""What tensor cores lose where they add up, simulated: why the Triton gradient's sums are over so many columns at most.

The model is what was found of Hopper's: the products of one instruction and the accumulator are aligned to the largest
of them, cut off 25 bits below its first, and the sum is cut to 24 bits. Nobody has compared it with a GPU here.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from selfsup_kernels.tiles.gradient import MOST_COLUMNS

DEPTH, BITS, DIM = 16, 25, 32  # products of 16 bits an instruction adds up; bits kept; features, each a sum of its own


def add_up(products):
    """(columns, DIM) float64 products to sums, as a tensor core adds them."""
    total = np.zeros(products.shape[1])
    for part in products.reshape(-1, DEPTH, products.shape[1]):
        terms = np.vstack([total, part])
        step = np.ldexp(1.0, np.frexp(np.abs(terms).max(0))[1] - 1 - BITS)
        mantissa, exponent = np.frexp((np.trunc(terms / step) * step).sum(0))
        total = np.ldexp(np.trunc(mantissa * 2**24), exponent - 24)
    return total


def loss_of(columns, shared):
    """The relative error of sums of weighted unit rows; ``shared`` rows have a direction in common."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((columns, DIM)) + (0.7 * generator.standard_normal(DIM) if shared else 0)
    rows = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).bfloat16().double().numpy()
    weights = torch.from_numpy(np.exp(generator.standard_normal((columns, 1)))).bfloat16().double().numpy()
    exact = (weights * rows).sum(0)
    return np.linalg.norm(add_up(weights * rows) - exact) / np.linalg.norm(exact)


def test_the_limit_keeps_the_loss_below_what_rounding_the_result_may_lose():
    half = torch.finfo(torch.float16).eps / 2
    assert loss_of(MOST_COLUMNS, shared=False) < half
    assert loss_of(MOST_COLUMNS, shared=True) < half
    assert loss_of(4 * MOST_COLUMNS, shared=True) > 2 * half  # in proportion to the columns: without a limit it is seen
