"""Log-sum-exp of scores against a queue only, without the batch."""

import torch

from selfsup_kernels.info_nce.api import info_nce_loss


def queue_log_sums(rows, queue, temperature, eps=1e-12, impl="auto", normalize=True):
    r"""Return :math:`\log \sum_j \exp(\langle z_a, \mathrm{queue}_j \rangle / \tau)`, ``(N,)``, float32 or float64.

    All rows get the same label, so no row is a negative of another. ``decoupled`` is then this sum minus the mean score
    with the other rows, which is added back in linear time.

    Args:
        rows: ``(N, D)`` unit rows.
        queue: ``(K, D)``, normalised here unless ``normalize`` is False; receives no gradient.
    """
    count = len(rows)
    if count == 1:  # the loss of a row without another one of its class is zero
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
