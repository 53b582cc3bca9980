"""The public functions."""

from selfsup_kernels.byol.api import byol_loss
from selfsup_kernels.ema.api import ema_update_
from selfsup_kernels.info_nce.api import info_nce_loss, info_nce_value_and_grad
from selfsup_kernels.info_nce.stats import ContrastiveStats, contrastive_stats
from selfsup_kernels.siglip.api import siglip_loss, siglip_value_and_grad

__all__ = [
    "ContrastiveStats",
    "byol_loss",
    "contrastive_stats",
    "ema_update_",
    "info_nce_loss",
    "info_nce_value_and_grad",
    "siglip_loss",
    "siglip_value_and_grad",
]
