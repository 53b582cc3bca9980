"""``siglip_loss`` as a module that stores the arguments."""

import math

import torch
from torch import nn

from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.core.processes import SharesGroup, check_kind, shown
from selfsup_kernels.siglip.api import siglip_loss


class SigLIPLoss(SharesGroup, nn.Module):
    r"""SigLIP's pairwise sigmoid loss as a module; see :func:`selfsup_kernels.siglip_loss` for the equation.

    Args:
        scale, bias: the initial values. The defaults are the paper's (arXiv:2303.15343, section 3.2).
        learnable: train ``logit_scale``, which holds the logarithm of the scale, so that the scale stays positive, and
            ``logit_bias``; parameters of shape ``(1,)``. Weight decay pulls them towards a scale of 1 and a bias of 0:
            exclude them from weight decay. Without, both are numbers.
        normalize, eps, reduction, group, impl: as in :func:`selfsup_kernels.siglip_loss`. ``group="world"`` may be
            passed before ``init_process_group`` is called.

    Attributes:
        logit_scale, logit_bias: the parameters, None if they are not learnable. A ``state_dict`` with 0-dim ones, as
            open_clip's models have, also loads.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> criterion = sk.SigLIPLoss()
        >>> criterion(torch.randn(256, 128), torch.randn(256, 128)).backward()
        >>> sorted(name for name, _ in criterion.named_parameters())
        ['logit_bias', 'logit_scale']
    """

    @explained("SigLIPLoss()")
    def __init__(
        self,
        scale=10.0,
        bias=-10.0,
        *,
        learnable=True,
        normalize=True,
        eps=1e-12,
        reduction="mean",
        group=None,
        impl="auto",
    ):
        super().__init__()
        self._scale = check.positive_number("scale", scale)
        self._bias = check.finite_number("bias", bias)
        check.choice("reduction", reduction, ops.REDUCTIONS)
        check.choice("impl", impl, backends.CHOICES)
        check_kind(group)
        if learnable:
            # One dimension, since fully_shard refuses 0-dim parameters.
            self.logit_scale = nn.Parameter(torch.tensor([math.log(self._scale)], dtype=torch.float32))
            self.logit_bias = nn.Parameter(torch.tensor([self._bias], dtype=torch.float32))
        else:
            self.register_parameter("logit_scale", None)
            self.register_parameter("logit_bias", None)
        self.normalize = normalize
        self.eps = check.positive_number("eps", eps)
        self.reduction = reduction
        self.group = group
        self.impl = impl

    @property
    def scale(self):
        """The scale, a number or, if it is learnable, a differentiable tensor of shape ``(1,)``."""
        return self._scale if self.logit_scale is None else check.scalar("logit_scale", self.logit_scale).exp()

    @property
    def bias(self):
        """The bias, a number or, if it is learnable, a tensor of shape ``(1,)``."""
        return self._bias if self.logit_bias is None else check.scalar("logit_bias", self.logit_bias)

    @explained("criterion(image, text)")
    def forward(self, x, y, duplicates=None):
        """Return the loss of ``(B, D)`` embeddings x and y, row i of both of one sample."""
        return siglip_loss(
            x,
            y,
            scale=self.scale,
            bias=self.bias,
            duplicates=duplicates,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            group=self.group,
            impl=self.impl,
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("logit_scale", "logit_bias"):  # 0-dim in open_clip's models
            value = state_dict.get(f"{prefix}{name}")
            if getattr(self, name) is not None and isinstance(value, torch.Tensor) and value.dim() == 0:
                state_dict[f"{prefix}{name}"] = value.reshape(getattr(self, name).shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        values = {"scale": self._scale, "bias": self._bias, "learnable": self.logit_scale is not None}
        if type(self.logit_scale) is nn.Parameter and not self.logit_scale.is_meta:
            values |= {"scale": self.scale.item(), "bias": self.bias.item()}
        parts = [f"{name}={v if isinstance(v, bool) else format(v, 'g')}" for name, v in values.items()]
        defaults = {"normalize": True, "eps": 1e-12, "reduction": "mean", "impl": "auto"}
        parts += [f"{name}={getattr(self, name)!r}" for name, v in defaults.items() if getattr(self, name) != v]
        return ", ".join([*parts, f"group={shown(self.group)}"])
