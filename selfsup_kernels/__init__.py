"""Fused, memory-linear kernels for self-supervised losses: N-view InfoNCE, BYOL, multi-tensor EMA.

See :mod:`selfsup_kernels.functional` for the losses, :mod:`selfsup_kernels.modules` for the modules,
:mod:`selfsup_kernels.methods` for whole methods, and ``python -m selfsup_kernels info`` for what this machine runs.
"""

from selfsup_kernels.functional import byol_loss, info_nce_loss
from selfsup_kernels.version import __version__

__all__ = ["__version__", "byol_loss", "info_nce_loss"]
