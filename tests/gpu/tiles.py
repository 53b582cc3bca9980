"""Configurations with tiles so small that a few rows fill many; tests use them instead of the shipped table."""

from selfsup_kernels.tiles.configs import Config

WAYS = ("clean+masked", "all", "waves")
"""The paths that the launchers of InfoNCE choose by size; the fixture ``path`` describes them."""


def small(way):
    """Return a replacement of ``configs._lookup`` for one of ``WAYS``. The tiles fit the smallest shared memory of the
    architectures, which tests/gpu/test_static.py checks."""

    def lookup(kernel, architecture, kind, width):
        if kernel in ("gradient", "masked_gradient") and way == "waves":
            return None
        # Shared memory has room for few whole rows of 256 float32 numbers.
        rows = 64 if width != "256" or kind == "half" else 32
        m, n, k = {
            # Tiles without masks are larger than tiles with masks, and not all are square.
            "sums": (32, 64, 32),
            "masked_sums": (16, 32, 32),
            "gradient": (rows, rows, 256 if width == "256" else 64),
            "masked_gradient": (16, 32, 256 if width == "256" else 64),
        }.get(kernel, (32, 32, 32))
        if width != "long" and kernel != "product":
            k = min(k, int(width))
        return Config(block_m=m, block_n=n, block_k=k, num_warps=4, num_stages=2)

    return lookup
