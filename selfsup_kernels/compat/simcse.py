"""SimCSE's objectives (arXiv:2104.08821) on embeddings, as ``simcse.models`` computes them from its encoder."""

import torch

from selfsup_kernels.compat._common import narrow, unsupported
from selfsup_kernels.compat._one_way import OneWay
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.processes import resolve
from selfsup_kernels.core.validate import pair

__all__ = ["supervised_loss", "unsupervised_loss"]

_EPS = 1e-8  # torch.nn.CosineSimilarity's


def unsupervised_loss(z1, z2, temperature=0.05, *, group=None):
    r"""Return SimCSE's unsupervised objective (arXiv:2104.08821, eq. 1; one direction):

    .. math:: L = \operatorname{mean}_a \left[ \log \sum_b e^{\cos(z_{1,a}, z_{2,b}) / \tau} -
        \cos(z_{1,a}, z_{2,a}) / \tau \right]

    Args:
        z1, z2: ``(B, D)``: two encodings of the same sentences; in the supervised setting sentences and sentences that
            they entail.
        temperature: :math:`\tau`, a number.
        group: a process group that provides the negatives. The result is then the mean over this process' own
            sentences, with gradients to all. For batches of equal size, DistributedDataParallel's average is the
            gradient of one process with the whole batch. In SimCSE's own code every process evaluates the loss of the
            whole batch and passes no gradient to other processes' embeddings: its gradients are too small by a factor
            of the number of processes.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> from selfsup_kernels.compat.simcse import unsupervised_loss
        >>> z1, z2 = torch.randn(2, 256, 128)             # the same sentences, encoded twice
        >>> unsupervised_loss(z1, z2, temperature=0.05).shape
        torch.Size([])
    """
    pair("z1", z1, "z2", z2)
    way = OneWay(1 / check.positive_number("temperature", temperature), True, _EPS, resolve(group))
    return narrow(way.losses(z1, z2)[0].mean(), z1)


def supervised_loss(z1, z2, z3, temperature=0.05, hard_negative_weight=0.0, *, group=None):
    r"""Return SimCSE's supervised objective (arXiv:2104.08821, eq. 5), with a hard negative for each sentence:

    .. math:: L = \operatorname{mean}_a \left[ \log \sum_b \left( e^{\cos(z_{1,a}, z_{2,b}) / \tau} +
        e^{\cos(z_{1,a}, z_{3,b}) / \tau + w [a = b]} \right) - \cos(z_{1,a}, z_{2,a}) / \tau \right]

    Args:
        z1, z2: ``(B, D)``: sentences and sentences that they entail.
        z3: ``(B, D)``: contradicting sentences, which receive gradients too.
        temperature: :math:`\tau`, a number.
        hard_negative_weight: :math:`w`, added to the score of a sentence's own hard negative; the logarithm of the
            paper's :math:`\alpha` (appendix).
        group: as in :func:`unsupervised_loss`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: the weight is below -40.

    Example:
        >>> from selfsup_kernels.compat.simcse import supervised_loss
        >>> sentences, entailed, contradicting = torch.randn(3, 256, 128)
        >>> supervised_loss(sentences, entailed, contradicting).shape
        torch.Size([])
    """
    pair("z1", z1, "z2", z2)
    pair("z1", z1, "z3", z3)
    way = OneWay(1 / check.positive_number("temperature", temperature), True, _EPS, resolve(group))
    first = way.losses(z1, z2)[0]
    positive, own = way.own(z1, z2), way.own(z1, z3)
    if hard_negative_weight == 0:
        hard = way.losses(z1, z3)[0] + own
    else:
        if hard_negative_weight < -40:
            raise unsupported(
                "SimCSE's supervised objective", f"hard_negative_weight={hard_negative_weight}", "it takes -40 or more"
            )
        hard = torch.logaddexp(way.others(z1, z3), own + hard_negative_weight)
    return narrow(torch.logaddexp(first, hard - positive).mean(), z1)
