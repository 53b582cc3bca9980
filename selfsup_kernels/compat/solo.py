"""Drop-ins for the loss functions of solo-learn."""

import torch

from selfsup_kernels.byol.api import byol_loss
from selfsup_kernels.compat._common import narrow, unsupported, wide_loss
from selfsup_kernels.compat._processes import every_process
from selfsup_kernels.core.processes import gather_rows
from selfsup_kernels.core.validate import pair
from selfsup_kernels.info_nce.api import info_nce_loss

__all__ = ["byol_loss_func", "mocov3_loss_func", "simclr_loss_func"]


def simclr_loss_func(z, indexes, temperature=0.1, extra_pos_mask=None):
    r"""Return solo-learn's SimCLR loss, in either of its two forms.

    ``simclr_loss_func(z, indexes)`` of version 1.0.6, over the rows of all views:

    .. math:: L = \operatorname{mean}_i
        \left[ \log \sum_{j \ne i} e^{S_{ij}} - \log \sum_{p \in P(i)} e^{S_{ip}} \right]

    where :math:`P(i)` is the set of other rows with the index of :math:`i`. This is SupCon's L_in (arXiv:2004.11362,
    eq. 3) minus the logarithm of the number of positives; for two views and one index per sample it is SimCLR's loss
    (arXiv:2002.05709). With several processes (``torch.distributed`` initialised) the rows of all processes are
    negatives and positives, and the loss is the mean over the process' own rows, with gradients to all, as in the
    original.

    ``simclr_loss_func(z1, z2)`` of version 1.0.2: SimCLR's loss of two views, with this process' rows only.

    Args:
        z: ``(rows, D)``, normalised here; or z1, ``(B, D)``.
        indexes: ``(rows,)`` integers; or z2, ``(B, D)``.
        temperature: a number > 0.
        extra_pos_mask: an argument of the second form; must be None.

    An index of only one row makes the loss infinite, as in the original.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``extra_pos_mask`` is given.

    Example:
        >>> from selfsup_kernels.compat.solo import simclr_loss_func
        >>> z, indexes = torch.randn(512, 128), torch.arange(256).repeat(2)
        >>> simclr_loss_func(z, indexes, temperature=0.1).shape
        torch.Size([])
    """
    if extra_pos_mask is not None:
        raise unsupported(
            "solo.losses.simclr_loss_func", "extra_pos_mask", "pass indexes, where equal ones mark positives"
        )
    if not isinstance(indexes, torch.Tensor):
        raise TypeError(f"indexes: expected a tensor of integers, or z2, got {type(indexes).__name__}")
    if indexes.is_floating_point():
        pair("z1", z, "z2", indexes)
        if len(z) == 1:  # no negatives
            return 0 * (z + indexes).sum()
        return info_nce_loss([z, indexes], temperature=temperature, group="local")
    if not isinstance(z, torch.Tensor) or z.dim() != 2:
        raise ValueError(f"z: expected a (rows, D) tensor, got {tuple(z.shape) if hasattr(z, 'shape') else type(z)}")
    group = every_process()
    loss = wide_loss([z], temperature=temperature, objective="supcon_in", labels=indexes, reduction="none", group=group)
    every = gather_rows(indexes[:, None], group)[:, 0]
    _, place, members = torch.unique(every, return_inverse=True, return_counts=True)
    rank = 0 if group is None else torch.distributed.get_rank()
    positives = (members - 1)[place[rank * len(indexes) : (rank + 1) * len(indexes)]]
    return narrow(loss.mean() - positives.to(loss.dtype).log().mean(), z)


def byol_loss_func(p, z, simplified=True):
    r"""Return solo-learn's BYOL loss (arXiv:2006.07733, eq. 2): the mean of :math:`2 - 2 \cos(p_a, z_a)` over the rows.

    Args:
        p: ``(B, D)`` predictions.
        z: ``(B, D)`` targets, which receive no gradient.
        simplified: True for a norm floor of 1e-8 as in ``cosine_similarity``, False for 1e-12 as in ``F.normalize``.

    Example:
        >>> from selfsup_kernels.compat.solo import byol_loss_func
        >>> byol_loss_func(torch.randn(256, 128), torch.randn(256, 128)).shape
        torch.Size([])
    """
    pair("p", p, "z", z)
    return byol_loss(p, z, eps=1e-8 if simplified else 1e-12)


def mocov3_loss_func(query, key, temperature=0.2):
    r"""Return solo-learn's MoCo v3 loss (arXiv:2104.02057, algorithm 1), only of queries against keys:

    .. math:: L = 2 \tau \operatorname{mean}_a \left[ \log \sum_b e^{S_{ab}} - S_{aa} \right], \qquad
        S_{ab} = \cos(q_a, k_b) / \tau

    With several processes the keys of all processes are negatives. The keys receive no gradient.

    Args:
        query, key: ``(B, D)``, normalised here.
        temperature: a number > 0.

    Example:
        >>> from selfsup_kernels.compat.solo import mocov3_loss_func
        >>> mocov3_loss_func(torch.randn(256, 128), torch.randn(256, 128), temperature=0.2).shape
        torch.Size([])
    """
    pair("query", query, "key", key)
    group = every_process()
    if len(query) == 1 and group is None:  # no negatives
        return 0 * query.sum()
    loss = wide_loss(
        [query, key.detach()],
        temperature=temperature,
        objective="cross_view",
        reduction="none",
        group=group,
    )
    return narrow(2 * temperature * loss[0].mean(), query)
