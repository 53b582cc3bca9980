"""BYOL and N-view contrast, trained together."""

import math

import torch

from selfsup_kernels.byol.api import byol_loss
from selfsup_kernels.core import backends
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.core.processes import global_mean, resolve
from selfsup_kernels.info_nce.module import InfoNCELoss
from selfsup_kernels.methods._views import collect_views
from selfsup_kernels.methods.byol import BYOL


class BYOLContrast(BYOL):
    r"""Weighted sum of BYOL and N-view contrast, with one forward of the online network per view.

    With online projections :math:`z_v = g(f(x_v))`, predictions :math:`p_v = q(z_v)` and the target network's
    projections :math:`t_v = g_\xi(f_\xi(x_v))`,

    .. math:: L = w_b \operatorname{mean}_{u \ne v} \bigl(2 - 2 \cos(p_u, \operatorname{sg}(t_v))\bigr)
        + w_c \, \mathrm{InfoNCE}(z_1, \dots, z_V)

    where the first mean (arXiv:2006.07733, eq. 2) is also over the batch, and InfoNCE is one of the objectives of
    :func:`selfsup_kernels.info_nce_loss` (by default CMC's full graph, arXiv:1906.05849). Weights (1, 0) give
    :class:`BYOL`, weights (0, 1) give :class:`CMC` with one encoder. Call :meth:`update_target` after the optimizer's
    step, as for BYOL.

    No paper defines this sum. BYOL contributes the predictor, the target and its momentum; CMC contributes the contrast
    of every view with every other view. The contrast uses the projections, not the predictions: only BYOL's regression
    uses the predictor. :class:`BYOL` and :class:`CMC` list the departures from their papers.

    Args:
        encoder, projector, predictor, momentum: as in :class:`BYOL`.
        temperature: the temperature of the contrast; the initial value if it is learnable.
        byol_weight, contrast_weight: :math:`w_b` and :math:`w_c`, numbers >= 0. They are plain attributes: a schedule
            may change them between steps.
        objective, core_view, learnable_temperature, max_scale, group: for the contrast, as in
            :class:`selfsup_kernels.InfoNCELoss`. With ``group`` the negatives come from all its processes, and both
            losses are means over all their samples.
        buffers, stochastic_rounding, eps: as in :class:`BYOL`.
        impl: as in :func:`selfsup_kernels.info_nce_loss`; the losses or the average use ``"auto"`` if they lack it.

    Attributes:
        parts: after a forward, ``{"byol": ..., "contrast": ...}``: both losses, unweighted and detached, for logging.
        contrast: the :class:`selfsup_kernels.InfoNCELoss`.
        online, predictor, target, loss: as in :class:`BYOL`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> method = sk.methods.BYOLContrast(nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 16))
        >>> x1, x2, x3 = torch.randn(3, 256, 64)
        >>> method(x1, x2, x3).backward()
        >>> sorted(method.parts)
        ['byol', 'contrast']
    """

    @explained("BYOLContrast(encoder, projector, predictor)")
    def __init__(
        self,
        encoder,
        projector,
        predictor,
        momentum=0.996,
        temperature=0.1,
        *,
        byol_weight=1.0,
        contrast_weight=1.0,
        objective="cross_view",
        core_view=None,
        learnable_temperature=False,
        max_scale=None,
        buffers="copy",
        stochastic_rounding=False,
        eps=1e-12,
        group=None,
        impl="auto",
    ):
        super().__init__(
            encoder,
            projector,
            predictor,
            momentum,
            buffers=buffers,
            stochastic_rounding=stochastic_rounding,
            eps=eps,
            impl=backends.or_auto(impl, "byol"),
        )
        self.contrast = InfoNCELoss(
            temperature,
            learnable_temperature=learnable_temperature,
            max_scale=max_scale,
            objective=objective,
            core_view=core_view,
            eps=eps,
            group=group,
            impl=backends.or_auto(impl, "info_nce"),
        )
        self.byol_weight = _weight("byol_weight", byol_weight)
        self.contrast_weight = _weight("contrast_weight", contrast_weight)
        if self.byol_weight == self.contrast_weight == 0:
            raise ValueError("byol_weight, contrast_weight: expected one of them above 0, got 0 and 0")
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, *views):
        """Return the weighted loss of two or more views: ``forward(x1, x2, ...)`` or ``forward([x1, x2, ...])``.

        Raises:
            ValueError: there are fewer than two views, or the networks' outputs do not match in shape.
        """
        views = collect_views(views)
        projections = [self.online(x) for x in views]
        predictions = [self.predictor(z) for z in projections]
        with torch.no_grad():
            targets = [self.target(x) for x in views]
        byol, contrast = self._byol(predictions, targets), self.contrast(projections)
        self.parts = {"byol": byol.detach(), "contrast": contrast.detach()}
        return self.byol_weight * byol + self.contrast_weight * contrast

    def _byol(self, predictions, targets):
        group = resolve(self.contrast.group)
        if group is None:
            return self.loss(predictions, targets)
        each = byol_loss(predictions, targets, eps=self.loss.eps, reduction="none", impl=self.loss.impl)
        return global_mean(each, group)

    def extra_repr(self):
        return f"byol_weight={self.byol_weight:g}, contrast_weight={self.contrast_weight:g}"


def _weight(name, value) -> float:
    value = check.real(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value
