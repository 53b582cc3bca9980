"""``info_nce_loss`` as a module: it holds the arguments."""

import math

import torch
from torch import nn

from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.processes import SharesGroup, check_kind, shown
from selfsup_kernels.info_nce.api import check_objective, info_nce_loss


class InfoNCELoss(SharesGroup, nn.Module):
    r"""N-view InfoNCE as a module; see :func:`selfsup_kernels.info_nce_loss` for the equations and the arguments.

    Args:
        temperature: a positive number; where training starts if it is learnable.
        learnable_temperature: train ``logit_scale``, a parameter of shape ``(1,)`` with the logarithm of the scale
            :math:`1 / \tau` as in CLIP (arXiv:2103.00020, section 2.3), so that the temperature stays positive.
            Weight decay pulls it towards a temperature of 1: exclude it from weight decay.
        max_scale: with a learnable temperature, the largest scale; CLIP has 100. As there, the parameter itself is
            clamped, here before every forward in training mode. None: no limit. Under ``fully_shard`` a forward has a
            copy of the parameter: the scale is limited all the same, the parameter itself is not.
        objective, core_view, normalize, eps, reduction, group, impl: as in :func:`selfsup_kernels.info_nce_loss`.
            ``group="world"`` may be given before ``init_process_group``.

    A ``state_dict`` whose ``logit_scale`` has no dimensions, as that of earlier versions, loads as well.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
    """

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
            # Of one dimension: fully_shard takes no parameter without.
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
        """A number, or with a learnable temperature a 0-dim tensor that carries its gradient."""
        value = self._temperature_or_tensor()
        return value.reshape(()) if isinstance(value, torch.Tensor) else value

    def _temperature_or_tensor(self):
        """The same, the tensor in the shape of the parameter: a forward spares the change of shapes."""
        if self.logit_scale is None:
            return self._temperature
        logit_scale = check.scalar("logit_scale", self.logit_scale)
        if self.max_scale is None:
            return (-logit_scale).exp()
        # Not clamp: it has no gradient beyond the limit, and saves the parameter, which forward() clamps in place.
        excess = (logit_scale.detach() - math.log(self.max_scale)).clamp(min=0)
        return (excess - logit_scale).exp()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f"{prefix}logit_scale"
        value = state_dict.get(name)
        if self.logit_scale is not None and isinstance(value, torch.Tensor) and value.dim() == 0:
            state_dict[name] = value.reshape(self.logit_scale.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *views, labels=None, queue=None):
        """The loss of ``forward(views)``, a ``(V, B, D)`` tensor or a sequence, or of ``forward(z0, z1, ...)``."""
        if self.training and self.max_scale is not None:
            with torch.no_grad():  # not only in `temperature`: the parameter must not drift off beyond the limit
                self.logit_scale.clamp_(max=math.log(self.max_scale))
        return info_nce_loss(
            views[0] if len(views) == 1 else list(views),
            temperature=self._temperature_or_tensor(),
            objective=self.objective,
            labels=labels,
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
        else:  # a DTensor, which all processes would have to read together, or a tensor without a value
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
