"""SimCLR: a simple framework for contrastive learning."""

from torch import nn

from selfsup_kernels.core.hints import explained
from selfsup_kernels.info_nce.module import InfoNCELoss
from selfsup_kernels.methods._views import collect_views, require_modules


class SimCLR(nn.Module):
    r"""SimCLR (arXiv:2002.05709) over two or more views.

    The same network encodes and projects every view, :math:`z_v = g(f(x_v))`, and the rows are normalised. The loss is
    NT-Xent (eq. 1 of the paper): every row is an anchor once, its positive is the same sample's row in the other view,
    and its negatives are the rows of all other samples in both views:

    .. math:: L = \operatorname{mean}_{i} -\log \frac{\exp(\langle z_i, z_{p(i)} \rangle / \tau)}
        {\sum_{k \ne i} \exp(\langle z_i, z_k \rangle / \tau)}

    Departures: more than two views are allowed, which the paper does not define. ``objective`` selects the extension:
    with ``"supcon_out"`` the positives of an anchor share a denominator, ``"pairwise"`` is the mean of the two-view
    losses. For two views both equal the paper's loss. LARS, the augmentations and BatchNorm over all devices
    (``nn.SyncBatchNorm``) are left to the training script.

    Args:
        encoder, projector: modules; the projector's output is ``(B, D)``.
        temperature: :math:`\tau`; the initial value if it is learnable.
        objective, learnable_temperature, max_scale, eps, group, impl: as in :class:`selfsup_kernels.InfoNCELoss`. With
            ``group`` the negatives come from all its processes.

    Attributes:
        encoder, projector: as given.
        loss: the :class:`selfsup_kernels.InfoNCELoss`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> method = sk.methods.SimCLR(nn.Linear(64, 32), nn.Linear(32, 16), temperature=0.5)
        >>> x1, x2 = torch.randn(2, 256, 64)
        >>> method(x1, x2).backward()
    """

    @explained("SimCLR(encoder, projector)")
    def __init__(
        self,
        encoder,
        projector,
        temperature=0.5,
        *,
        objective="supcon_out",
        learnable_temperature=False,
        max_scale=None,
        eps=1e-12,
        group=None,
        impl="auto",
    ):
        super().__init__()
        require_modules(encoder=encoder, projector=projector)
        self.encoder = encoder
        self.projector = projector
        self.loss = InfoNCELoss(
            temperature,
            learnable_temperature=learnable_temperature,
            max_scale=max_scale,
            objective=objective,
            eps=eps,
            group=group,
            impl=impl,
        )

    def embed(self, x):
        """Return the ``(B, D)`` embeddings of one view's inputs, not normalised."""
        return self.projector(self.encoder(x))

    def forward(self, *views):
        """Return the loss of two or more views of a batch: ``forward(x1, x2, ...)`` or ``forward([x1, x2, ...])``.

        Raises:
            ValueError: there are fewer than two views, or the embeddings differ in shape.
        """
        return self.loss([self.embed(x) for x in collect_views(views)])
