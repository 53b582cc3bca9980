"""Contrast of each row with one positive and a queue, and with nothing else of its batch: MoCo's loss."""

import torch
import torch.nn.functional as F

from selfsup_kernels.compat._common import narrow, wide_loss


def queue_contrast_loss(anchors, positives, queue, temperature):
    r"""``mean_i [ log(exp(P_i) + sum_j exp(S_ij)) - P_i ]`` over the queue's rows j (MoCo, arXiv:1911.05722, eq. 1).

    Scores are cosines over ``temperature``, for the queue too. Gradients flow to anchors and positives. Memory is
    linear in all rows.

    Args:
        anchors, positives: ``(B, D)``.
        queue: ``(K, D)``, no gradient.
        temperature: a positive number.

    Returns:
        The loss in the dtype of the anchors; in float32 at least under autocast.
    """
    a, p = unit_rows(anchors), unit_rows(positives)
    negative = _queue_logsumexp(anchors, a, queue, temperature)
    # LSE(n, p) - p, without cancellation
    return narrow(F.softplus(negative - (a * p).sum(-1) / temperature, threshold=700).mean(), anchors)


def _queue_logsumexp(anchors, unit, queue, temperature):
    """(B,) log-sum-exp of each anchor's scores with the queue.

    In a batch of one class nothing is a negative but the queue; an anchor's loss is then LSE(queue) minus the mean of
    its scores with the other anchors, which the class' sum gives in linear time.
    """
    count = len(anchors) - 1
    if count == 0:
        return (unit * unit_rows(queue).to(unit)).sum(-1).div(temperature).logsumexp(0, keepdim=True)
    one_class = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    losses = wide_loss(
        [anchors],
        temperature=temperature,
        objective="decoupled",
        labels=one_class,
        queue=queue.to(anchors.dtype),
        reduction="none",
    )[0]
    others = unit.sum(0) - unit
    return losses + (unit * others).sum(-1) / (count * temperature)


def unit_rows(x):
    """``x`` with normalised rows, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
