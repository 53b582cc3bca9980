"""A moving-average copy of a model, and the schedule of its momentum."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from selfsup_kernels.core import backends, shards, wrappers
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.ema import checks as lists
from selfsup_kernels.ema.api import ema_update_pairs_, update_at_once
from selfsup_kernels.ema.model_copy import copy_of, unchanged_on_error
from selfsup_kernels.ema.named_tensors import fits, match, named_tensors, optional_names

BUFFERS = ("copy", "average", "ignore")


class EMA(nn.Module):
    r"""Exponential moving average of a model: :meth:`update` moves ``module``, a copy, towards the model.

    :math:`t \leftarrow m\, t + (1 - m)\, s` for every parameter (arXiv:2006.07733, eq. 1). The copy is a submodule: it
    moves with ``.to()``, is part of the ``state_dict`` and follows ``train()`` and ``eval()`` of the module that owns
    the EMA. It starts in the model's mode. Its parameters do not require grad, so an optimizer leaves them alone. The
    model itself is not registered: it appears in neither ``state_dict()`` nor ``parameters()`` of the EMA.

    Save ``ema.state_dict()`` to resume the EMA, and ``ema.module.state_dict()`` to load the averaged weights into
    another model.

    Every update reads the model's tensors again: it follows parameters that were moved, replaced or resized, and
    raises if the names no longer match. If the copy has come to share memory with the model (``load_state_dict`` of
    ``module`` with ``assign=True``), it gets its own memory. A compiled model (``torch.compile``) or one wrapped in
    DataParallel or DistributedDataParallel stands for the module inside; name prefixes that these wrappers, activation
    checkpointing and FSDP1 add later are ignored. Tied weights are updated once. Tensors without plain memory
    (quantised, float8 or low-rank weights of a tensor subclass) are averaged by their own operators.

    The copy shares process groups, device meshes and streams with the model. Tensors with autograd history (the weights
    of ``nn.utils.weight_norm``, a stored output) are copied without it. For a model that cannot be copied, build a
    second one and pass it as ``module``.

    With FSDP2 every process updates its own shards without communication. FSDP2 modules cannot be copied: create the
    EMA first, then shard the copy like the model (or shard two models and pass the second one as ``module``)::

        ema = sk.EMA(model)
        for network in (model, ema.module):
            for layer in network.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)

    Args:
        model: the model to average.
        momentum: the default :math:`m` of :meth:`update`; a number in [0, 1].
        buffers: how an update treats buffers (BatchNorm's running statistics). ``"copy"`` copies the model's,
            ``"average"`` averages floating and complex buffers like parameters and copies the rest, ``"ignore"`` leaves
            them to ``module``, which updates its own statistics in training mode. Non-persistent buffers that only one
            of the two has, or that differ in shape, are left alone: a forward may have created them.
        dtype: the floating dtype of the copy; None keeps the model's. Use float32 for a bfloat16 or float16 model: in
            a 16-bit dtype, updates with a momentum near 1 round to nothing.
        stochastic_rounding: the alternative to a float32 copy; see :func:`selfsup_kernels.ema_update_`.
        impl: as in :func:`selfsup_kernels.ema_update_`.
        module: a copy that you built yourself, with the model's names and shapes and its own memory. It keeps its
            values and mode; its parameters are set not to require grad, and ``dtype`` converts it. None to copy the
            model here.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: the model cannot be copied and ``module`` is None.

    Example:
        >>> model = nn.Linear(64, 8)
        >>> ema = sk.EMA(model, momentum=0.999)
        >>> ema.update()                                  # after each step of the optimizer
        >>> ema.module(torch.randn(2, 64)).shape          # the averaged model
        torch.Size([2, 8])
    """

    @explained("EMA(model, momentum=0.996)")
    def __init__(
        self,
        model,
        momentum=0.996,
        *,
        buffers="copy",
        dtype=None,
        stochastic_rounding=False,
        impl="auto",
        module=None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        check.choice("buffers", buffers, BUFFERS)
        check.choice("impl", impl, backends.CHOICES)
        if dtype is not None and dtype not in check.FLOATING:
            raise TypeError(f"dtype: expected None, float64, float32, bfloat16 or float16, got {dtype!r}")
        tensor, number = check.momentum(momentum)
        if tensor is not None:
            raise TypeError("momentum: expected a number here; update() takes a tensor")
        self.momentum = number
        self.buffer_policy = buffers
        self.stochastic_rounding = stochastic_rounding
        self.impl = impl

        model = wrappers.inner(model)
        object.__setattr__(self, "_model", model)  # nn.Module's __setattr__ would register it
        self._kept = None
        if module is None:
            self.module = _copy(model)
        else:
            if not isinstance(module, nn.Module):
                raise TypeError(f"module: expected an nn.Module or None, got {type(module).__name__}")
            self.module = wrappers.inner(module)
            self._check_module()
        for p in self.module.parameters():  # scripted modules have no requires_grad_() of their own
            p.requires_grad_(False)
        if dtype is not None:
            self.module._apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
        low = {p.dtype for p in self.module.parameters()} & {torch.bfloat16, torch.float16}
        if low and not stochastic_rounding:
            warnings.warn(
                f"EMA: the copy is {low.pop()}, where updates with a momentum near 1 round to nothing; use"
                " dtype=torch.float32 or stochastic_rounding=True",
                stacklevel=3,
            )

    _kept = None
    """How the next update finds its tensors (:class:`_Kept`). Here for averages that an older version pickled."""

    def __getstate__(self):
        return self.__dict__ | {"_kept": None}

    @torch.no_grad()
    def update(self, momentum=None):
        """Move the copy one step towards the model.

        Args:
            momentum: a number in [0, 1], or a tensor of one element (as in :func:`selfsup_kernels.ema_update_`); None
                for the one given at construction.

        Raises:
            ValueError: the model's names, shapes or device no longer match the copy's; nothing has changed.
        """
        momentum = self.momentum if momentum is None else momentum
        # The modules may have changed: the tensors are asked for each time, and checked.
        kept = None if torch.compiler.is_compiling() else self._kept
        pairs = None if kept is None else kept.pairs(self)
        if pairs is None:
            averages, copies = self._pairs(keep=True)
        elif update_at_once(*pairs, kept.averaged, momentum, self.stochastic_rounding, self.impl):
            return
        else:
            averages, copies = kept.split(*pairs)
        ema_update_pairs_(*averages, momentum, self.stochastic_rounding, impl=self.impl, own_memory=True)
        lists.copy_(copies)

    def _pairs(self, own_memory=True, keep=False):
        """Return the tensors of an update, ``((targets, sources, names), copies)``; checks names and copies.

        With ``keep``, the next update finds them without a walk over the modules.
        """
        own, theirs = named_tensors(self.module), named_tensors(self._model)
        optional = optional_names(own, theirs)
        copied, copies = ([], [], []), _NOTHING
        if self.buffer_policy == "average":
            averaged = match(own.parameters | own.buffers, theirs.parameters | theirs.buffers, optional)
        else:
            if self.buffer_policy == "copy":
                copied = match(own.buffers, theirs.buffers, optional)
                copies = lists.check_update(*copied, averaged=False, own_memory=own_memory)
            averaged = match(own.parameters, theirs.parameters)
        if keep and not torch.compiler.is_compiling():
            self._kept = _Kept.of(self.buffer_policy, averaged, copied, own, theirs, optional)
        return averaged, copies

    def _check_module(self):
        """Raise unless ``module`` matches the model and has its own memory."""
        try:
            pairs, _ = self._pairs(own_memory=False)
            lists.check_update(*pairs)
        except (ValueError, TypeError, RuntimeError) as error:
            raise type(error)(f"module: expected a copy of the model; {error}") from None
        memory = self._model_memory()
        own = named_tensors(self.module)
        for name, tensor in (own.parameters | own.buffers).items():
            if _memory(tensor) in memory:
                raise ValueError(f"module: expected memory of its own, but its {name} is in the model's")

    def _model_memory(self) -> set[int]:
        theirs = named_tensors(self._model)
        return set(map(_memory, (theirs.parameters | theirs.buffers).values())) - {None}

    def forward(self, *args, **kwargs):
        """Return ``module(*args, **kwargs)``."""
        return self.module(*args, **kwargs)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load like ``nn.Module.load_state_dict``, but leave everything unchanged if the load fails.

        With ``assign``, tensors that share the model's memory are copied: an average needs its own memory. When the EMA
        is loaded as part of a larger module, that module's ``load_state_dict`` applies instead.

        Raises:
            RuntimeError: names (with ``strict``) or shapes differ; the message lists all of them.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dictionary, got {type(state_dict).__name__}")
        own = self.state_dict()
        if any(f"module.{name}" in own for name in state_dict) and not any(name in own for name in state_dict):
            raise RuntimeError(
                "state_dict: expected that of an EMA, whose names start with 'module.', got that of a model;"
                " use ema.module.load_state_dict"
            )
        if assign:
            state_dict = self._outside_the_model(state_dict)
        with unchanged_on_error(self, values=not assign):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _outside_the_model(self, state_dict):
        """Return ``state_dict`` with copies of the tensors that share the model's memory."""
        memory = self._model_memory()
        found = {
            name: value.detach().clone()
            for name, value in state_dict.items()
            if isinstance(value, torch.Tensor) and _memory(value) in memory
        }
        if not found:
            return state_dict
        copied = OrderedDict(state_dict)
        copied.update(found)
        if hasattr(state_dict, "_metadata"):  # the versions that modules saved
            copied._metadata = state_dict._metadata
        return copied

    def extra_repr(self):
        rounding = ", stochastic_rounding=True" if self.stochastic_rounding else ""
        return f"momentum={self.momentum:g}, buffers={self.buffer_policy!r}{rounding}"


_NOTHING = lists.Lanes([], [], [])


class _Kept(NamedTuple):
    """How the next update finds its pairs, the averaged ones first: two trees of modules return the tensors."""

    policy: str
    trees: list
    names: list[str]
    averaged: int
    optional: list[int]
    """The positions of pairs that are left out as soon as they do not fit."""

    @classmethod
    def of(cls, policy, averaged, copied, own, theirs, optional):
        """Return what finds these pairs again; None if nothing can."""
        targets, sources, names = (a + b for a, b in zip(averaged, copied, strict=True))
        extension, _ = backends.load_extension()
        if extension is None or own.modules is None or theirs.modules is None:
            return None
        if policy != "ignore" and optional & own.buffers.keys() & theirs.buffers.keys() - set(names):
            return None  # these buffers may fit the next time, though the modules hold the same tensors
        # A tensor that both modules hold is its own average.
        places = [i for i, (t, s) in enumerate(zip(targets, sources, strict=True)) if t is not s]
        trees = [
            extension.ModuleTree(named.modules, {id(tensors[i]): k for k, i in enumerate(places)}, lists.PLAIN)
            for named, tensors in ((own, targets), (theirs, sources))
        ]
        names = [names[i] for i in places]
        first_copied = sum(i < len(averaged[0]) for i in places)
        return cls(policy, trees, names, first_copied, [k for k, name in enumerate(names) if name in optional])

    def pairs(self, ema):
        """Return ``(targets, sources)``, or None if a module or the policy has changed."""
        if self.policy != ema.buffer_policy:
            return None
        targets, sources = (tree.tensors(root) for tree, root in zip(self.trees, (ema.module, ema._model), strict=True))
        if targets is None or sources is None or not all(fits(targets[k], sources[k]) for k in self.optional):
            return None
        return targets, sources

    def split(self, targets, sources):
        """Return what :meth:`EMA._pairs` does."""
        parts = slice(self.averaged), slice(self.averaged, None)
        averaged, copied = ([x[part] for x in (targets, sources, self.names)] for part in parts)
        return averaged, lists.check_update(*copied, averaged=False, own_memory=True)


def _copy(model: nn.Module) -> nn.Module:
    if shards.is_fsdp(model):
        raise RuntimeError(
            "model: FSDP2's modules cannot be copied; make the EMA before fully_shard, then call fully_shard on"
            " ema.module and its parts exactly as on the model and its parts"
        )
    try:
        return copy_of(model)
    except Exception as error:
        raise RuntimeError(
            f"model: copy.deepcopy cannot copy this {type(model).__name__} ({type(error).__name__}: {error});"
            " make a second one and pass it as module="
        ) from error


def _memory(tensor):
    """Return a key that tensors sharing memory have in common; None for a tensor without elements."""
    if not lists.is_plain(type(tensor)):
        return id(tensor)
    if tensor.layout != torch.strided or tensor.is_meta:
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or None


@explained("cosine_momentum(step, max_steps)")
def cosine_momentum(step, max_steps, base=0.996, final=1.0):
    r"""Return BYOL's scheduled momentum (arXiv:2006.07733, section 3.3): a half cosine from ``base`` to ``final``.

    :math:`m_k = m_K - (m_K - m_0) (\cos(\pi k / K) + 1) / 2` at step :math:`k` of :math:`K`; with ``final = 1`` this is
    the paper's :math:`1 - (1 - m_0)(\cos(\pi k / K) + 1) / 2`. Past the last step it stays at ``final``.

    Args:
        step: a number >= 0, or a tensor of one element, which is not read by the host; the result is then a 0-dim
            tensor on its device.
        max_steps: a number > 0.
        base, final: numbers in [0, 1].

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> [round(sk.cosine_momentum(step, max_steps=100), 4) for step in (0, 50, 100)]
        [0.996, 0.998, 1.0]
    """
    max_steps = check.positive_number("max_steps", max_steps)
    base, final = check.real("base", base), check.real("final", final)
    for name, value in (("base", base), ("final", final)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    if isinstance(step, torch.Tensor):
        if step.numel() != 1:
            raise ValueError(f"step: expected a number or a tensor of one element, got shape {tuple(step.shape)}")
        progress = (step.reshape(()).float() / max_steps).clamp(0, 1)
        return final - (final - base) * ((math.pi * progress).cos() + 1) / 2
    step = check.real("step", step, "a number or a tensor of one element")
    if not step >= 0:
        raise ValueError(f"step: expected a number >= 0, got {step}")
    return final - (final - base) * (math.cos(math.pi * min(step / max_steps, 1)) + 1) / 2
