"""Contrast of each row with one positive and a queue, and with nothing else of its batch: MoCo's loss."""

import torch
import torch.nn.functional as F

from selfsup_kernels.compat._common import narrow
from selfsup_kernels.info_nce.queue import queue_log_sums


def queue_contrast_loss(anchors, positives, queue, temperature):
    r"""``mean_i [ log(exp(P_i) + sum_j exp(S_ij)) - P_i ]`` over the queue's rows j (MoCo, arXiv:1911.05722, eq. 1).

    Scores are inner products with normalised anchors and positives over ``temperature``; the queue's rows are taken as
    they are. Gradients flow to anchors and positives. Memory is
    linear in all rows.

    Args:
        anchors, positives: ``(B, D)``.
        queue: ``(K, D)``, no gradient.
        temperature: a positive number.

    Returns:
        The loss in the dtype of the anchors; in float32 at least under autocast.
    """
    a, p = unit_rows(anchors), unit_rows(positives)
    negative = queue_log_sums(a, queue, temperature, normalize=False)
    apart = negative - (a * p).sum(-1) / temperature
    # LSE(n, p) - p, without cancellation and without overflow
    return narrow(torch.logaddexp(apart, torch.zeros_like(apart)).mean(), anchors)


def unit_rows(x):
    """``x`` with normalised rows, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
