"""What tells a recorder, for one step, which part of it runs; all of it is gone after the step."""

import contextlib

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from selfsup_kernels.core import wrappers
from selfsup_kernels.ema.module import EMA
from selfsup_kernels.lab.profile import graph, parts
from selfsup_kernels.methods import BYOLContrast, MoCo

DEPTH = 2
"""How deep in the model a module that is called by itself counts as the encoder's forward: children, and theirs."""

LOSS_METHODS = {MoCo: "contrast", BYOLContrast: "_byol"}
"""Losses of the package's methods that are no modules."""


def is_loss(module) -> bool:
    """PyTorch's losses, and modules whose class is called ...Loss, compiled ones too."""
    module = wrappers.inner(module) if wrappers.is_compiled(module) else module
    return isinstance(module, nn.modules.loss._Loss) or type(module).__name__.endswith("Loss")


def losses_in(models) -> list[nn.Module]:
    """The outermost loss modules that can be told from what is around them."""
    found = []
    for model in models:
        if is_loss(model):
            found.append(model)
        elif not _compiled(model):
            found += losses_in(model.children())
    return list(dict.fromkeys(found))


def own_losses(models) -> list:
    """``(module, name)`` of the methods that compute a loss in place of a loss module."""
    found = []
    for model in models:
        if not _compiled(model):
            found += [(model, name) for kind, name in LOSS_METHODS.items() if isinstance(model, kind)]
            found += own_losses(model.children())
    return list(dict.fromkeys(found))


def compiled_in(models) -> list[str]:
    """Classes of the losses and methods that are compiled together with something else."""
    modules = [m for model in models for m in model.modules()]
    inside = [m for c in modules if _compiled(c) and not is_loss(c) for m in c.modules()]
    return list(dict.fromkeys(type(m).__name__ for m in inside if is_loss(m) or isinstance(m, tuple(LOSS_METHODS))))


def averages_in(models) -> list[EMA]:
    return list(dict.fromkeys(m for model in models for m in model.modules() if isinstance(m, EMA)))


def attach(stack, recorder, models, losses, optimizers_given, averages, averaging=()):
    """Enter on ``stack`` whatever marks the parts of a step.

    Args:
        stack: a ``contextlib.ExitStack``; closing it leaves everything as it was.
        models, losses, averages: modules.
        optimizers_given: those that are not PyTorch's; PyTorch's are found by themselves.
        averaging: ``(owner, name)`` of further methods that update a moving average.
    """
    for module in losses:
        _hook_module(stack, recorder, module, parts.LOSS_FORWARD)
    for owner, name in own_losses(models):
        _wrap(stack, recorder, owner, name, parts.LOSS_FORWARD)
    for module in _encoders(models, set(losses)):
        _hook_module(stack, recorder, module, parts.ENCODER_FORWARD)
    for owner, name in [*((m, "update") for m in averages), *averaging]:
        _wrap(stack, recorder, owner, name, parts.EMA)

    stack.callback(optimizers.register_optimizer_step_pre_hook(_entering(recorder)).remove)
    stack.callback(optimizers.register_optimizer_step_post_hook(lambda *_: recorder.leave()).remove)
    _wrap(stack, recorder, torch.optim.Optimizer, "zero_grad", parts.OPTIMIZER)
    for name in ("unscale_", "step", "update"):
        _wrap(stack, recorder, torch.amp.GradScaler, name, parts.OPTIMIZER)
    for optimizer in optimizers_given:
        _wrap(stack, recorder, optimizer, "step", parts.OPTIMIZER)
    _replace(stack, torch.autograd, "backward", graph.watched(recorder, torch.autograd.backward))


def _entering(recorder):
    def hook(optimizer, args, kwargs):
        recorder.enter(parts.OPTIMIZER)  # and returns nothing: an optimizer takes that for arguments

    return hook


def _encoders(models, losses):
    """Modules whose call, where none of them is running yet, is the encoder's forward."""
    found, level = [], list(models)
    for _ in range(DEPTH + 1):
        level = list(dict.fromkeys(m for m in level if m not in losses and not is_loss(m)))
        found += level
        # What is inside a compiled module would be traced with its hooks, or without them.
        level = [child for m in level if not _compiled(m) for child in m.children()]
    return list(dict.fromkeys(found))


def _compiled(module) -> bool:
    return wrappers.is_compiled(module) or module._compiled_call_impl is not None


def _hook_module(stack, recorder, module, part):
    if module._compiled_call_impl is not None:  # module.compile() compiles the hooks, too
        _wrap(stack, recorder, module, "_compiled_call_impl", part)
        return
    entered = []

    def before(module, args):
        entered.append(recorder.enter(part))

    def after(module, args, output):
        if entered.pop():
            recorder.leave()

    # First before all other hooks and last after them: what they do is part of the module's forward.
    stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _wrap(stack, recorder, owner, name, part):
    _replace(stack, owner, name, recorder_call(recorder, getattr(owner, name), part))


def recorder_call(recorder, function, part):
    """``function``, marked as a part while it runs."""

    def wrapper(*args, **kwargs):
        entered = recorder.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            if entered:
                recorder.leave()

    return wrapper


def _replace(stack, owner, name, function):
    """Set an attribute of a module, a class or an object, until ``stack`` closes."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, function)
    stack.callback(delattr, owner, name) if before is missing else stack.callback(setattr, owner, name, before)


@contextlib.contextmanager
def claimed(models):
    """One profile at a time for a model: two would measure each other."""
    for model in models:
        if model in _CLAIMED:
            raise RuntimeError(f"profile.steps: this {type(model).__name__} is being profiled already")
    _CLAIMED.update(models)
    try:
        yield
    finally:
        _CLAIMED.difference_update(models)


_CLAIMED: set = set()
