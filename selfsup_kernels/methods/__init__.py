"""Whole methods as plain modules: any trainer can drive them. The views come from the data loader."""

from selfsup_kernels.methods.byol import BYOL
from selfsup_kernels.methods.cmc import CMC

__all__ = ["BYOL", "CMC"]
