"""MoCo's loss: contrast each row with its positive and a queue only, not with the rest of its batch."""

import torch
import torch.nn.functional as F

from selfsup_kernels.compat._common import narrow
from selfsup_kernels.info_nce.queue import queue_log_sums


def queue_contrast_loss(anchors, positives, queue, temperature):
    r"""Return ``mean_i [ log(exp(P_i) + sum_j exp(S_ij)) - P_i ]`` over queue rows j (MoCo, arXiv:1911.05722, eq. 1).

    Scores are inner products divided by ``temperature``; anchors and positives are normalised here, the queue's rows
    are not. Gradients flow to anchors and positives. Memory is linear in all rows.

    Args:
        anchors, positives: ``(B, D)``.
        queue: ``(K, D)``, receives no gradient.
        temperature: a positive number.

    Returns:
        The loss in the dtype of the anchors; float32 or float64 under autocast.
    """
    a, p = unit_rows(anchors), unit_rows(positives)
    negative = queue_log_sums(a, queue, temperature, normalize=False)
    apart = negative - (a * p).sum(-1) / temperature
    # LSE(n, p) - p, without cancellation or overflow
    return narrow(torch.logaddexp(apart, torch.zeros_like(apart)).mean(), anchors)


def unit_rows(x):
    """Normalise the rows of ``x``, in float32 or float64."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
