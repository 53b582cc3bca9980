"""Fused, memory-linear kernels for self-supervised losses: N-view InfoNCE, SigLIP, BYOL, multi-tensor EMA.

See :mod:`selfsup_kernels.functional` for the losses, :mod:`selfsup_kernels.modules` for the modules,
:mod:`selfsup_kernels.methods` for whole methods, and ``python -m selfsup_kernels info`` for what this machine runs.
"""

import importlib
import sys

from selfsup_kernels import backends, compat, functional, methods, optim
from selfsup_kernels.chunked import chunked_backward
from selfsup_kernels.ema import EMA, cosine_momentum
from selfsup_kernels.functional import (
    ContrastiveStats,
    byol_loss,
    contrastive_stats,
    ema_update_,
    info_nce_loss,
    info_nce_value_and_grad,
    siglip_loss,
    siglip_value_and_grad,
)
from selfsup_kernels.info_nce.objectives import OBJECTIVES
from selfsup_kernels.modules import BYOLLoss, InfoNCELoss, SigLIPLoss
from selfsup_kernels.version import __version__

__all__ = [
    "EMA",
    "OBJECTIVES",
    "BYOLLoss",
    "ContrastiveStats",
    "InfoNCELoss",
    "SigLIPLoss",
    "__version__",
    "backends",
    "byol_loss",
    "chunked_backward",
    "compat",
    "contrastive_stats",
    "cosine_momentum",
    "ema_update_",
    "functional",
    "info_nce_loss",
    "info_nce_value_and_grad",
    "methods",
    "optim",
    "profile",
    "siglip_loss",
    "siglip_value_and_grad",
]


def __getattr__(name):
    if name == "profile":  # imported when first used: it needs more of torch than a loss does
        return importlib.import_module("selfsup_kernels.profile")
    package, hint = sys.modules[__name__], ""
    if not name.startswith("_"):
        hint = importlib.import_module("selfsup_kernels.names").here(name, package)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}", name=name, obj=package)
