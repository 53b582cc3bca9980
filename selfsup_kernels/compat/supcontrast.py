"""A drop-in for the loss of the SupContrast repository (github.com/HobbitLong/SupContrast)."""

import torch
from torch import nn

from selfsup_kernels.compat._common import narrow, unsupported, wide_loss

__all__ = ["SupConLoss"]

_ORIGINAL = "SupContrast's SupConLoss"


class SupConLoss(nn.Module):
    r"""Supervised contrastive loss (arXiv:2004.11362, eq. 2): a drop-in for SupContrast's ``losses.SupConLoss``.

    .. math:: L = \frac{\tau}{\tau_{base}} \operatorname{mean}_i \left[ \log \sum_{j \ne i} e^{S_{ij}}
        - \operatorname{mean}_{p \in P(i)} S_{ip} \right], \qquad S_{ij} = \langle z_i, z_j \rangle / \tau

    over the rows of all views; :math:`P(i)` is the set of other rows of the anchor's class (without labels: of its
    sample). The caller normalises the features, as with the original. An anchor without positives counts as zero, as in
    the original since December 2023 (before, the loss was NaN). This is ``supcon_out`` of
    :func:`selfsup_kernels.info_nce_loss`, times ``temperature / base_temperature``.

    Args:
        temperature: :math:`\tau`.
        contrast_mode: ``"all"``: every row is an anchor; ``"one"``: only the rows of the first view are.
        base_temperature: :math:`\tau_{base}`.

    Raises:
        ValueError: ``contrast_mode`` is unknown.

    Example:
        >>> from selfsup_kernels.compat.supcontrast import SupConLoss
        >>> features = nn.functional.normalize(torch.randn(256, 2, 128), dim=-1)      # (B, V, D)
        >>> SupConLoss(temperature=0.07)(features, torch.randint(10, (256,))).shape
        torch.Size([])
    """

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        super().__init__()
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode: expected 'all' or 'one', got {contrast_mode!r}")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features, labels=None, mask=None):
        """Return the loss of ``(B, V, ...)`` features; dimensions after the third are flattened.

        Args:
            features: B >= 2 samples, V >= 2 views; V = 1 with ``labels`` or ``mask``.
            labels: B numbers; samples with equal labels form a class.
            mask: ``(B, B)``, nonzero where two samples belong to one class. Only masks of classes are supported: zeros
                and ones, symmetric, transitive, with ones on the diagonal (ignored for one view). This is checked
                exactly; the host reads one bool from the device.

        Raises:
            ValueError, TypeError: an argument does not fit; the message says which and why.
            RuntimeError: the mask is not a mask of classes.
        """
        if not isinstance(features, torch.Tensor):
            raise TypeError(f"features: expected a (B, V, D) tensor, got {type(features).__name__}")
        if features.dim() < 3:
            raise ValueError(f"features: expected a (B, V, D) tensor, got shape {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("labels, mask: expected at most one of them, got both")
        batch, views = features.shape[:2]
        if labels is not None:
            labels = _integers(labels, batch, features.device)
        elif mask is not None:
            labels = labels_of_mask(mask, batch, views).to(features.device)
        rows = features.flatten(2).transpose(0, 1)
        one = self.contrast_mode == "one"
        loss = wide_loss(
            rows,
            temperature=self.temperature,
            labels=labels,
            normalize=False,
            reduction="none" if one else "mean",
        )
        return narrow((self.temperature / self.base_temperature) * (loss[0].mean() if one else loss), features)

    def extra_repr(self):
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r},"
            f" base_temperature={self.base_temperature}"
        )


def _integers(labels, batch, device):
    """Convert labels of any dtype, ``(B,)`` or ``(B, 1)``, to ``(B,)`` integers that define the same classes."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.numel() != batch:
        raise ValueError(f"labels: expected one per sample, {batch}, got shape {tuple(labels.shape)}")
    labels = labels.reshape(-1).to(device)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        labels = torch.unique(labels, return_inverse=True)[1]
    return labels


def labels_of_mask(mask, batch, views):
    """Return labels for which ``mask`` is ``labels[:, None] == labels[None, :]``; raise if there are none."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a ({batch}, {batch}) tensor, got {type(mask).__name__}")
    if tuple(mask.shape) != (batch, batch):
        raise ValueError(f"mask: expected shape ({batch}, {batch}), got {tuple(mask.shape)}")
    same = mask != 0
    binary = same.to(mask.dtype) == mask
    if views == 1:  # a row is not its own positive, so the diagonal is ignored
        own = torch.eye(batch, dtype=torch.bool, device=mask.device)
        same, binary = same | own, binary | own
    labels = same.to(torch.uint8).argmax(1)  # the first member of the class, if the mask defines classes
    if not bool((binary & (same == (labels[:, None] == labels[None, :]))).all()):
        raise unsupported(
            _ORIGINAL,
            "mask",
            "only masks of classes are supported (zeros and ones, symmetric, transitive, ones on the diagonal),"
            " and can be passed as labels instead; use the original for others",
        )
    return labels
