"""``byol_loss`` as a module that stores the arguments."""

from torch import nn

from selfsup_kernels.byol.api import byol_loss
from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained


class BYOLLoss(nn.Module):
    """BYOL's regression loss as a module; see :func:`selfsup_kernels.byol_loss`.

    Args:
        eps, reduction, impl: as in :func:`selfsup_kernels.byol_loss`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> criterion = sk.BYOLLoss()
        >>> predictions, targets = torch.randn(2, 2, 256, 128)        # (V, B, D) each
        >>> criterion(predictions, targets).shape
        torch.Size([])
    """

    @explained("BYOLLoss()")
    def __init__(self, *, eps=1e-12, reduction="mean", impl="auto"):
        super().__init__()
        check.choice("reduction", reduction, ops.REDUCTIONS)
        check.choice("impl", impl, backends.CHOICES)
        self.eps = check.positive_number("eps", eps)
        self.reduction = reduction
        self.impl = impl

    @explained("criterion([p0, p1], [t0, t1])")
    def forward(self, predictions, targets):
        return byol_loss(predictions, targets, eps=self.eps, reduction=self.reduction, impl=self.impl)

    def extra_repr(self):
        return f"eps={self.eps:g}, reduction={self.reduction!r}" + (
            f", impl={self.impl!r}" if self.impl != "auto" else ""
        )
