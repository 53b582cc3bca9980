"""Drop-ins for the losses of open_clip (open_clip_torch)."""

import torch
import torch.nn.functional as F

from selfsup_kernels.compat._common import DropIn, narrow, overridden, pair, unsupported, wide_loss
from selfsup_kernels.compat._gradient import AverageGradient, ScaleGradient
from selfsup_kernels.compat._processes import every_process
from selfsup_kernels.info_nce.api import info_nce_loss

__all__ = ["ClipLoss"]


class ClipLoss(DropIn):
    r"""CLIP's loss (arXiv:2103.00020, figure 3): a drop-in for ``open_clip.ClipLoss`` in linear memory.

    .. math:: L = \tfrac12 \operatorname{mean}_a \left[
        -\log \frac{e^{s \langle i_a, t_a \rangle}}{\sum_b e^{s \langle i_a, t_b \rangle}}
        -\log \frac{e^{s \langle i_a, t_a \rangle}}{\sum_b e^{s \langle i_b, t_a \rangle}} \right]

    with the scale :math:`s` as it is given. The features are not normalised here: the caller does that, as with the
    original. It is ``cross_view`` of :func:`selfsup_kernels.info_nce_loss` for two views.

    With ``world_size`` > 1 the features of all processes are the negatives, as in the original:

    - ``gather_with_grad=True``: value and gradient are the original's, for ``local_loss`` on and off. With
      ``local_loss`` the gradients of the scale are spread over the processes in another way, and have the original's
      mean, which is what DistributedDataParallel takes.
    - both False (the original's defaults): the original's gradient of the features, and so ours, is too small by a
      factor of ``world_size``. Turn ``gather_with_grad`` on, unless a learning rate is tuned to it.
    - ``local_loss=True`` alone: in the original no gradient reaches the features as negatives of other processes, so
      that its direction is not that of the loss. Refused.

    A subclass may call ``get_logits`` and ``get_ground_truth``, which make the table of scores that the loss itself
    does without. Where it overrides one of them, the loss is computed from what they return.

    Args:
        local_loss, gather_with_grad, rank, world_size: as in the original. ``torch.distributed``'s default group has
            to have ``world_size`` processes.
        cache_labels: taken, without effect: there are no labels here.
        use_horovod: must be False.

    Raises:
        RuntimeError: horovod, or ``local_loss`` without ``gather_with_grad`` in several processes.
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
        """The scores of images against texts and of texts against images, ``(B, B)`` each.

        In several processes the columns are the features of all; so are the rows without ``local_loss``.
        """
        image, text = image_features, text_features
        images, texts = (_gather(self, x) for x in (image, text)) if self.world_size > 1 else (image, text)
        if self.world_size > 1 and not self.local_loss:
            image, text = images, texts
        per_image, per_text = logit_scale * image @ texts.T, logit_scale * text @ images.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def get_ground_truth(self, device, num_logits):
        """``(num_logits,)``: the column of each row's positive."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        """The loss of a batch of image and text features; 0 for a batch of one, as in the original.

        Args:
            image_features, text_features: ``(B, D)``.
            logit_scale: a number > 0, or a tensor of one element that may require grad.
            logit_bias: a number or a tensor of one element. It adds the same number to every score, which a softmax
                does not notice: the loss does not depend on it, and its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError, TypeError: features, scale or bias do not fit; the message says which and why.
            RuntimeError: the processes are not those that the constructor was told of.
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
            # float16 cannot hold the reciprocal well; the conversion passes the gradient on.
            scale = scale.float() if scale.dtype in (torch.float16, torch.bfloat16) else scale
        elif not scale > 0:
            raise ValueError(f"logit_scale: expected a number > 0, got {scale}")
        loss = _loss(self, image_features, text_features, scale)
        if isinstance(logit_bias, torch.Tensor):
            # A parameter that takes part: DistributedDataParallel waits for its gradient.
            loss = loss + 0 * _one_number("logit_bias", logit_bias).to(loss)
        return {"contrastive_loss": loss} if output_dict else loss


_METHODS = {name: getattr(ClipLoss, name) for name in ClipLoss.hooks}


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
    """The rows of all processes, with the gradient that the original gives them."""
    if module.gather_with_grad:
        return torch.cat(torch.distributed.nn.all_gather(rows))
    every = [torch.empty_like(rows) for _ in range(module.world_size)]
    torch.distributed.all_gather(every, rows.detach())
    every[module.rank] = rows
    return torch.cat(every)


def _loss(module, image, text, scale):
    arguments = {"objective": "cross_view", "normalize": False, "group": "local"}
    if module.world_size == 1:
        if len(image) == 1:  # the positive is all there is
            return (0 * scale * image * text).sum()
        return info_nce_loss([image, text], temperature=1 / scale, **arguments)
    group = every_process()
    if group is None or group.size() != module.world_size:
        raise RuntimeError(
            f"world_size: expected the size of torch.distributed's default group,"
            f" {1 if group is None else group.size()}, got {module.world_size}"
        )
    arguments["group"] = group
    if module.local_loss:
        losses = wide_loss([image, text], temperature=1 / scale, reduction="none", **arguments)
        return narrow(losses.mean(), image)
    if isinstance(scale, torch.Tensor):
        # A process' own has its samples' share; in the original all processes have the gradient of the whole loss.
        scale = AverageGradient.apply(scale.to(image.device), group)
    if not module.gather_with_grad:
        image, text = (ScaleGradient.apply(x, 1 / module.world_size) for x in (image, text))
    return info_nce_loss([image, text], temperature=1 / scale, **arguments)


def _one_number(name, value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
    return value.reshape(())
