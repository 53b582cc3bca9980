"""The BYOL loss as one writes it by hand, differentiated by autograd: ``impl="reference"`` in ordinary, small calls."""

import torch

from selfsup_kernels.core.eager import UnitRows, ordinary
from selfsup_kernels.core.ops import REDUCTIONS

_MOST_ELEMENTS = 1 << 16
"""The most elements of a view in ``byol_loss``. With more, passes over the rows take the time, and the op has fewer."""


def takes(view):
    """Whether ``byol_loss`` below is for a call with views like ``view``."""
    return ordinary(view) and view.numel() <= _MOST_ELEMENTS


def byol_loss(eps, reduction, stacked, num, *tensors):
    """The loss, in float32 at least, of the arguments of ``byol.autograd.BYOL``."""
    reduction, num_views = REDUCTIONS[reduction], len(tensors[0]) if stacked else num
    p, _ = UnitRows.apply(True, eps, None, *tensors[:num])
    with torch.no_grad():
        t, _ = UnitRows.apply(True, eps, None, *tensors[num:])
        if num_views > 1:  # of the other views the mean is enough
            t = t.view(num_views, -1, t.shape[1])
            t = (t.flip(0) if num_views == 2 else (t.sum(0) - t) / (num_views - 1)).flatten(0, 1)
    cosines = torch.linalg.vecdot(p, t)
    if reduction == "mean":
        return 2 - 2 * cosines.mean()
    loss = 2 - 2 * cosines
    return loss.sum() if reduction == "sum" else loss.view(num_views, -1)
