"""BYOL: bootstrap your own latent."""

from collections import OrderedDict

import torch
from torch import nn

from selfsup_kernels.byol.module import BYOLLoss
from selfsup_kernels.core import backends
from selfsup_kernels.core.hints import explained
from selfsup_kernels.ema.module import EMA
from selfsup_kernels.methods._views import collect_views, require_modules


class BYOL(nn.Module):
    r"""BYOL (arXiv:2006.07733) over two or more views.

    From each view :math:`u`, the online network :math:`q(g(f(x)))` (predictor, projector, encoder) predicts the target
    network's projection :math:`g_\xi(f_\xi(x))` of every other view :math:`v`:

    .. math:: L = \operatorname{mean}_{u \ne v} \; 2 - 2 \cos(p_u, \operatorname{sg}(t_v))

    averaged over the batch (eq. 2 of the paper, symmetrised). The target holds moving averages of encoder *and*
    projector (eq. 1) and receives no gradient.

    A training step::

        loss = method(x1, x2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_target(sk.cosine_momentum(step, max_steps))

    ``parameters()`` can go to an optimizer as it is: the target's parameters do not require grad. The target follows
    ``train()`` and ``eval()`` like any submodule; in training mode its BatchNorm layers use the statistics of the
    batch, as in the paper.

    Departures: the loss is the mean over ordered pairs of views, while the paper adds its two terms (twice the value
    for two views); more than two views are allowed. In the authors' code the target keeps its own running statistics,
    which is ``buffers="ignore"``; by default they are copied from the online network. LARS, and excluding biases and
    BatchNorm from weight decay and adaptation, is the optimizer's task.

    Args:
        encoder, projector, predictor: modules; the encoder's output feeds the projector, whose ``(B, D)`` output feeds
            the predictor, whose output is ``(B, D)`` too.
        momentum: the default momentum of :meth:`update_target`.
        buffers, stochastic_rounding: for the target, as in :class:`selfsup_kernels.EMA`.
        eps, impl: as in :func:`selfsup_kernels.byol_loss`.

    Attributes:
        online: encoder and projector.
        predictor: the predictor.
        target: the :class:`selfsup_kernels.EMA` of ``online``.

    Example:
        >>> method = sk.methods.BYOL(nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 16))
        >>> x1, x2 = torch.randn(2, 256, 64)
        >>> method(x1, x2).backward()
        >>> method.update_target()                        # after the optimizer's step
    """

    @explained("BYOL(encoder, projector, predictor)")
    def __init__(
        self,
        encoder,
        projector,
        predictor,
        momentum=0.996,
        *,
        buffers="copy",
        stochastic_rounding=False,
        eps=1e-12,
        impl="auto",
    ):
        super().__init__()
        require_modules(encoder=encoder, projector=projector, predictor=predictor)
        self.online = nn.Sequential(OrderedDict(encoder=encoder, projector=projector))
        self.predictor = predictor
        self.target = EMA(
            self.online,
            momentum,
            buffers=buffers,
            stochastic_rounding=stochastic_rounding,
            impl=backends.or_auto(impl, "ema_update_"),
        )
        self.loss = BYOLLoss(eps=eps, impl=impl)

    @property
    def encoder(self) -> nn.Module:
        """The online encoder, which is kept after training."""
        return self.online.encoder

    @property
    def projector(self) -> nn.Module:
        return self.online.projector

    def forward(self, *views):
        """Return the loss of two or more views of a batch: ``forward(x1, x2, ...)`` or ``forward([x1, x2, ...])``.

        Raises:
            ValueError: there are fewer than two views, or the networks' outputs do not match in shape.
        """
        views = collect_views(views)
        predictions = [self.predictor(self.online(x)) for x in views]
        with torch.no_grad():
            targets = [self.target(x) for x in views]
        return self.loss(predictions, targets)

    def update_target(self, momentum=None):
        """Move the target towards the online network; call this after the optimizer's step.

        Args:
            momentum: a number in [0, 1] or a 0-dim tensor; None for the one given at construction.
        """
        self.target.update(momentum)
