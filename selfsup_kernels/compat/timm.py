"""A drop-in for timm's moving average of a model."""

import itertools

import torch

from selfsup_kernels.compat._common import DropIn, unsupported
from selfsup_kernels.core import wrappers
from selfsup_kernels.ema import checks as lists
from selfsup_kernels.ema.api import ema_update_pairs_
from selfsup_kernels.ema.model_copy import copy_of
from selfsup_kernels.ema.named_tensors import match, named_tensors, optional_names

__all__ = ["ModelEmaV3"]


class ModelEmaV3(DropIn):
    r"""Moving average of everything in a model's ``state_dict``: a drop-in for ``timm.utils.ModelEmaV3`` (1.0.31).

    :math:`t \leftarrow d\, t + (1 - d)\, s` for floating parameters and buffers; the others are copied. With a
    ``step``, the decay :math:`d` is 0 up to step ``update_after_step + 1``, where the average starts. With
    ``use_warmup`` it is then, k steps later,

    .. math:: d = \operatorname{clip}(1 - (1 + k / \gamma)^{-p},\ d_{min},\ d_{max})

    Finite values equal timm's bit for bit if the copy has the model's dtype, and ``state_dict`` has timm's names.

    Departures:

    - Tensors are paired by name, while timm pairs them by position: a model that does not match raises. Name prefixes
      of wrappers (``torch.compile``, DataParallel, DistributedDataParallel, activation checkpointing, FSDP1) are
      ignored.
    - Models that ``copy.deepcopy`` refuses because of a process group or a stored output are copied: see
      :class:`selfsup_kernels.EMA`.
    - Tied weights move once per update; timm moves them once per name, so twice with two names (decay squared).
    - Tensors that a hook or a method of the model leaves out of its ``state_dict`` move too; timm leaves them alone.
    - A model may have no parameters.
    - ``stochastic_rounding`` draws other random numbers than timm, with the same expectation.

    The equivalent :class:`selfsup_kernels.EMA` has ``buffers="average"``, or ``"copy"`` for ``exclude_buffers``.

    Args:
        model, decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: as in timm.
        device: the device of the copy; every update transfers the model's tensors there if theirs differs.
        dtype: the dtype of the copy's floating tensors; None keeps the model's.
        stochastic_rounding, stochastic_rounding_seed: for bfloat16 copies, with a separate generator.
        foreach: accepted without effect: all tensors move in one call.
        exclude_buffers: copy the buffers instead of averaging them.

    Raises:
        ValueError, TypeError, RuntimeError: an update gets a model that does not match; nothing has changed.

    Example:
        >>> from selfsup_kernels.compat.timm import ModelEmaV3
        >>> model = nn.Linear(64, 8)
        >>> ema = ModelEmaV3(model, decay=0.9999)
        >>> ema.update(model)
    """

    original = "timm.utils.ModelEmaV3"
    hooks = ("_lerp_", "_foreach_lerp_")

    def __init__(
        self,
        model,
        decay=0.9999,
        min_decay=0.0,
        update_after_step=0,
        use_warmup=False,
        warmup_gamma=1.0,
        warmup_power=2 / 3,
        device=None,
        dtype=None,
        stochastic_rounding=True,
        stochastic_rounding_seed=0,
        foreach=True,
        exclude_buffers=False,
    ):
        super().__init__()
        self.module = copy_of(model)
        self.module.eval()
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.foreach = foreach
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.exclude_buffers = exclude_buffers
        if device is not None:
            self.module.to(device=device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        self._sr_generator = torch.Generator(device=next((x.device for x in tensors), "cpu"))
        self._sr_generator.manual_seed(stochastic_rounding_seed)

    def get_decay(self, step=None):
        """Return the decay at a step; ``decay`` itself for None."""
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step == 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        decay = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(decay, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model, step=None):
        """Update once, with the decay that :meth:`get_decay` returns for ``step``."""
        apply = self.apply_update_no_buffers_ if self.exclude_buffers else self.apply_update_
        apply(model, self.get_decay(step))

    @torch.no_grad()
    def apply_update_(self, model, decay):
        """Average the floating tensors of the ``state_dict`` and copy the rest of it; other buffers do not change."""
        _check_state(self, model)
        parts: dict[bool, list] = {True: [], False: []}
        # Under compat.patch this is timm's own object: leave tied weights to timm, which moves them once per name.
        for pairs in ModelEmaV3._pairs(self, model, persistent=True, tied=isinstance(self, ModelEmaV3)):
            for pair in pairs:
                parts[pair[0].is_floating_point()].append(pair)
        ModelEmaV3._move(self, parts[True], parts[False], decay)

    @torch.no_grad()
    def apply_update_no_buffers_(self, model, decay):
        """Average parameters, copy buffers; non-persistent ones only if both models have one of the same shape."""
        ModelEmaV3._move(self, *ModelEmaV3._pairs(self, model, persistent=False), decay)

    @torch.no_grad()
    def set(self, model):
        """Copy everything in the model's ``state_dict``."""
        _check_state(self, model)
        ModelEmaV3._move(
            self, [], [pair for pairs in ModelEmaV3._pairs(self, model, persistent=True) for pair in pairs], 0.0
        )

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _pairs(self, model, persistent, tied=True):
        """Return [(target, source, name)] of parameters and of buffers; ``persistent``: only those in a ``state_dict``.

        Without ``tied``, raise for tied weights.
        """
        own, theirs = named_tensors(wrappers.inner(self.module)), named_tensors(wrappers.inner(model))
        if own.tied and not tied:
            raise unsupported(ModelEmaV3.original, "tied weights, which timm moves once per name")
        optional = frozenset() if persistent else optional_names(own, theirs)
        buffers = [
            {name: x for name, x in side.buffers.items() if not (persistent and name in side.scratch)}
            for side in (own, theirs)
        ]
        return [
            list(zip(*match(*tensors), strict=True))
            for tensors in ((own.parameters, theirs.parameters), (*buffers, optional))
        ]

    def _move(self, averaged, copied, decay):
        # timm rounds only bfloat16 stochastically. A call takes tensors of one device.
        parts: dict[tuple, list] = {}
        for pair in averaged:
            randomly = self.stochastic_rounding and pair[0].dtype == torch.bfloat16
            parts.setdefault((pair[0].device, randomly), []).append(pair)
        moves = [(randomly, _columns(pairs)) for (_, randomly), pairs in parts.items()]
        if len(moves) > 1:  # a single call checks everything before it writes
            for _, columns in moves:
                lists.check_update(*columns, as_torch=True)
        devices: dict[torch.device, list] = {}
        for pair in copied:
            devices.setdefault(pair[0].device, []).append(pair)
        copies = [lists.check_update(*_columns(pairs), averaged=False, as_torch=True) for pairs in devices.values()]
        for randomly, columns in moves:
            generator = self._sr_generator if randomly else None
            ema_update_pairs_(*columns, decay, randomly, generator, as_torch=True)
        for lanes in copies:
            lists.copy_(lanes)


_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")


def _check_state(ema, model):
    """Under ``compat.patch``, with timm's own object, leave a model that customises its ``state_dict`` to timm.

    A method or hook of its modules may omit tensors. Searching for one is faster than building the ``state_dict``.
    """
    if isinstance(ema, ModelEmaV3):
        return
    plain = set()
    state, save, extra = _STATE
    hooks, hooks_before = _HOOKS
    ahead = [ema.module, model]
    while ahead:
        part = ahead.pop()
        if part is None:
            continue
        kind, own = type(part), part.__dict__
        if kind not in plain and all(getattr(kind, name) is getattr(torch.nn.Module, name) for name in _STATE):
            plain.add(kind)
        changed = kind not in plain or own[hooks] or own[hooks_before]
        if changed or state in own or save in own or extra in own:
            raise unsupported(ModelEmaV3.original, f"the state_dict that {kind.__name__} makes")
        if parts := part._modules:
            ahead += parts.values()


def _columns(pairs):
    """Return ([target], [source], [name]), with the sources on the targets' devices."""
    targets = [target for target, _, _ in pairs]
    sources = [source if source.device == target.device else source.to(target.device) for target, source, _ in pairs]
    return targets, sources, [name for _, _, name in pairs]
