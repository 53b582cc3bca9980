"""Hook whatever tells a recorder, for one step, which part of it runs; all hooks are gone after the step."""

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
    """Tell whether this is one of PyTorch's losses or a module whose class is called ...Loss, compiled or not."""
    module = wrappers.inner(module) if wrappers.is_compiled(module) else module
    return isinstance(module, nn.modules.loss._Loss) or type(module).__name__.endswith("Loss")


def _compiled(module) -> bool:
    return wrappers.is_compiled(module) or module._compiled_call_impl is not None


def _reached(models):
    """Yield modules, but none inside a loss or what is compiled."""
    for model in models:
        yield model
        if not is_loss(model) and not _compiled(model):
            yield from _reached(model.children())


def losses_in(models) -> list[nn.Module]:
    """Return the outermost loss modules that are not compiled together with what is around them."""
    return [module for module in dict.fromkeys(_reached(models)) if is_loss(module)]


def own_losses(models) -> list:
    """Return ``(module, name)`` of the methods that compute a loss in place of a loss module."""
    modules = [module for module in dict.fromkeys(_reached(models)) if not _compiled(module)]
    return [(module, name) for module in modules for kind, name in LOSS_METHODS.items() if isinstance(module, kind)]


def attach(stack, recorder, models, losses, calls):
    """Enter on ``stack``, a ``contextlib.ExitStack``, whatever marks the parts of a step.

    Args:
        models, losses: modules.
        calls: ``(owner, name, part)`` of methods that are a part, such as those of optimizers that are not PyTorch's.
    """
    for module in losses:
        _hook_module(stack, recorder, module, parts.LOSS_FORWARD)
    level = models
    for _ in range(DEPTH + 1):
        level = [m for m in dict.fromkeys(level) if m not in losses and not is_loss(m)]
        for module in level:
            _hook_module(stack, recorder, module, parts.ENCODER_FORWARD)
        # What is inside a compiled module would be traced with its hooks, or without them.
        level = [child for m in level if not _compiled(m) for child in m.children()]
    averages = dict.fromkeys(m for model in models for m in model.modules() if isinstance(m, EMA))
    calls = [*calls, *((owner, name, parts.LOSS_FORWARD) for owner, name in own_losses(models))]
    calls += [(average, "update", parts.EMA) for average in averages]
    calls += [(torch.amp.GradScaler, name, parts.OPTIMIZER) for name in ("unscale_", "step", "update")]
    for owner, name, part in dict.fromkeys([*calls, (torch.optim.Optimizer, "zero_grad", parts.OPTIMIZER)]):
        _replace(stack, owner, name, recorder.inside(part)(getattr(owner, name)))

    def before_step(*_):
        recorder.enter(parts.OPTIMIZER)  # and returns nothing: an optimizer takes that for arguments

    stack.callback(optimizers.register_optimizer_step_pre_hook(before_step).remove)
    stack.callback(optimizers.register_optimizer_step_post_hook(lambda *_: recorder.leave()).remove)
    _replace(stack, torch.autograd, "backward", graph.watched(recorder, torch.autograd.backward))


def _hook_module(stack, recorder, module, part):
    if module._compiled_call_impl is not None:  # module.compile() compiles the hooks, too
        _replace(stack, module, "_compiled_call_impl", recorder.inside(part)(module._compiled_call_impl))
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


def _replace(stack, owner, name, function):
    """Set an attribute of a module, a class or an object, until ``stack`` closes."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, function)
    stack.callback(delattr, owner, name) if before is missing else stack.callback(setattr, owner, name, before)
