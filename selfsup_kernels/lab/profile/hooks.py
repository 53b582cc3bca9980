"""Hooks that tell a recorder, for one step, which part of it runs; all of them are gone after the step."""

import functools

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from selfsup_kernels.core import wrappers
from selfsup_kernels.ema import EMA
from selfsup_kernels.lab.profile import graph, parts
from selfsup_kernels.methods import BYOLContrast, MoCo

DEPTH = 2
"""Modules down to the model's grandchildren count as the encoder's forward where they are called by themselves."""

LOSS_METHODS = {MoCo: "contrast", BYOLContrast: "_byol"}
"""Methods of the package that compute a loss outside of a loss module."""


def is_loss(module) -> bool:
    """Whether this is one of PyTorch's losses or a module whose class is called ...Loss, compiled or not."""
    module = wrappers.inner(module) if wrappers.is_compiled(module) else module
    return isinstance(module, nn.modules.loss._Loss) or type(module).__name__.endswith("Loss")


def losses_in(models) -> list[nn.Module]:
    """The outermost loss modules that are not compiled together with what is around them."""
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


def attach(stack, recorder, models, losses, optimizers_given, averaging):
    """Enter on ``stack``, a ``contextlib.ExitStack``, whatever marks the parts of a step.

    Args:
        models, losses: modules.
        optimizers_given: those that are not PyTorch's; PyTorch's need no hint.
        averaging: ``(owner, name)`` of the methods outside of ``models`` that update a moving average.
    """
    for module in losses:
        _hook_module(stack, recorder, module, parts.LOSS_FORWARD)
    for module in _encoders(models, set(losses)):
        _hook_module(stack, recorder, module, parts.ENCODER_FORWARD)
    averages = dict.fromkeys(m for model in models for m in model.modules() if isinstance(m, EMA))
    calls = [(owner, name, parts.LOSS_FORWARD) for owner, name in own_losses(models)]
    calls += [(owner, name, parts.EMA) for owner, name in [*((m, "update") for m in averages), *averaging]]
    calls += [(torch.amp.GradScaler, name, parts.OPTIMIZER) for name in ("unscale_", "step", "update")]
    calls += [(optimizer, "step", parts.OPTIMIZER) for optimizer in optimizers_given]
    for owner, name, part in [*calls, (torch.optim.Optimizer, "zero_grad", parts.OPTIMIZER)]:
        _replace(stack, owner, name, _marked(recorder, getattr(owner, name), part))

    def before_step(*_):
        recorder.enter(parts.OPTIMIZER)  # and returns nothing: an optimizer takes that for arguments

    stack.callback(optimizers.register_optimizer_step_pre_hook(before_step).remove)
    stack.callback(optimizers.register_optimizer_step_post_hook(lambda *_: recorder.leave()).remove)
    _replace(stack, torch.autograd, "backward", graph.watched(recorder, torch.autograd.backward))


def _encoders(models, losses):
    """Modules whose call, where none of them is running yet, is the encoder's forward."""
    found, level = {}, list(models)
    for _ in range(DEPTH + 1):
        level = [m for m in level if m not in losses and not is_loss(m)]
        found |= dict.fromkeys(level)
        # What is inside a compiled module would be traced with its hooks, or without them.
        level = [child for m in level if not _compiled(m) for child in m.children()]
    return found


def _compiled(module) -> bool:
    return wrappers.is_compiled(module) or module._compiled_call_impl is not None


def _hook_module(stack, recorder, module, part):
    if module._compiled_call_impl is not None:  # module.compile() compiles the hooks, too
        _replace(stack, module, "_compiled_call_impl", _marked(recorder, module._compiled_call_impl, part))
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


def _marked(recorder, function, part):
    @functools.wraps(function)
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
