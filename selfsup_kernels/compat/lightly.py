"""Drop-ins for lightly 1.6.0: ``lightly.loss`` and ``lightly.models.utils.update_momentum``."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from selfsup_kernels.byol.api import byol_loss
from selfsup_kernels.compat._common import DropIn, altered, is_from, narrow, unsupported, wide_loss
from selfsup_kernels.compat._processes import every_process
from selfsup_kernels.compat._queue import queue_contrast_loss, unit_rows
from selfsup_kernels.core.processes import gather_rows
from selfsup_kernels.core.validate import pair
from selfsup_kernels.ema.api import ema_update_pairs_

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "MemoryBankModule",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "negative_mises_fisher_weights",
    "update_momentum",
]


class NTXentLoss(DropIn):
    r"""``lightly.loss.NTXentLoss``: NT-Xent (arXiv:2002.05709), or MoCo's loss (arXiv:1911.05722) with a memory bank.

    Without a bank, the loss is the mean over the 2B rows of the cross entropy of each row's positive against all other
    rows: :func:`selfsup_kernels.info_nce_loss` with ``supcon_out``. With a bank, it is the mean over the B rows of
    ``out0`` of the cross entropy of the positive in ``out1`` against the bank; the rest of the batch provides no
    negatives. ``out1`` receives a gradient if it requires one.

    With a bank, a step whose ``out0`` requires grad writes the normalised ``out1`` into the bank after computing the
    loss, starting at ``bank_ptr``. Rows past the bank's end are dropped, and the pointer returns to 0. The bank is not
    part of the state dict, as in the original; ``memory_bank.bank`` and ``memory_bank.bank_ptr`` are its buffers.

    Args:
        temperature: a positive number.
        memory_bank_size: ``(rows, D)``, or 0 for none.
        gather_distributed: take negatives from all processes; each process returns the mean loss of its own anchors.
            With a bank, the rows of all processes enter it.

    Raises:
        ValueError: the temperature is below 1e-8 in magnitude, or the size is invalid; in the forward, shapes do not
            fit.
        RuntimeError: the temperature is negative, which the original allows; in the forward, ``memory_bank`` or
            ``cross_entropy`` is of another kind than the constructor's.

    Example:
        >>> from selfsup_kernels.compat.lightly import NTXentLoss
        >>> NTXentLoss(temperature=0.5)(torch.randn(256, 128), torch.randn(256, 128)).shape
        torch.Size([])
    """

    original = "lightly.loss.NTXentLoss"

    def __init__(self, temperature=0.5, memory_bank_size=0, gather_distributed=False):
        super().__init__()
        self.memory_bank = MemoryBankModule(size=memory_bank_size, gather_distributed=gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss()
        self.eps = 1e-8
        _check_gather(gather_distributed)
        if abs(self.temperature) < self.eps:
            raise ValueError(f"temperature: expected at least 1e-8, got {temperature}")
        _check_ntxent(self)

    def forward(self, out0, out1):
        """Return the loss of two views' ``(B, D)`` projections, which need not be normalised."""
        _check_ntxent(self)
        pair("out0", out0, "out1", out1)
        if self.memory_bank.size[0] == 0:
            group = every_process() if self.gather_distributed else None
            if group is None and len(out0) == 1:
                return 0 * (out0.sum() + out1.sum())  # as in the original, without negatives
            return narrow(_two_views(out0, out1, self.temperature, "supcon_out", group), out0)
        loss = queue_contrast_loss(out0, out1, self.memory_bank.bank.to(out0.device), self.temperature)
        if torch.is_grad_enabled() and out0.requires_grad:
            self.memory_bank._dequeue_and_enqueue(F.normalize(out1.detach(), dim=1))
        return loss

    def extra_repr(self):
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"


