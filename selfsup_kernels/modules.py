"""The losses as modules."""

from selfsup_kernels.byol.module import BYOLLoss
from selfsup_kernels.info_nce.module import InfoNCELoss
from selfsup_kernels.siglip.module import SigLIPLoss

__all__ = ["BYOLLoss", "InfoNCELoss", "SigLIPLoss"]
