"""Optimizers that update a target network in the same pass over memory as the parameters.

An optimizer reads and writes every parameter, and the moving average that follows reads it again. One kernel does
both here: it saves 4 of the average's 12 bytes per float32 parameter (read the parameter, read and write the target)
and the launches of the second pass.

``SGD`` and ``AdamW`` subclass ``torch.optim``'s classes and replace ``step``: schedulers, parameter groups, hooks and
``state_dict`` are inherited, and a ``state_dict`` of either class loads into the other.
"""

from collections.abc import Iterable

import torch

from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.lazy import is_fake
from selfsup_kernels.ema import checks as lists
from selfsup_kernels.ema import overlap
from selfsup_kernels.ema.api import ema_update_pairs_
from selfsup_kernels.ema.module import EMA

__all__ = ["LARS", "SGD", "AdamW"]


class _FusedStep:
    """Mixin with the step that these optimizers share; list it before the ``torch.optim`` base class."""

    ema: EMA | None = None
    impl: str = "auto"
    _unsupported: tuple[str, ...] = ("differentiable",)
    _states: tuple[str, ...]
    """The names of the state tensors that have the parameter's shape."""
    _checked = False
    """True if the states have been checked against their parameters since they were created or loaded."""

    def _check_options(self, foreach, fused, **unsupported):
        """Check the arguments of torch's class that select one of its implementations; here they have no effect."""
        for name, value in (("foreach", foreach), ("fused", fused)):
            if not (value is None or isinstance(value, bool)):
                raise TypeError(f"{name}: expected None or a bool, got {type(value).__name__}")
        for name, value in unsupported.items():
            self._refuse_option(name, value)

    def _refuse_option(self, name, value):
        if value:
            raise ValueError(
                f"{name}: not supported by {type(self).__name__}; use torch.optim's own class, and call ema.update()"
                " after its step"
            )

    def _follow(self, ema, impl):
        check.choice("impl", impl, backends.CHOICES)
        if impl != "auto":
            # A missing implementation raises now; an unsupported device raises at the first step.
            backends.require(impl, self._op)
        if ema is not None:
            if not isinstance(ema, EMA):
                raise TypeError(f"ema: expected a selfsup_kernels.EMA or None, got {type(ema).__name__}")
            followed = set(map(id, ema._pairs()[0][1]))
            if not any(id(p) in followed for group in self.param_groups for p in group["params"]):
                raise ValueError("ema: expected that of a model that has some of params, but it has none of them")
        self.ema, self.impl = ema, impl

    def step(self, closure=None, *, momentum=None):
        """Step the optimizer and the EMA, equivalent to ``super().step(); ema.update(momentum)``.

        Targets of parameters without a gradient move too; buffers follow the EMA's ``buffers`` policy. All checks run
        before any write. Optimizer states are checked only at the first step and at the first one after
        ``load_state_dict``.

        The average uses the parameters as this step leaves them. The step therefore raises if the EMA's model has
        trained parameters with a gradient that this optimizer does not hold: another optimizer, or another process of a
        sharded one (``ZeroRedundancyOptimizer``), may change them later. If something else changes the parameters
        after the step (a projection, ``Lookahead``, model averaging), pass no ``ema`` and call ``ema.update()`` then.

        Args:
            closure: a function that evaluates the model again and returns the loss.
            momentum: the EMA's momentum in this step, a number in [0, 1] or a 0-dim tensor; None for the EMA's default.

        Returns:
            The result of ``closure``, or None.

        Raises:
            TypeError: a gradient is sparse, a tensor overrides PyTorch's operators (a DTensor, for example), or a
                parameter's dtype is not supported.
            ValueError: an option is set that only torch's own class supports; a state differs from its parameter in
                shape, dtype or device; the EMA's model has trained parameters with a gradient that this optimizer does
                not hold; or as in :meth:`selfsup_kernels.EMA.update`.
            RuntimeError: ``impl`` cannot be used here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step(momentum)
        return loss

    def _step(self, momentum):
        average = _Average(self.ema, momentum)
        calls = [
            (group, params, backends.select(self.impl, params[0], self._op, any_dtype=True))
            for group in self.param_groups
            for params in _by_device(self._with_grad(group))
        ]
        average.check_device(calls)
        average.check_others(calls)
        if not self._checked:
            self._check_states()
        rates = [_rate(group["lr"], params[0].device) for group, params, _ in calls]
        for (group, params, impl), rate in zip(calls, rates, strict=True):
            for part, arguments in self._parts(group, params):
                targets = [average.take(p) for p in part]
                average_arguments = (average.tensor, average.number, average.seed(part[0].device))
                grads, states, rest = arguments
                ops.overload(self._op, impl)(part, grads, *states, targets, *rate, *average_arguments, *rest)
                if impl != "reference":
                    # Backward must detect that saved tensors have changed. Eager operations do this themselves.
                    torch.autograd.graph.increment_version([*part, *targets, *(x for state in states for x in state)])
        average.finish()

    def _with_grad(self, group):
        for option in self._unsupported:
            self._refuse_option(option, group.get(option))
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            for what, x in (("tensors", p), ("gradients", p.grad)):
                if not (lists.is_plain(type(x)) or is_fake(x)):
                    raise TypeError(
                        f"params: expected plain {what}, got a {type(x).__name__} (FSDP2's are DTensors); use"
                        " torch.optim's own class, and call ema.update() after its step"
                    )
            if not p.is_contiguous() and overlap.overlaps_itself(p):
                raise RuntimeError(
                    "params: expected elements that do not share memory (an expanded tensor?), got shape"
                    f" {tuple(p.shape)} with strides {p.stride()}"
                )
            if p.grad.layout != torch.strided:
                raise TypeError(f"params: expected dense gradients, got layout {p.grad.layout}")
            if p.dtype not in check.FLOATING:
                raise TypeError(
                    f"params: expected float64, float32, bfloat16 or float16, got {str(p.dtype).removeprefix('torch.')}"
                )
            if p.grad.dtype != p.dtype:
                raise TypeError(f"params: expected gradients of the dtype {p.dtype}, got {p.grad.dtype}")
        return params

    def __setstate__(self, state):
        super().__setstate__(state)
        self._checked = False

    def _check_states(self):
        """Raise unless the states fit the parameters. Not run every step: it takes a tenth of a small step's time."""
        for i, group in enumerate(self.param_groups):
            names = self._states if group.get("momentum") != 0 else ()  # SGD has no buffers then
            for j, p in enumerate(group["params"]):
                state = self.state.get(p, {})
                for name in names:
                    x = state.get(name)
                    if (x is not None or "step" in state) and not _fits(x, p):
                        raise ValueError(
                            f"state: expected {name} of param_groups[{i}]['params'][{j}] to be {_kind(p)}, like the"
                            f" parameter, got {_kind(x)}"
                        )
        self._checked = True