class MemoryBankModule(nn.Module):
    """lightly's ``MemoryBankModule``: a ring buffer of rows, initially random unit rows.

    Args:
        size: ``(rows, D)``, or 0 for none.
        gather_distributed: the rows of all processes enter the bank.
        feature_dim_first: ``forward`` returns the bank as ``(D, rows)``.

    Raises:
        ValueError: ``size`` is negative, a number of rows without a width, or not a pair.

    Example:
        >>> from selfsup_kernels.compat.lightly import MemoryBankModule
        >>> rows, bank = MemoryBankModule(size=(1024, 128))(torch.randn(256, 128), update=True)
        >>> bank.shape
        torch.Size([128, 1024])
    """

    def __init__(self, size, gather_distributed=False, feature_dim_first=True):
        super().__init__()
        shape = (size,) if isinstance(size, int) else tuple(size)
        if any(x < 0 for x in shape) or not (shape == (0,) or len(shape) == 2):
            raise ValueError(f"memory_bank_size: expected (rows, D), or 0 for no memory bank, got {size}")
        self.size = shape
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(shape), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)
        if len(shape) == 2:
            self._init_memory_bank(size=shape)

    @torch.no_grad()
    def _init_memory_bank(self, size):
        self.bank = F.normalize(torch.randn(size), dim=-1)

    def forward(self, output, labels=None, update=False):
        """Return ``(output, copy of the bank)``, or ``(output, None)`` without a bank; ``update`` stores ``output``."""
        if self.size[0] == 0:
            return output, None
        bank = self.bank.detach().clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.T if self.feature_dim_first else bank

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch):
        if self.gather_distributed:
            batch = gather_rows(batch.detach(), every_process())
        start, rows = int(self.bank_ptr), self.size[0]
        self.bank[start : start + len(batch)] = batch[: rows - start].to(self.bank.dtype)
        self.bank_ptr[0] = 0 if start + len(batch) >= rows else start + len(batch)


