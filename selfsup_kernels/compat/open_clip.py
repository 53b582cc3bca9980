"""Drop-ins for the losses of open_clip (open_clip_torch)."""

import torch
import torch.nn.functional as F

from selfsup_kernels.compat._common import DropIn, narrow, overridden, unsupported, wide_loss
from selfsup_kernels.compat._gradient import AverageGradient, ScaleGradient
from selfsup_kernels.compat._processes import every_process
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.validate import pair
from selfsup_kernels.info_nce.api import info_nce_loss
from selfsup_kernels.siglip.api import own_rows_loss, siglip_loss

__all__ = ["ClipLoss", "SigLipLoss"]


class ClipLoss(DropIn):
    r"""CLIP's loss (arXiv:2103.00020, figure 3): a drop-in for ``open_clip.ClipLoss`` in linear memory.

    .. math:: L = \tfrac12 \operatorname{mean}_a \left[
        -\log \frac{e^{s \langle i_a, t_a \rangle}}{\sum_b e^{s \langle i_a, t_b \rangle}}
        -\log \frac{e^{s \langle i_a, t_a \rangle}}{\sum_b e^{s \langle i_b, t_a \rangle}} \right]

    with the scale :math:`s` as given. The caller normalises the features, as with the original. This is ``cross_view``
    of :func:`selfsup_kernels.info_nce_loss` for two views.

    With ``world_size`` > 1 the negatives are the features of all processes, as in the original:

    - ``gather_with_grad=True``: value and gradient are the original's, with and without ``local_loss``. With
      ``local_loss`` the scale's gradient on each process differs from the original's, but its mean, which
      DistributedDataParallel takes, is equal.
    - both False (the original's defaults): the original's gradient of the features, and so ours, is too small by a
      factor of ``world_size``. Set ``gather_with_grad=True`` unless a learning rate is tuned to this.
    - ``local_loss=True`` alone: in the original no gradient reaches the features as negatives of other processes, so
      its direction is not that of the loss. Not supported.

    A subclass may call ``get_logits`` and ``get_ground_truth``, which build the matrix of scores that the loss itself
    avoids. If it overrides one of them, the loss is computed from their results.

    Args:
        local_loss, gather_with_grad, rank, world_size: as in the original. ``torch.distributed``'s default group must
            have ``world_size`` processes.
        cache_labels: accepted without effect, since there are no labels.
        use_horovod: must be False.

    Raises:
        RuntimeError: ``use_horovod`` is set, or ``local_loss`` without ``gather_with_grad`` in several processes.

    Example:
        >>> from selfsup_kernels.compat.open_clip import ClipLoss
        >>> images, texts = nn.functional.normalize(torch.randn(2, 256, 128), dim=-1)
        >>> ClipLoss()(images, texts, logit_scale=100.0).shape
        torch.Size([])
    """

    original = "open_clip.ClipLoss"
    hooks = ("get_logits", "get_ground_truth")

    def __init__(
        self,
        local_loss=False,
        gather_with_grad=False,
        cache_labels=False,
        rank=0,
        world_size=1,
        use_horovod=False,
    ):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        _check(self)

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        """Return the scores of images against texts and of texts against images, ``(B, B)`` each.

        With several processes the columns are the features of all processes; without ``local_loss`` the rows are too.
        """
        image, text = image_features, text_features
        images, texts = (_gather(self, x) for x in (image, text)) if self.world_size > 1 else (image, text)
        if self.world_size > 1 and not self.local_loss:
            image, text = images, texts
        per_image, per_text = logit_scale * image @ texts.T, logit_scale * text @ images.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def get_ground_truth(self, device, num_logits):
        """Return the column of each row's positive, ``(num_logits,)``."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        """Return the loss of a batch of image and text features; 0 for a batch of one, as in the original.

        Args:
            image_features, text_features: ``(B, D)``.
            logit_scale: a number > 0, or a tensor of one element that may require grad.
            logit_bias: a number or a tensor of one element, added to every score. Softmax is invariant to it: the loss
                does not depend on it, and its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError, TypeError: features, scale or bias do not fit; the message says which and why.
            RuntimeError: ``world_size`` is not the size of the default group.
        """
        _check(self)
        if isinstance(self, ClipLoss) and overridden(self, _METHODS):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            labels = self.get_ground_truth(image_features.device, logits[0].shape[0])
            loss = sum(F.cross_entropy(scores, labels) for scores in logits) / 2
            return {"contrastive_loss": loss} if output_dict else loss
        pair("image_features", image_features, "text_features", text_features)
        scale = _one_number("logit_scale", logit_scale)
        if not isinstance(scale, (int, float)):
            # The reciprocal loses precision in 16 bits; the conversion is differentiable.
            scale = scale.float() if scale.dtype in (torch.float16, torch.bfloat16) else scale
        elif not scale > 0:
            raise ValueError(f"logit_scale: expected a number > 0, got {scale}")
        loss = _loss(self, image_features, text_features, scale)
        if isinstance(logit_bias, torch.Tensor):
            # DistributedDataParallel waits for the bias' gradient, so it must be part of the graph.
            loss = loss + 0 * _one_number("logit_bias", logit_bias).to(loss)
        return {"contrastive_loss": loss} if output_dict else loss


_METHODS = {name: getattr(ClipLoss, name) for name in ClipLoss.hooks}


class SigLipLoss(DropIn):
    r"""SigLIP's loss (arXiv:2303.15343): a drop-in for ``open_clip.loss.SigLipLoss`` in linear memory.

    .. math:: L = -\tfrac1B \sum_{a, b} \log \sigma\big(p_{ab} (s \langle i_a, t_b \rangle + \beta)\big)

    with :math:`p_{ab} = 1` for :math:`a = b`, else -1, and scale s and bias :math:`\beta` as given. The caller
    normalises the features, as with the original. This is :func:`selfsup_kernels.siglip_loss` of rows as they are.

    With ``world_size`` > 1 the texts are those of all processes, as in the original: each process has the loss of its
    own images, divided by their number, and the gradient of the sum of all processes' losses. The original's ways to
    exchange texts (``dist_impl``) give the same result, and here all are one gather, and one reduce-scatter of the
    texts' gradient. Processes may have different numbers of samples.

    A subclass may call ``get_logits`` and ``get_ground_truth``, which build the matrix of scores that the loss itself
    avoids. If it overrides one of them, the loss is computed from their results, in one process only.

    Args:
        rank, world_size: as in the original. ``torch.distributed``'s default group must have ``world_size`` processes.
        dist_impl: ``"bidir"``, ``"shift"``, ``"reduce"``, ``"gather"`` or None: accepted without effect.
        cache_labels: likewise.

    Raises:
        ValueError: an unknown ``dist_impl``.

    Example:
        >>> from selfsup_kernels.compat.open_clip import SigLipLoss
        >>> images, texts = nn.functional.normalize(torch.randn(2, 256, 128), dim=-1)
        >>> SigLipLoss()(images, texts, logit_scale=10.0, logit_bias=-10.0).shape
        torch.Size([])
    """

    original = "open_clip.loss.SigLipLoss"
    hooks = ("get_logits", "get_ground_truth", "_loss")

    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        check.choice("dist_impl", self.dist_impl, ("bidir", "shift", "reduce", "gather"))

    def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
        """Return 1 on the diagonal, unless ``negative_only``, and -1 elsewhere, ``(num_logits, num_logits)``."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        """Return the scores of images against texts, ``(B, B)``."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        """Return the loss of a batch of image and text features.

        Args:
            image_features, text_features: ``(B, D)``.
            logit_scale: a number > 0, or a tensor of one element that may require grad.
            logit_bias: a number, a tensor of one element that may require grad, or None for 0.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError, TypeError: features, scale or bias do not fit; the message says which and why.
            RuntimeError: ``world_size`` is not the size of the default group.
        """
        if isinstance(self, SigLipLoss) and overridden(self, _SIGLIP_METHODS):
            if self.world_size > 1:
                raise unsupported(self.original, "its own get_logits or get_ground_truth with world_size > 1")
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, image_features.dtype, len(image_features))
            loss = -F.logsigmoid(labels * logits).sum() / len(image_features)
            return {"contrastive_loss": loss} if output_dict else loss
        names = "image_features", "text_features"
        pair(names[0], image_features, names[1], text_features)
        check.rows(names[0], image_features)
        check.rows(names[1], text_features)
        features, autocast = [image_features, text_features], check.autocasts(image_features.device)
        check.same_dtype_and_device(features, names.__getitem__, not autocast)
        bias = 0.0 if logit_bias is None else logit_bias
        check.number_or_tensor("logit_scale", logit_scale, check.positive_number)
        check.number_or_tensor("logit_bias", bias, check.finite_number)
        arguments = {"scale": logit_scale, "bias": bias, "normalize": False}
        if self.world_size == 1:
            loss = siglip_loss(image_features, text_features, group="local", **arguments)
        else:
            loss = own_rows_loss(image_features, text_features, group=_group(self), **arguments)
        return {"contrastive_loss": loss} if output_dict else loss


_SIGLIP_METHODS = {name: getattr(SigLipLoss, name) for name in ("get_logits", "get_ground_truth")}


def _check(module):
    if module.use_horovod:
        raise unsupported(ClipLoss.original, "use_horovod=True", "use torch.distributed")
    if module.world_size > 1 and module.local_loss and not module.gather_with_grad:
        raise unsupported(
            ClipLoss.original,
            "local_loss=True with gather_with_grad=False",
            "its gradient has a wrong direction there; set gather_with_grad=True",
        )


def _gather(module, rows):
    """Return the rows of all processes, with the original's gradient."""
    if module.gather_with_grad:
        return torch.cat(torch.distributed.nn.all_gather(rows))
    every = [torch.empty_like(rows) for _ in range(module.world_size)]
    torch.distributed.all_gather(every, rows.detach())
    every[module.rank] = rows
    return torch.cat(every)


def _loss(module, image, text, scale):
    arguments = {"objective": "cross_view", "normalize": False, "group": "local"}
    if module.world_size == 1:
        if len(image) == 1:  # no negatives
            return (0 * scale * image * text).sum()
        return info_nce_loss([image, text], temperature=1 / scale, **arguments)
    arguments["group"] = group = _group(module)
    if module.local_loss:
        losses = wide_loss([image, text], temperature=1 / scale, reduction="none", **arguments)
        return narrow(losses.mean(), image)
    if isinstance(scale, torch.Tensor):
        # Here each process gets its samples' share of the gradient; in the original all get that of the whole loss.
        scale = AverageGradient.apply(scale.to(image.device), group)
    if not module.gather_with_grad:
        image, text = (ScaleGradient.apply(x, 1 / module.world_size) for x in (image, text))
    return info_nce_loss([image, text], temperature=1 / scale, **arguments)


def _group(module):
    """Return the default group; raise unless it has ``world_size`` processes."""
    group = every_process()
    if group is None or group.size() != module.world_size:
        raise RuntimeError(
            f"world_size: expected the size of torch.distributed's default group,"
            f" {1 if group is None else group.size()}, got {module.world_size}"
        )
    return group


def _one_number(name, value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
    return value.reshape(())
