"""Tile shapes of the InfoNCE kernels by architecture, dtype and width, from ``configs.json``.

The table is data: ``python -m selfsup_kernels tune`` measures candidates on a GPU and writes it, and
SELFSUP_KERNELS_TRITON_CONFIGS names another file to be read in its place. Nothing is tuned inside a user's step.
"""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from selfsup_kernels.tiles.arguments import Tile
from selfsup_kernels.tiles.layout import WIDTHS, takes_tf32

TABLE = Path(__file__).with_name("configs.json")
ENVIRONMENT = "SELFSUP_KERNELS_TRITON_CONFIGS"

ARCHITECTURES = (80, 86, 90, 100, 120)
"""Those of the table. A device takes the entry of the last one that is not above it: 8.9 has as little shared memory as
8.6."""


LONG = WIDTHS[-1] + 1
"""A width of rows that are "long", for kernels that take rows of any width in pieces."""


class Config(NamedTuple):
    """One kernel's launch: a tile of ``block_m`` by ``block_n`` pairs (``block_k`` numbers of a row at a time)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptor: bool = False
    """Tiles are loaded through tensor descriptors, that is by TMA (compute capability 9.0 and later)."""
    registers: int = 255
    """Maximum registers per thread. Without it the compiler spills registers to fit more programs on an SM. A lower
    value fits more programs."""
    programs: int = 1
    """Programs resident on one multiprocessor, where the grid is persistent."""

    @property
    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.registers}


def width_of(dim: int) -> str:
    """The key of the table for rows of ``dim`` numbers."""
    return str(next((w for w in WIDTHS if dim <= w), "long"))


def precision_of(dtype: torch.dtype) -> str:
    """Return the precision of float32 products, by PyTorch's own setting: full, or ("high", "medium") TF32. Three
    TF32 products make one of float32's precision, and are faster than FP32 units."""
    if dtype != torch.float32:
        return "ieee"  # products of 16-bit numbers are exact in float32 anyway
    return "tf32" if takes_tf32(dtype) else "tf32x3"


def lookup(kernel: str, architecture: int, dtype: torch.dtype, dim: int) -> Config | None:
    """The configuration of ``kernel``, or None where it is not to be used for such rows. The table's second key is
    "half" for both 16-bit types, else what ``precision_of`` says."""
    if kernel in _overrides:
        return _overrides[kernel]
    precision = precision_of(dtype)
    return _lookup(kernel, architecture, "half" if precision == "ieee" else precision, width_of(dim))


@functools.cache
def _lookup(kernel, architecture, kind, width):
    known = max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0])
    if f"sm_{known}" not in _table():
        raise ValueError(f"{ENVIRONMENT}: expected an entry sm_{known} in the table, got {', '.join(_table())}")
    entry = _table()[f"sm_{known}"][kernel][kind].get(width)
    return None if entry is None else Config(**entry)


@functools.cache
def _table():
    return json.loads(Path(os.environ.get(ENVIRONMENT) or TABLE).read_text())


_overrides: dict[str, Config | None] = {}


def overridden() -> bool:
    """Return whether :func:`override` is active."""
    return bool(_overrides)


@contextlib.contextmanager
def override(entries: dict[str, Config | None]):
    """Within it ``lookup`` gives these, by kernel, for all rows: for tools that compare configurations."""
    before = dict(_overrides)
    _overrides.update(entries)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def tile(config: Config, stride: int, precision: str, spans: Config | None = None, factor: float = 1.0) -> Tile:
    """The constants of a kernel's tiles; ``spans``: the configuration of the launch without masks."""
    if stride % config.block_k:
        raise ValueError(f"{ENVIRONMENT}: block_k must divide the {stride} numbers of a row, got {config}")
    spans = spans or config
    blocks = config.block_m, config.block_n, config.block_k, spans.block_m, spans.block_n
    return Tile(*blocks, config.block_k == stride, config.descriptor, precision, factor)


def check_divides(kernel: str, spans: Config, config: Config) -> None:
    """The tiles with masks must be pieces of those without: the two launches share the work along the latter's edges.

    Raises:
        ValueError: they are not, in a table that was written by hand or by a tuner.
    """
    sums = kernel == "sums"  # whose blocks of either side lie in spans of block_n rows
    if spans.block_n % config.block_n or (spans.block_n if sums else spans.block_m) % config.block_m:
        raise ValueError(
            f"{ENVIRONMENT}: tiles of masked_{kernel} must divide those of {kernel}, got {config}, {spans}"
        )