class NegativeCosineSimilarity(nn.Module):
    """``lightly.loss.NegativeCosineSimilarity``: minus the mean cosine (SimSiam, arXiv:2011.10566).

    Equals :func:`selfsup_kernels.byol_loss` / 2 - 1. Both arguments receive a gradient if they require one; detach the
    target, as with the original.

    Args:
        dim: the feature dimension.
        eps: the floor of each norm.

    Example:
        >>> from selfsup_kernels.compat.lightly import NegativeCosineSimilarity
        >>> prediction, target = torch.randn(2, 256, 128)
        >>> NegativeCosineSimilarity()(prediction, target.detach()).shape
        torch.Size([])
    """

    def __init__(self, dim=1, eps=1e-8):
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x0, x1):
        """Return the loss of two tensors with shapes that broadcast."""
        for name, x in (("x0", x0), ("x1", x1)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x0.dim() != 2 or self.dim not in (1, -1) or x0.shape != x1.shape or x0.dtype != x1.dtype:
            x0, x1 = _matrices(x0, x1, self.dim)
        if not (x0.requires_grad or x1.requires_grad) or not x1.requires_grad:
            return _one_way(x0, x1, self.eps)
        if not x0.requires_grad:
            return _one_way(x1, x0, self.eps)
        other = _one_way(x1, x0, self.eps)
        return _one_way(x0, x1, self.eps) + (other - other.detach())


def _one_way(x, constant, eps):
    return 0.5 * byol_loss(x, constant, eps=eps) - 1


def _matrices(x0, x1, dim):
    if not torch.is_autocast_enabled(x0.device.type):
        dtype = torch.promote_types(x0.dtype, x1.dtype)
        x0, x1 = x0.to(dtype), x1.to(dtype)
    x0, x1 = (x.movedim(dim, -1) for x in torch.broadcast_tensors(x0, x1))
    return x0.reshape(-1, x0.shape[-1]), x1.reshape(-1, x1.shape[-1])


class DCLLoss(DropIn):
    r"""``lightly.loss.DCLLoss``: decoupled contrastive learning (arXiv:2110.06848, eq. 6).

    The loss is the mean over the 2B rows of :math:`-w P + \operatorname{LSE}(\text{all } N)`: the denominator holds
    both views of all other samples, but not the positive :math:`P`. It is :func:`selfsup_kernels.info_nce_loss` with
    ``decoupled``, plus :math:`(1 - w) P` if there are weights.

    Args:
        temperature: a positive number.
        weight_fn: ``weight_fn(out0, out1)`` takes the normalised rows and returns ``(B,)`` weights :math:`w`; it is
            called once per direction, and gradients flow through it. None for no weights.
        gather_distributed: take negatives from all processes; each process returns the mean loss of its own anchors.

    Raises:
        ValueError: in the forward, shapes do not fit, or there is only one sample and so no negatives, where the
            original returns minus infinity.
        RuntimeError: in the forward, the temperature is negative; at its definition, a subclass overrides ``_loss``.

    Example:
        >>> from selfsup_kernels.compat.lightly import DCLLoss
        >>> DCLLoss(temperature=0.1)(torch.randn(256, 128), torch.randn(256, 128)).shape
        torch.Size([])
    """

    original = "lightly.loss.DCLLoss"
    hooks = ("_loss",)

    def __init__(self, temperature=0.1, weight_fn=None, gather_distributed=False):
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_gather(gather_distributed)

    def forward(self, out0, out1):
        """Return the loss of two views' ``(B, D)`` projections, which need not be normalised."""
        _check_temperature(self, DCLLoss)
        pair("out0", out0, "out1", out1)
        group = every_process() if self.gather_distributed else None
        loss = _two_views(out0, out1, self.temperature, "decoupled", group)
        if not self.weight_fn:
            return narrow(loss, out0)
        z0, z1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        positive = (unit_rows(out0) * unit_rows(out1)).sum(-1) / self.temperature
        w0, w1 = self.weight_fn(z0, z1), self.weight_fn(z1, z0)
        weighted = 0.5 * ((w0 * positive).mean() + (w1 * positive).mean())
        return narrow(loss + positive.mean() - weighted, out0)

    def extra_repr(self):
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"


class DCLWLoss(DCLLoss):
    """``lightly.loss.DCLWLoss``: :class:`DCLLoss` with :func:`negative_mises_fisher_weights`.

    Args:
        temperature: a positive number.
        sigma: the divisor in the softmax of :func:`negative_mises_fisher_weights`.
        gather_distributed: take negatives from all processes; the weights use each process' own batch.

    Example:
        >>> from selfsup_kernels.compat.lightly import DCLWLoss
        >>> DCLWLoss(temperature=0.1, sigma=0.5)(torch.randn(256, 128), torch.randn(256, 128)).shape
        torch.Size([])
    """

    def __init__(self, temperature=0.1, sigma=0.5, gather_distributed=False):
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


def negative_mises_fisher_weights(out0, out1, sigma=0.5):
    r"""Return ``(B,)`` weights :math:`2 - B \operatorname{softmax}(\langle z_0, z_1 \rangle / \sigma)`, detached.

    See arXiv:2110.06848, section 3.2.

    Example:
        >>> from selfsup_kernels.compat.lightly import negative_mises_fisher_weights
        >>> negative_mises_fisher_weights(torch.randn(256, 128), torch.randn(256, 128)).shape
        torch.Size([256])
    """
    similarity = (out0.detach() * out1.detach()).sum(-1) / sigma
    return 2 - len(out0) * F.softmax(similarity, dim=0)


@torch.no_grad()
def update_momentum(model, model_ema, m):
    """``lightly.models.utils.update_momentum``: ``ema <- m ema + (1 - m) model`` for all parameters, in order.

    Buffers are left alone, as in the original: the momentum model's BatchNorm layers keep their own statistics.
    Parameters that share the model's memory after ``load_state_dict(assign=True)`` get their own memory.

    Args:
        model, model_ema: modules whose parameters match in number and shapes.
        m: a number in [0, 1], or a tensor of one element.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`selfsup_kernels.ema_update_`; nothing has changed.

    Example:
        >>> from selfsup_kernels.compat.lightly import update_momentum
        >>> update_momentum(nn.Linear(64, 8), nn.Linear(64, 8), m=0.99)
    """
    ema_update_pairs_(list(model_ema.parameters()), list(model.parameters()), None, m, as_torch=True, own_memory=True)


def _check_ntxent(module):
    _check_temperature(module, NTXentLoss)
    bank, entropy = module.memory_bank, module.cross_entropy
    if not is_from("lightly", type(bank), ["MemoryBankModule"]):
        raise unsupported(NTXentLoss.original, f"memory_bank={type(bank).__name__}")
    if not bank.feature_dim_first:
        raise unsupported(NTXentLoss.original, "memory_bank with feature_dim_first=False")
    plain = type(entropy) is nn.CrossEntropyLoss and entropy.reduction == "mean" and entropy.weight is None
    if not plain or entropy.label_smoothing != 0 or entropy.ignore_index >= 0:
        raise unsupported(NTXentLoss.original, f"cross_entropy={entropy!r}")
    for name, part, library in (("memory_bank", bank, "lightly"), ("cross_entropy", entropy, "torch")):
        if changes := altered(module, part, library):
            raise unsupported(NTXentLoss.original, f"{name} with its own {', '.join(changes)}")


def _check_temperature(module, drop_in):
    if not isinstance(module.temperature, torch.Tensor) and module.temperature < 0:
        raise unsupported(drop_in.original, "a temperature below zero")


def _check_gather(gather_distributed):
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError("gather_distributed: expected False, since this PyTorch was built without torch.distributed")


def _two_views(out0, out1, temperature, objective, group):
    """Return the mean loss of this process' own anchors, in float32 or float64."""
    reduction = "mean" if group is None else "none"
    losses = wide_loss([out0, out1], temperature=temperature, objective=objective, reduction=reduction, group=group)
    return losses if group is None else losses.mean()
