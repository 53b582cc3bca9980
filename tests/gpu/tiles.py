"""Tiles so small that a few rows are many of them: what the tests put in the place of the table of configurations."""

from selfsup_kernels.tiles.configs import Config

WAYS = ("clean+masked", "all", "waves")
"""The ways that the launchers of InfoNCE choose by size; the fixture ``path`` says what they are."""


def small(way):
    """What ``configs._lookup`` is to be for one of ``WAYS``. They have to fit the least shared memory of the
    architectures, which tests/gpu/test_static.py sees to."""

    def lookup(kernel, architecture, kind, width):
        if kernel in ("gradient", "masked_gradient") and way == "waves":
            return None
        # Whole rows of 256 float32 numbers leave room for few of them.
        rows = 64 if width != "256" or kind == "half" else 32
        m, n, k = {
            # The tiles without masks are larger than those with, and not all are square.
            "sums": (32, 64, 32),
            "masked_sums": (16, 32, 32),
            "gradient": (rows, rows, 256 if width == "256" else 64),
            "masked_gradient": (16, 32, 256 if width == "256" else 64),
        }.get(kernel, (32, 32, 32))
        return Config(block_m=m, block_n=n, block_k=k, num_warps=4, num_stages=2)

    return lookup
