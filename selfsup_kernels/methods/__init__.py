"""Complete methods as plain modules for any training loop; the data loader provides the views."""

from selfsup_kernels.methods._export import export_encoder
from selfsup_kernels.methods.byol import BYOL
from selfsup_kernels.methods.byol_contrast import BYOLContrast
from selfsup_kernels.methods.cmc import CMC
from selfsup_kernels.methods.moco import MoCo
from selfsup_kernels.methods.siglip import SigLIP
from selfsup_kernels.methods.simclr import SimCLR

__all__ = ["BYOL", "CMC", "BYOLContrast", "MoCo", "SigLIP", "SimCLR", "export_encoder"]
