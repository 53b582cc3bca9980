"""Optimizers that update a target network in the same pass over memory as the parameters.

An optimizer reads and writes every parameter, and the moving average that follows reads it again. One kernel does
both here: it saves 4 of the average's 12 bytes per float32 parameter (read the parameter, read and write the target)
and the launches of the second pass.

``SGD`` and ``AdamW`` subclass ``torch.optim``'s classes and replace ``step``: schedulers, parameter groups, hooks and
``state_dict`` are inherited, and a ``state_dict`` of either class loads into the other.
"""

import torch

from selfsup_kernels.ema.fused_step import FusedStep, zeros

__all__ = ["LARS", "SGD", "AdamW"]


class SGD(FusedStep, torch.optim.SGD):
    r"""``torch.optim.SGD`` with a step that also updates the target network of an :class:`selfsup_kernels.EMA`.

    With :math:`g = \nabla + \lambda p`: :math:`b \leftarrow \mu b + (1 - \text{dampening})\, g` (in the first step
    :math:`b \leftarrow g`), :math:`p \leftarrow p - \eta b`, or :math:`p - \eta (g + \mu b)` with ``nesterov``; then
    :math:`t \leftarrow m t + (1 - m) p` for the target :math:`t` of :math:`p`. Computed in float32, or in float64 for
    float64 parameters; state and parameters are rounded once.

    ``ema`` and ``impl`` are not part of the ``state_dict``, nor of a pickled or copied optimizer. A CUDA graph can
    capture a step of this class, but not of :class:`AdamW`, which keeps its step count on the host.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        foreach, fused: None or a bool; no effect, since the step is always one pass.
        differentiable: must be False.
        ema: the EMA to update in each step; do not call ``ema.update()`` as well.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"cuda"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here, or does not implement this optimizer.

    Example:
        >>> model = nn.Linear(64, 8)
        >>> ema = sk.EMA(model, momentum=0.99)
        >>> optimizer = sk.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
        >>> model(torch.randn(4, 64)).sum().backward()
        >>> optimizer.step()                              # and the average
    """

    _op = "fused_sgd_"
    _states = ("momentum_buffer",)

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        *,
        maximize=False,
        foreach=None,
        differentiable=False,
        fused=None,
        ema=None,
        impl="auto",
    ):
        self._check_options(foreach, fused, differentiable=differentiable)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._follow(ema, impl)

    def _parts(self, group, params):
        """Yield (parameters, arguments of the op) for those that have a momentum buffer, then for those without one.

        Without momentum there are no buffers and only one part.
        """
        with_momentum = group["momentum"] != 0
        new = [p for p in params if with_momentum and self.state[p].get("momentum_buffer") is None]
        for p in new:
            self.state[p]["momentum_buffer"] = zeros(p)
        old = params
        if new:
            is_new = set(map(id, new))
            old = [p for p in params if id(p) not in is_new]
        for part, first in ((old, False), (new, True)):
            if part:
                buffers = [self.state[p]["momentum_buffer"] for p in part] if with_momentum else []
                grads = [p.grad for p in part]
                rest = (
                    self._scales(group, part, grads),
                    float(group["weight_decay"]),
                    float(group["momentum"]),
                    float(group["dampening"]),
                    bool(group["nesterov"]),
                    bool(group["maximize"]),
                    first,
                )
                yield part, (grads, (buffers,), rest)

    def _scales(self, group, params, grads):
        return None


