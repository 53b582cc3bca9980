"""``info_nce_loss`` as a module that stores the arguments."""

import math

import torch
from torch import nn

from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.core.processes import SharesGroup, check_kind, shown
from selfsup_kernels.info_nce.api import check_objective, info_nce_loss


class InfoNCELoss(SharesGroup, nn.Module):
    r"""N-view InfoNCE as a module; see :func:`selfsup_kernels.info_nce_loss` for the equations and the arguments.

    Args:
        temperature: a positive number; the initial value if it is learnable.
        learnable_temperature: train ``logit_scale``, a parameter of shape ``(1,)`` that holds the logarithm of the
            scale :math:`1 / \tau` as in CLIP (arXiv:2103.00020, section 2.3), so the temperature stays positive.
            Weight decay pulls it towards a temperature of 1: exclude it from weight decay.
        max_scale: the largest scale of a learnable temperature (CLIP: 100); None for no limit. Like CLIP, this clamps
            the parameter itself, here before every forward in training mode. Under ``fully_shard`` a forward sees a
            copy of the parameter, so only the scale is limited, not the parameter.
        objective, core_view, normalize, eps, reduction, group, impl: as in :func:`selfsup_kernels.info_nce_loss`.
            ``group="world"`` may be passed before ``init_process_group`` is called.

    A ``state_dict`` from earlier versions, with a 0-dim ``logit_scale``, also loads.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> criterion = sk.InfoNCELoss(0.07, learnable_temperature=True, max_scale=100)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
        >>> loss.backward()
        >>> criterion.logit_scale.grad.shape
        torch.Size([1])
    """

    @explained("InfoNCELoss(temperature=0.1, objective='cross_view')")
    def __init__(
        self,
        temperature=0.1,
        *,
        learnable_temperature=False,
        max_scale=None,
        objective="supcon_out",
        core_view=None,
        normalize=True,
        eps=1e-12,
        reduction="mean",
        group=None,
        impl="auto",
    ):
        super().__init__()
        temperature = check.positive_number("temperature", temperature)
        check_objective(objective)
        check.choice("reduction", reduction, ops.REDUCTIONS)
        check.choice("impl", impl, backends.CHOICES)
        if core_view is not None:
            core_view = check.integer("core_view", core_view, 0, expected="None or an integer")
        check_kind(group)
        if max_scale is not None:
            if not learnable_temperature:
                raise ValueError("max_scale: expected None without learnable_temperature")
            max_scale = check.positive_number("max_scale", max_scale)
            if 1 / temperature > max_scale * (1 + 1e-6):
                raise ValueError(
                    f"max_scale: expected at least 1 / temperature = {1 / temperature:g}, got {max_scale:g}"
                )
        if learnable_temperature:
            # One dimension, since fully_shard refuses 0-dim parameters.
            self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)], dtype=torch.float32))
        else:
            self.register_parameter("logit_scale", None)
        self._temperature = temperature
        self.max_scale = max_scale
        self.objective = objective
        self.core_view = core_view
        self.normalize = normalize
        self.eps = check.positive_number("eps", eps)
        self.reduction = reduction
        self.group = group
        self.impl = impl

    @property
    def temperature(self):
        """The temperature, a number or, if it is learnable, a differentiable 0-dim tensor."""
        value = self._temperature_or_tensor()
        return value.reshape(()) if isinstance(value, torch.Tensor) else value

    def _temperature_or_tensor(self):
        """Return the temperature; a tensor keeps the parameter's shape, which saves forward() a reshape."""
        if self.logit_scale is None:
            return self._temperature
        logit_scale = check.scalar("logit_scale", self.logit_scale)
        if self.max_scale is None:
            return (-logit_scale).exp()
        # Not clamp: its gradient is 0 beyond the limit, and it saves the parameter, which forward() changes in place.
        excess = (logit_scale.detach() - math.log(self.max_scale)).clamp(min=0)
        return (excess - logit_scale).exp()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f"{prefix}logit_scale"
        value = state_dict.get(name)
        if self.logit_scale is not None and isinstance(value, torch.Tensor) and value.dim() == 0:
            state_dict[name] = value.reshape(self.logit_scale.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @explained("criterion(z0, z1, labels=y)")
    def forward(self, *views, labels=None, duplicates=None, logq=None, queue=None):
        """Return the loss: ``forward(views)`` of a ``(V, B, D)`` tensor or a sequence, or ``forward(z0, z1, ...)``."""
        if self.training and self.max_scale is not None:
            with torch.no_grad():  # `temperature` limits only the scale; the parameter must not drift beyond it
                self.logit_scale.clamp_(max=math.log(self.max_scale))
        return info_nce_loss(
            views[0] if len(views) == 1 else list(views),
            temperature=self._temperature_or_tensor(),
            objective=self.objective,
            labels=labels,
            duplicates=duplicates,
            logq=logq,
            queue=queue,
            core_view=self.core_view,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            group=self.group,
            impl=self.impl,
        )

    def extra_repr(self):
        if self.logit_scale is None:
            parts = [f"temperature={self._temperature:.4g}"]
        elif type(self.logit_scale) is nn.Parameter and not self.logit_scale.is_meta:
            parts = [f"temperature={self.temperature.item():.4g}", "learnable_temperature=True"]
        else:  # a DTensor, which all processes must read together, or a tensor without a value
            parts = ["learnable_temperature=True"]
        defaults = {
            "max_scale": None,
            "objective": "",  # always shown
            "core_view": None,
            "normalize": True,
            "eps": 1e-12,
            "reduction": "mean",
            "impl": "auto",
        }
        values = {name: getattr(self, name) for name in defaults}
        parts += [f"{name}={v!r}" for name, v in values.items() if v != defaults[name]]
        return ", ".join([*parts, f"group={shown(self.group)}"])
