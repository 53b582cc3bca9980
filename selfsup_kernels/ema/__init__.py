"""Moving averages of many tensors, and optimizers that update one in the same pass."""

from selfsup_kernels.ema.module import EMA, cosine_momentum

__all__ = ["EMA", "cosine_momentum"]
