"""The step that the optimizers share, and the average that it updates in the same pass over memory."""

from collections.abc import Iterable

import torch

from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.lazy import is_fake
from selfsup_kernels.ema import checks as lists
from selfsup_kernels.ema import overlap
from selfsup_kernels.ema.api import ema_update_pairs_
from selfsup_kernels.ema.module import EMA


class FusedStep:
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


def zeros(param):
    return torch.zeros_like(param, memory_format=torch.preserve_format)
