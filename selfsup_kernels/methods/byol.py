"""BYOL: bootstrap your own latent."""

from collections import OrderedDict

import torch
from torch import nn

from selfsup_kernels.byol.module import BYOLLoss
from selfsup_kernels.core import backends
from selfsup_kernels.ema.module import EMA
from selfsup_kernels.methods._views import collect_views, require_modules


class BYOL(nn.Module):
    r"""BYOL (arXiv:2006.07733) over two or more views.

    The online network :math:`q(g(f(x)))` (predictor, projector, encoder) predicts, for each view :math:`u`, the target
    network's projection :math:`g_\xi(f_\xi(x))` of every other view :math:`v`:

    .. math:: L = \operatorname{mean}_{u \ne v} \; 2 - 2 \cos(p_u, \operatorname{sg}(t_v))

    over the batch (eq. 2 of the paper, symmetrised). The target holds moving averages of encoder *and* projector
    (eq. 1) and never receives a gradient.

    What a training step does::

        loss = method(x1, x2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_target(sk.cosine_momentum(step, max_steps))

    ``parameters()`` can be handed to an optimizer as it is: the target's do not require grad. In training mode the
    target's BatchNorm layers use the statistics of its batch, as in the paper, so that it follows ``train()`` and
    ``eval()`` like any other submodule.

    Departures: the loss is the mean over the ordered pairs of views where the paper adds up the two (half of its value
    for two views), and more than two views are allowed. In the authors' code the target keeps running statistics of
    its own, which is ``buffers="ignore"``; by default they are copied from the online network. LARS, and leaving
    biases and BatchNorm out of weight decay and adaptation, is for the optimizer.

    Args:
        encoder, projector, predictor: modules; the encoder's output feeds the projector, whose output, ``(B, D)``,
            feeds the predictor, whose output is ``(B, D)`` again.
        momentum: of :meth:`update_target` calls that do not give their own.
        buffers, stochastic_rounding: of the target, as in :class:`selfsup_kernels.EMA`.
        eps, impl: as in :func:`selfsup_kernels.byol_loss`.

    Attributes:
        online: encoder and projector.
        predictor: the predictor.
        target: the :class:`selfsup_kernels.EMA` of ``online``.
    """

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
        """The online encoder: what is kept after training."""
        return self.online.encoder

    @property
    def projector(self) -> nn.Module:
        return self.online.projector

    def forward(self, *views):
        """The loss of two or more views of one batch, ``forward(x1, x2, ...)`` or ``forward([x1, x2, ...])``.

        Raises:
            ValueError: fewer than two views, or outputs of the networks that do not fit each other.
        """
        views = collect_views(views)
        predictions = [self.predictor(self.online(x)) for x in views]
        with torch.no_grad():
            targets = [self.target(x) for x in views]
        return self.loss(predictions, targets)

    def update_target(self, momentum=None):
        """Move the target towards the online network; call it after the optimizer's step.

        Args:
            momentum: a number in [0, 1] or a 0-dim tensor; None for the one given at construction.
        """
        self.target.update(momentum)
