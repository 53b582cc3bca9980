"""CMC: contrastive multiview coding."""

from collections.abc import Sequence

from torch import nn

from selfsup_kernels.core.hints import explained
from selfsup_kernels.info_nce.module import InfoNCELoss
from selfsup_kernels.methods._views import collect_views


class CMC(nn.Module):
    r"""Contrastive multiview coding (arXiv:1906.05849) over two or more views.

    Every view :math:`v` is encoded, :math:`z_v = g_v(f_v(x_v))`, normalised, and contrasted with every other view
    within the batch (the paper's full graph, or its core view graph with ``core_view``):

    .. math:: L = \operatorname{mean}_{u \ne v, a}
        -\log \frac{\exp(\langle z_{u,a}, z_{v,a} \rangle / \tau)}{\sum_b \exp(\langle z_{u,a}, z_{v,b} \rangle / \tau)}

    Two views with one encoder each give CLIP's loss. With other objectives an anchor's views share a denominator.

    Departures: the loss is the mean over ordered pairs of views, while the paper adds them. The negatives are the other
    samples of the batch, while the paper draws them from a memory bank for NCE.

    Args:
        encoder: one module for all views, or a sequence of one per view.
        projector: one module or one per view, independently of ``encoder``; ``nn.Identity()`` for none. Its output is
            ``(B, D)``.
        temperature: :math:`\tau`; the initial value if it is learnable.
        objective, core_view, learnable_temperature, max_scale, eps, group, impl: as in
            :class:`selfsup_kernels.InfoNCELoss`. With ``group`` the negatives come from all its processes.

    Attributes:
        encoder, projector: a module, or an ``nn.ModuleList`` of one per view.
        loss: the :class:`selfsup_kernels.InfoNCELoss`.

    Example:
        >>> method = sk.methods.CMC([nn.Linear(64, 32), nn.Linear(48, 32)], nn.Linear(32, 16))
        >>> image, depth = torch.randn(256, 64), torch.randn(256, 48)
        >>> method(image, depth).backward()
    """

    @explained("CMC(encoder, projector)")
    def __init__(
        self,
        encoder,
        projector,
        temperature=0.07,
        *,
        objective="cross_view",
        core_view=None,
        learnable_temperature=False,
        max_scale=None,
        eps=1e-12,
        group=None,
        impl="auto",
    ):
        super().__init__()
        self.encoder = _shared_or_per_view("encoder", encoder)
        self.projector = _shared_or_per_view("projector", projector)
        counts = {len(m) for m in (self.encoder, self.projector) if isinstance(m, nn.ModuleList)}
        if len(counts) > 1:
            raise ValueError(f"projector: expected as many as encoders, {len(self.encoder)}, got {len(self.projector)}")
        self.num_views = counts.pop() if counts else None
        self.loss = InfoNCELoss(
            temperature,
            learnable_temperature=learnable_temperature,
            max_scale=max_scale,
            objective=objective,
            core_view=core_view,
            eps=eps,
            group=group,
            impl=impl,
        )

    def embed(self, x, view=0):
        """Return the ``(B, D)`` embeddings of one view's inputs, not normalised."""
        return _of_view(self.projector, view)(_of_view(self.encoder, view)(x))

    def forward(self, *views, labels=None, duplicates=None, logq=None):
        """Return the loss of two or more views of a batch: ``forward([x1, x2, ...])`` or ``forward(x1, x2, ...)``.

        Args:
            views: the inputs of the encoders.
            labels: ``(B,)`` integers. Samples that share one are positives of each other and never negatives; the
                default objective is then UniCL's. Not for ``pairwise``, nor with ``core_view``.
            duplicates: ``(B,)`` integers. Samples that share one, such as the same caption, are not negatives of each
                other.
            logq: ``(B,)`` or ``(V, B)``, the logarithms of the samples' probabilities.

        Raises:
            ValueError: there are fewer than two views, their number differs from that of the encoders, the embeddings
                differ in shape, or labels do not go with the objective.
        """
        views = collect_views(views)
        if self.num_views is not None and len(views) != self.num_views:
            raise ValueError(f"views: expected {self.num_views}, one per encoder or projector, got {len(views)}")
        embeddings = [self.embed(x, v) for v, x in enumerate(views)]
        given = {"labels": labels, "duplicates": duplicates, "logq": logq}
        # A loss that a user put in the place of ours need not take all of them.
        return self.loss(embeddings, **{name: value for name, value in given.items() if value is not None})


def _shared_or_per_view(name, value) -> nn.Module:
    if isinstance(value, nn.ModuleList) or (isinstance(value, Sequence) and not isinstance(value, str)):
        if len(value) < 2:
            raise ValueError(f"{name}: expected a module, or one per view for at least 2 views, got {len(value)}")
        for i, module in enumerate(value):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}[{i}]: expected an nn.Module, got {type(module).__name__}")
        return nn.ModuleList(value)
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module or one per view, got {type(value).__name__}")
    return value


def _of_view(module, view):
    return module[view] if isinstance(module, nn.ModuleList) else module