class _Average:
    """The EMA's part of one step: the target of each parameter, and the pairs that the optimizer does not update."""

    def __init__(self, ema, momentum):
        self.ema, self.tensor, self.number = ema, None, 1.0
        self.pairs: dict[int, tuple] = {}
        self.none: dict[torch.device, torch.Tensor] = {}
        if ema is None:
            if momentum is not None:
                raise ValueError("momentum: expected None, since the optimizer was given no ema")
            return
        self.momentum = ema.momentum if momentum is None else momentum
        self.tensor, self.number = check.momentum(self.momentum)
        (targets, sources, names), self.copies = ema._pairs()
        targets, sources, self.others = lists.check_update(targets, sources, names, own_memory=True)
        self.device = targets[0].device if targets else None
        self.pairs = {id(s): (t, s) for t, s in zip(targets, sources, strict=True)}

    def check_others(self, calls):
        """Raise if a parameter outside this optimizer is trained and has a gradient: it may still change."""
        left = self.pairs.keys() - {i for _, params, _ in calls for i in map(id, params)}
        others = left and [
            s
            for key, (_, s) in self.pairs.items()
            if key in left and s.requires_grad and s.is_leaf and s.grad is not None
        ]
        if others:
            names = {id(s): name for name, s in self.ema._model.named_parameters()}
            found = ", ".join(names.get(id(s), "a buffer") for s in others[:3]) + (", ..." if len(others) > 3 else "")
            raise ValueError(
                "ema: expected a model whose parameters with a gradient are all of this optimizer, but it lacks"
                f" {len(others)} of them ({found}): another optimizer, or another process of a sharded one"
                " (ZeroRedundancyOptimizer), would change them after they were averaged. Pass no ema here, and call"
                " ema.update() after the last step; set requires_grad_(False) on parameters that are not trained"
            )

    def check_device(self, calls):
        if self.tensor is None or self.tensor.device.type == "cpu":
            return
        devices = {params[0].device for _, params, _ in calls} | ({self.device} if self.device else set())
        for device in devices - {self.tensor.device}:
            raise ValueError(f"momentum: expected the device of params, {device}, got {self.tensor.device}")

    def take(self, param):
        """Return a parameter's target, or an empty tensor if it has none; :meth:`finish` then skips the pair."""
        pair = self.pairs.pop(id(param), None)
        if pair is not None:
            return pair[0]
        if param.device not in self.none:
            self.none[param.device] = torch.empty(0, device=param.device)
        return self.none[param.device]

    def seed(self, device):
        """Draw a seed for stochastic rounding on the device: one per call, since every call counts tensors from 0."""
        if self.ema is None or not self.ema.stochastic_rounding:
            return None
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)

    def finish(self):
        if self.ema is None:
            return
        rest = [*self.pairs.values(), *self.others]
        targets, sources = [t for t, _ in rest], [s for _, s in rest]
        ema = self.ema
        ema_update_pairs_(targets, sources, None, self.momentum, ema.stochastic_rounding, None, ema.impl)
        lists.copy_(self.copies)


