"""The record of one SigLIP call. The schema of the ops and the C++ struct are generated from it.

This module imports only the standard library and ``core.record``, since the build reads it.
"""

from typing import NamedTuple

from selfsup_kernels.core.record import Size


class Call(NamedTuple):
    """Everything about a call except its tensors: x (N, D), y (M, D)."""

    rows: Size
    """N, the number of samples of x: those of this process."""
    columns: Size
    """M, the number of samples of y: those of all processes."""
    dim: Size
    """D, the number of features per row."""
    first: Size
    """Row i of x and row ``first + i`` of y are one sample, the positive pair."""
    normalize: bool
    reduction: int
    """A position in ``core.ops.REDUCTIONS``; the mean is over the N rows."""
    eps: float
    scale: float
    """Ignored if the scale is passed as a tensor."""
    bias: float
    """Likewise."""


SIZES = 4
"""The number of leading fields of :class:`Call` that follow from the tensors' shapes."""
