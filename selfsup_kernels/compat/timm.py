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
    r"""The moving average of everything in a model's ``state_dict``: a drop-in for ``timm.utils.ModelEmaV3`` (1.0.31).

    :math:`t \leftarrow d\, t + (1 - d)\, s` for parameters and buffers that are floating; others are copied. With a
    ``step``, the decay :math:`d` is 0 up to step ``update_after_step + 1``, so that the average starts there; with
    ``use_warmup`` it then is, k being the steps since,

    .. math:: d = \operatorname{clip}(1 - (1 + k / \gamma)^{-p},\ d_{min},\ d_{max})

    Finite values are timm's bit for bit where the copy has the model's dtype, and ``state_dict`` has timm's names.

    Departures:

    - Tensors are paired by name, where timm pairs them by position: a model that does not fit is an error. Wrappers
      (``torch.compile``, DataParallel, DistributedDataParallel, activation checkpointing, FSDP1) do not count.
    - Models that ``copy.deepcopy`` refuses for a process group or a kept output are copied: see
      :class:`selfsup_kernels.EMA`.
    - Tied weights move once per update; timm moves them once per name, that is with the square of the decay.
    - Tensors that a hook or a method of the model leaves out of its ``state_dict`` move too; timm leaves them alone.
    - A model may have no parameters.
    - ``stochastic_rounding`` draws other random numbers than timm's, from the same expectation.
    - :class:`selfsup_kernels.EMA` in timm's terms: ``buffers="average"``, or ``"copy"`` for ``exclude_buffers``.

    Args:
        model, decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: as in timm.
        device: of the copy; the model's tensors are sent there on every update if it is another one.
        dtype: of the copy's floating tensors; None keeps the model's.
        stochastic_rounding, stochastic_rounding_seed: of bfloat16 copies, from a generator of its own.
        foreach: taken, without effect: all tensors always move in one call.
        exclude_buffers: copy the buffers instead.

    Raises:
        ValueError, TypeError, RuntimeError: from updates with a model that does not fit; nothing has changed then.
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
        """The decay at a step; ``decay`` itself for None."""
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
        """One update with :meth:`get_decay` of ``step``."""
        apply = self.apply_update_no_buffers_ if self.exclude_buffers else self.apply_update_
        apply(model, self.get_decay(step))

    @torch.no_grad()
    def apply_update_(self, model, decay):
        """Average what is floating in the ``state_dict``, copy the rest of it; buffers that are not in it stay."""
        _check_state(self, model)
        parts: dict[bool, list] = {True: [], False: []}
        # Under compat.patch, where this is timm's own object, tied weights are left to timm: it moves them once a name.
        for pairs in ModelEmaV3._pairs(self, model, persistent=True, tied=isinstance(self, ModelEmaV3)):
            for pair in pairs:
                parts[pair[0].is_floating_point()].append(pair)
        ModelEmaV3._move(self, parts[True], parts[False], decay)

    @torch.no_grad()
    def apply_update_no_buffers_(self, model, decay):
        """Average parameters, copy all buffers; those that are not saved, where both have one of the same shape."""
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
        """[(target, source, name)] of parameters and of buffers; ``persistent``: only those in a ``state_dict``.

        Without ``tied``, tied weights are refused.
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
        # timm rounds bfloat16 alone at random. A call is for one device.
        parts: dict[tuple, list] = {}
        for pair in averaged:
            randomly = self.stochastic_rounding and pair[0].dtype == torch.bfloat16
            parts.setdefault((pair[0].device, randomly), []).append(pair)
        moves = [(randomly, _columns(pairs)) for (_, randomly), pairs in parts.items()]
        if len(moves) > 1:  # else the one call checks everything before it writes anything
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
    """Under ``compat.patch``, with timm's own object, a model that makes its ``state_dict`` itself is left to timm.

    A method or a hook of its modules may leave tensors out. Looking for one takes less time than making the dictionary.
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
    """([target], [source], [name]), the sources on the targets' devices."""
    targets = [target for target, _, _ in pairs]
    sources = [source if source.device == target.device else source.to(target.device) for target, source, _ in pairs]
    return targets, sources, [name for _, _, name in pairs]