def _rate(lr, device):
    """Return ``(tensor, 0)`` for a tensor of one element, which is not read, or ``(None, number)`` for a number."""
    if not isinstance(lr, torch.Tensor):
        return None, float(lr)
    if lr.numel() != 1 or lr.is_complex():
        raise ValueError(
            f"lr: expected a number or a real tensor of one element, got shape {tuple(lr.shape)}, {lr.dtype}"
        )
    if lr.device != device and lr.device.type != "cpu":
        raise ValueError(f"lr: expected the device of params, {device}, got {lr.device}")
    lr = lr.detach().reshape(())
    return (lr if lr.dtype in check.FLOATING else lr.double()), 0.0


def _by_device(params) -> Iterable[list[torch.Tensor]]:
    devices: dict[torch.device, list] = {}
    for p in params:
        devices.setdefault(p.device, []).append(p)
    return devices.values()


def _fits(state, param) -> bool:
    return (
        isinstance(state, torch.Tensor)
        and state.shape == param.shape
        and state.dtype == param.dtype
        and state.device == param.device
    )


def _kind(value) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"


def _zeros(param):
    return torch.zeros_like(param, memory_format=torch.preserve_format)


class SGD(_FusedStep, torch.optim.SGD):
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
            self.state[p]["momentum_buffer"] = _zeros(p)
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


class AdamW(_FusedStep, torch.optim.AdamW):
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
                state["exp_avg"], state["exp_avg_sq"] = _zeros(p), _zeros(p)
            if state["step"].device.type != "cpu":  # loaded from a fused or capturable optimizer
                state["step"] = state["step"].cpu()
            state["step"] += 1
            parts.setdefault(state["step"].item(), []).append(p)
        beta1, beta2 = map(float, group["betas"])
        rest = (beta1, beta2, float(group["eps"]), float(group["weight_decay"]), bool(group["maximize"]))
        for step, part in parts.items():
            states = tuple([self.state[p][name] for p in part] for name in ("exp_avg", "exp_avg_sq"))
            yield part, ([p.grad for p in part], states, (step, *rest))