class LARS(SGD):
    r"""Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), with the target network of an EMA.

    :class:`SGD` that scales each tensor's decayed gradient :math:`g + \lambda p` by
    :math:`\eta_{\text{trust}} \|p\| / (\|g\| + \lambda \|p\| + \epsilon)` before the momentum. This is the variant of
    lightly and Lightning Bolts: the learning rate multiplies the momentum buffer, not its input (equivalent for a
    constant rate); groups with ``weight_decay=0`` (put biases and norms there) and tensors of norm 0 are not scaled;
    if only the gradient's norm is 0, the buffer's input is 0.

    The norms take a separate pass over parameters and gradients; the host does not read them.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused, ema, impl: as
            in :class:`SGD`.
        trust_coefficient: :math:`\eta_{\text{trust}}`.
        eps: :math:`\epsilon`, added to the denominator.

    Raises:
        ValueError, TypeError, RuntimeError: as in :class:`SGD`.

    Example:
        >>> model = nn.Linear(64, 8)
        >>> ema = sk.EMA(model, momentum=0.99)
        >>> optimizer = sk.optim.LARS(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
        >>> model(torch.randn(4, 64)).sum().backward()
        >>> optimizer.step()                              # and the average
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        trust_coefficient=0.001,
        eps=1e-8,
        *,
        maximize=False,
        foreach=None,
        differentiable=False,
        fused=None,
        ema=None,
        impl="auto",
    ):
        self._trust = {"trust_coefficient": float(trust_coefficient), "eps": float(eps)}
        if not self._trust["trust_coefficient"] > 0:
            raise ValueError(f"trust_coefficient: expected a number > 0, got {trust_coefficient}")
        if not self._trust["eps"] >= 0:
            raise ValueError(f"eps: expected a number >= 0, got {eps}")
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            ema=ema,
            impl=impl,
        )
        self.defaults.update(self._trust)

    def add_param_group(self, param_group):
        if isinstance(param_group, dict):
            for name, value in self._trust.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # a state_dict of SGD lacks these
            for name, value in (("trust_coefficient", 0.001), ("eps", 1e-8)):
                group.setdefault(name, self.defaults.get(name, value))
        self._trust = {name: self.defaults.get(name) for name in ("trust_coefficient", "eps")}

    def _scales(self, group, params, grads):
        decay = float(group["weight_decay"])
        if decay == 0:
            return None
        wide = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        p_norm, g_norm = (torch.stack(torch._foreach_norm(x, 2, wide)).double() for x in (params, grads))
        scale = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
        scale = torch.where(g_norm == 0, 0.0, scale)
        return torch.where(p_norm == 0, 1.0, scale)


class AdamW(FusedStep, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` with a step that also updates the target network of an :class:`selfsup_kernels.EMA`.

    AdamW (arXiv:1711.05101, algorithm 2): :math:`p \leftarrow p - \eta \lambda p`;
    :math:`m \leftarrow \beta_1 m + (1 - \beta_1) g`; :math:`v \leftarrow \beta_2 v + (1 - \beta_2) g^2`;
    :math:`p \leftarrow p - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)`; then the EMA as in :class:`SGD`.

    ``amsgrad``, ``capturable`` and ``differentiable`` are not supported; a loaded state that sets one of them makes the
    next step raise. The step count is kept on the host.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        amsgrad, capturable, differentiable: must be False.
        foreach, fused, ema, impl: as in :class:`SGD`.

    Raises:
        ValueError, TypeError, RuntimeError: as in :class:`SGD`.

    Example:
        >>> model = nn.Linear(64, 8)
        >>> ema = sk.EMA(model, momentum=0.99)
        >>> optimizer = sk.optim.AdamW(model.parameters(), lr=1e-3, ema=ema)
        >>> model(torch.randn(4, 64)).sum().backward()
        >>> optimizer.step()                              # and the average
    """

    _op = "fused_adamw_"
    _states = ("exp_avg", "exp_avg_sq")
    _unsupported = ("amsgrad", "capturable", "differentiable")

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        ema=None,
        impl="auto",
    ):
        self._check_options(foreach, fused, amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        betas = tuple(b if isinstance(b, torch.Tensor) else float(b) for b in betas)  # torch refuses NumPy float32
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
        self._follow(ema, impl)

    def _parts(self, group, params):
        """Yield (parameters, arguments of the op) for each step count; a group's parameters usually share one."""
        parts: dict[float, list] = {}
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                state["exp_avg"], state["exp_avg_sq"] = zeros(p), zeros(p)
            if state["step"].device.type != "cpu":  # loaded from a fused or capturable optimizer
                state["step"] = state["step"].cpu()
            state["step"] += 1
            parts.setdefault(state["step"].item(), []).append(p)
        beta1, beta2 = map(float, group["betas"])
        rest = (beta1, beta2, float(group["eps"]), float(group["weight_decay"]), bool(group["maximize"]))
        for step, part in parts.items():
            states = tuple([self.state[p][name] for p in part] for name in ("exp_avg", "exp_avg_sq"))
            yield part, ([p.grad for p in part], states, (step, *rest))
