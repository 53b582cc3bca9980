"""Scores with a queue, and with nothing of the batch."""

import torch

from selfsup_kernels.info_nce.api import info_nce_loss


def queue_log_sums(rows, queue, temperature, eps=1e-12, impl="auto", normalize=True):
    r""":math:`\log \sum_j \exp(\langle z_a, \mathrm{queue}_j \rangle / \tau)`, ``(N,)``, in float32 at least.

    All rows carry one label: none of them is another's negative then, and ``decoupled`` is this sum minus the mean
    score with the other rows, which is linear work to put back.

    Args:
        rows: ``(N, D)`` unit rows.
        queue: ``(K, D)``, normalised here unless ``normalize`` is False; no gradient.
    """
    count = len(rows)
    if count == 1:  # a row needs another one of its class, or its loss counts as zero
        rows = torch.cat([rows, rows.detach()])
    apart = info_nce_loss(
        [rows],
        temperature=temperature,
        objective="decoupled",
        labels=torch.zeros(len(rows), dtype=torch.int64, device=rows.device),
        queue=queue.to(rows.dtype),
        normalize=normalize,
        eps=eps,
        reduction="none",
        group="local",
        impl=impl,
    )[0]
    mean = (rows * (rows.sum(0) - rows)).sum(-1) / (len(rows) - 1)
    return (apart + mean / temperature)[:count]
