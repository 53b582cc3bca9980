"""Optimizers that move an :class:`selfsup_kernels.EMA`'s target in the same pass over the parameters."""

from selfsup_kernels.ema.optim import LARS, SGD, AdamW

__all__ = ["LARS", "SGD", "AdamW"]
