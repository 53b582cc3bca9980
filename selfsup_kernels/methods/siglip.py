"""SigLIP: language-image training with a sigmoid loss."""

from torch import nn

from selfsup_kernels.core.hints import explained
from selfsup_kernels.methods._views import require_modules
from selfsup_kernels.siglip.module import SigLIPLoss


class SigLIP(nn.Module):
    r"""SigLIP (arXiv:2303.15343) for pairs of samples, such as images and their texts.

    Each side has its own tower, and the rows :math:`x_i` and :math:`y_j` are the normalised embeddings. Every image
    with every text of the batch is one binary decision, with :math:`p_{ij} = 1` for the pairs :math:`i = j`, else -1
    (section 3.2 of the paper):

    .. math:: L = -\frac{1}{B} \sum_i \sum_j \log \sigma\big(p_{ij} (s \langle x_i, y_j \rangle + b)\big)

    Departures: ``duplicates``, which the paper lacks. The sign of the bias is that of the paper's Algorithm 1; its
    equation has the opposite one. Optimizer, schedule and weight decay are left to the training script.

    Args:
        image_tower, text_tower: modules that return ``(B, D)``. Nothing depends on the kind of data: any two modules
            whose embeddings have one width will do.
        scale, bias: s and b; the initial values if they are learnable.
        learnable, eps, group, impl: as in :class:`selfsup_kernels.SigLIPLoss`. With ``group`` the negatives come from
            all its processes.

    Attributes:
        image_tower, text_tower: as given.
        loss: the :class:`selfsup_kernels.SigLIPLoss`, whose ``logit_scale`` and ``logit_bias`` are parameters. Exclude
            them from weight decay.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> method = sk.methods.SigLIP(nn.Linear(64, 16), nn.Linear(48, 16))
        >>> images, texts = torch.randn(256, 64), torch.randn(256, 48)
        >>> method(images, texts).backward()
    """

    @explained("SigLIP(image_tower, text_tower)")
    def __init__(
        self,
        image_tower,
        text_tower,
        *,
        scale=10.0,
        bias=-10.0,
        learnable=True,
        eps=1e-12,
        group=None,
        impl="auto",
    ):
        super().__init__()
        require_modules(image_tower=image_tower, text_tower=text_tower)
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.loss = SigLIPLoss(scale, bias, learnable=learnable, eps=eps, group=group, impl=impl)

    def embed_image(self, x):
        """Return the ``(B, D)`` embeddings of images, not normalised."""
        return self.image_tower(x)

    def embed_text(self, x):
        """Return the ``(B, D)`` embeddings of texts, not normalised."""
        return self.text_tower(x)

    def forward(self, images, texts, duplicates=None):
        """Return the loss of a batch of pairs.

        Args:
            images, texts: the inputs of the towers; sample i of both is one pair.
            duplicates: ``(B,)`` integers. Pairs that share one, such as two with the same caption, are no negatives of
                each other.

        Raises:
            ValueError, TypeError: the embeddings, which messages call x (images) and y (texts), or duplicates do not
                fit.
        """
        return self.loss(self.embed_image(images), self.embed_text(texts), duplicates)
