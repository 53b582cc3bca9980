"""Softmax denominators of one direction (queries against documents) from the two-view losses, in linear memory.

``cross_view`` of the views (x, y) gives ``log sum_b exp(S_ab) - S_aa`` per row. A zero upstream gradient for y's
anchors leaves only the direction x -> y. Adding ``S_aa``, one product of rows, gives the logarithm of the sum; the
sums over several blocks of columns add up to the denominator over all of them. No B x B matrix is stored, and the rows
of every block receive their gradient.
"""

import torch
import torch.nn.functional as F

from selfsup_kernels.compat._common import wide_loss


class OneWay:
    """Scores ``scale * <x_a, y_b>`` between columns of embeddings of the same B samples, ``(B, D)`` each.

    Args:
        scale: a number > 0.
        normalize, eps, group: as in :func:`selfsup_kernels.info_nce_loss`.
    """

    def __init__(self, scale, normalize, eps, group=None):
        self.scale, self.normalize, self.eps, self.group = scale, normalize, eps, group

    def losses(self, *views, objective="cross_view", core_view=None):
        """Return (V, B) losses, in float32 or float64.

        A single sample has no negatives: its loss is 0, or -inf for ``decoupled``, whose denominator is then empty.
        """
        if len(views[0]) == 1 and self.group is None:
            nothing = sum(0 * self.own(x, x) for x in views)
            return torch.stack([nothing - (torch.inf if objective == "decoupled" else 0)] * len(views))
        return wide_loss(
            list(views),
            temperature=1 / self.scale,
            objective=objective,
            core_view=core_view,
            normalize=self.normalize,
            eps=self.eps,
            reduction="none",
            group=self.group,
        )

    def own(self, x, y):
        """Return ``S_aa``, (B,)."""
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(wide), y.to(wide)
        if self.normalize:
            x, y = F.normalize(x, dim=-1, eps=self.eps), F.normalize(y, dim=-1, eps=self.eps)
        return self.scale * (x * y).sum(-1)

    def others(self, x, y):
        """Return ``log sum over b != a of exp(S_ab)``, (B,), or -inf where that is below ``S_aa - 87``.

        Float32 cannot represent it there. Callers must add a term of at least ``S_aa - 40``, next to which it vanishes.
        """
        loss = self.losses(x, y)[0]  # log(1 + exp(others - own))
        there = loss > torch.finfo(torch.float32).tiny
        safe = torch.where(there, loss, 1)
        return torch.where(there, safe + (-(-safe).expm1()).log() + self.own(x, y), -torch.inf)
