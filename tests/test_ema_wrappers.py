"""EMA of wrapped models, wrapped before or after the EMA is created; which parts of a model are copied, and how."""

import copy
import functools
import itertools
import threading

import pytest
import torch
from helpers import randn
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import selfsup_kernels as sk
from selfsup_kernels.compat.lightly import update_momentum
from selfsup_kernels.compat.timm import ModelEmaV3
from selfsup_kernels.ema.named_tensors import named_tensors

compiled = functools.partial(torch.compile, backend="eager")
WRAPPERS = {"compiled": compiled, "checkpointed": checkpoint_wrapper, "parallel": nn.DataParallel}


class Forwarding(nn.Module):
    """A wrapper like those of other libraries: it forwards missing attributes to the module inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.model(x))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)))


@torch.no_grad()
def fill(module, value):
    for p in module.parameters():
        p.fill_(value)


def assert_filled(module, value, count):
    got = list(module.parameters())
    assert len(got) == count
    assert all(torch.equal(p.detach(), torch.full_like(p, value)) for p in got)


def by_ema(model, change):
    ema = sk.EMA(model, 0.5)
    ema_model = change(model)
    object.__setattr__(ema, "_model", ema_model)
    return ema.module, ema.update, ema_model


def by_timm(model, change):
    ema = ModelEmaV3(model, 0.5)
    changed = change(model)
    return ema.module, lambda: ema.update(changed), changed


def by_lightly(model, change):
    target, changed = copy.deepcopy(model), change(model)
    return target, lambda: update_momentum(changed, target, 0.5), changed


def by_modules(model, change):
    target, changed = copy.deepcopy(model), change(model)
    return target, lambda: sk.ema_update_(target, changed, 0.5), changed


def by_modules_the_other_way(model, change):
    source, changed = copy.deepcopy(model), change(model)
    return changed, lambda: sk.ema_update_(changed, source, 0.5), source


WAYS = [by_ema, by_timm, by_lightly, by_modules, by_modules_the_other_way]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", list(itertools.permutations(WRAPPERS, 2)), ids="-".join)
def test_wrappers_in_any_order_and_depth_do_not_count(way, order):
    def change(model):
        for name in order:
            model[1][0], model[0] = WRAPPERS[name](model[1][0]), WRAPPERS[name](model[0])
        for name in order:
            model = WRAPPERS[name](model)
        return model

    model = network()
    fill(model, 1)
    target, update, source = way(model, change)
    fill(source, 3)
    update()
    assert_filled(target, 2, 5)


@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_that_is_applied_later(way):
    def change(model):
        apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, nn.Linear))
        assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
        return model

    model = network()
    fill(model, 1)
    target, update, source = way(model, change)
    fill(source, 3)
    update()
    assert_filled(target, 2, 5)


def test_a_models_own_parts_with_the_names_of_wrappers():
    """The wrappers stay in the names: without them, two parameters would share a name."""
    model = nn.Module()
    for owner, child in itertools.product(("a", "b"), ("module", "_orig_mod")):
        part = nn.Module()
        setattr(part, child, nn.Linear(2, 2))
        if owner == "a":
            part.weight = nn.Parameter(torch.zeros(3))
        else:
            part.head = nn.Linear(2, 3)
        model.add_module(owner + child, part)
    model.alone = nn.Module()
    model.alone.module = nn.Linear(2, 2)
    expected = dict(model.named_parameters())
    got = named_tensors(model).parameters
    assert list(got) == list(expected)
    assert all(got[name] is p for name, p in expected.items())


def test_a_wrapper_that_forwards_attributes_is_a_model_of_its_own():
    for make in (sk.EMA, ModelEmaV3):
        model = Forwarding(compiled(nn.Linear(3, 3)))
        assert isinstance(model._orig_mod, nn.Linear)
        fill(model, 1)
        ema = make(model, 0.5)
        fill(model, 3)
        ema.update(*[model] if make is ModelEmaV3 else [])
        assert type(ema.module) is Forwarding
        assert_filled(ema.module, 2, 4)
        assert ema(torch.ones(1, 3)).shape == (1, 2)


def test_exports_and_profiles_recognise_wrappers_by_type():
    from selfsup_kernels.lab.profile import hooks

    model = Forwarding(compiled(nn.Linear(3, 3)))
    assert {"head.weight", "head.bias"} <= sk.methods.export_encoder(model).keys()
    assert not hooks.is_loss(Forwarding(compiled(nn.MSELoss())))
    assert hooks.is_loss(compiled(nn.MSELoss()))
    loss = nn.MSELoss()
    assert hooks.losses_in([nn.Sequential(Forwarding(nn.Sequential(loss, compiled(nn.Linear(3, 3)))))]) == [loss]


# Scripted models


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted_models(whole):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = torch.jit.script(model) if whole else nn.Sequential(torch.jit.script(model), nn.Linear(3, 2))
    for ema in (sk.EMA(model, 0.5), ModelEmaV3(model, 0.5), sk.EMA(model, 0.5, dtype=torch.float64)):
        fill(model, 1)
        fill(ema.module, 1)
        fill(model, 3)
        model(randn(5, 3))
        ema.update(*[model] if isinstance(ema, ModelEmaV3) else [])
        assert_filled(ema.module, 2, 4 if whole else 6)
        assert all(p.is_leaf for p in ema.parameters())
        statistics = dict(ema.module.named_buffers())
        for name, value in model.named_buffers():
            if isinstance(ema, sk.EMA):
                assert torch.equal(statistics[name], value.to(statistics[name].dtype)), name
    assert not any(p.requires_grad for p in sk.EMA(model).parameters())


# What is copied


class Keeps(nn.Module):
    """A module that stores its last output, also in a list, and a hook that holds a handle."""

    def __init__(self, handle=None):
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.options = {"handles": [handle]}
        self.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.last, self.more = output, [output, (output,)]

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("make", [sk.EMA, ModelEmaV3])
def test_stored_outputs_are_copied_without_their_graph(make):
    model = Keeps()
    model(torch.ones(1, 3))
    module = make(model).module
    assert torch.equal(module.last, model.last)
    assert module.last is module.more[0] is module.more[1][0]
    assert module.last.is_leaf
    assert module.last.data_ptr() != model.last.data_ptr()
    module(torch.zeros(2, 3))
    assert module.last.shape == (2, 3)
    assert model.last.shape == (1, 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes(impl, norm):
    model = norm(nn.Linear(3, 3))
    model(torch.ones(1, 3))
    ema = sk.EMA(model, 0.5, impl=impl)
    expected = {k: p.detach() + 2 for k, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(4)
    ema.update()
    assert len(expected) == 2 + (norm is nn.utils.weight_norm)
    for name, p in ema.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])
    x = randn(2, 3)
    with torch.no_grad():
        got = ema.eval()(x)
        twin = copy.deepcopy(ema.module)
        assert torch.equal(got, twin(x))
    if norm is nn.utils.weight_norm:
        v = ema.module.weight_v
        torch.testing.assert_close(got, x @ (ema.module.weight_g * v / v.norm(dim=1, keepdim=True)).t() + twin.bias)


class Unlike(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_needs_a_copy_from_the_caller(impl):
    model = Unlike()
    with pytest.raises(RuntimeError, match=r"model: .*Unlike.*lock.*module="):
        sk.EMA(model)
    copies = [Unlike(), compiled(Unlike())]
    for own in copies:
        own.load_state_dict(model.state_dict() if own is copies[0] else copies[1].state_dict())
        ema = sk.EMA(model, 0.5, impl=impl, module=own)
        assert type(ema.module) is Unlike
        assert not any(p.requires_grad for p in own.parameters())
        fill(own, 1)
        fill(model, 3)
        ema.update()
        assert_filled(ema.module, 2, 2)
    wide = sk.EMA(model, 0.5, module=Unlike(), dtype=torch.float64, impl=impl)
    assert wide.module.weight.dtype == torch.float64
    wide.update(0.0)
    assert_filled(wide.module, 3, 2)


def test_a_copy_from_the_caller_that_does_not_match_raises():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    shared, overlapping, same_statistics = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    shared[0].weight = model[0].weight
    base = torch.zeros(6)
    model[0].bias.data, overlapping[0].bias.data = base[:2], base[1:3]
    same_statistics[1].running_var = model[1].running_var
    lacking = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    for module, error, message in (
        ("model", TypeError, "module: expected an nn.Module or None, got str"),
        (model, ValueError, r"module: expected memory of its own, but its 0\.weight is in the model's"),
        (shared, ValueError, r"module: .*0\.weight"),
        (overlapping, RuntimeError, r"module: .*0\.bias \(target\).*overlaps 0\.bias \(source\)"),
        (same_statistics, ValueError, r"module: .*1\.running_var"),
        (lacking, ValueError, r"module: .*only in the source: 1\.weight, 1\.bias"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), ValueError, r"module: .*0\.weight.*\(2, 3\)"),
    ):
        for buffers in ("copy", "average", "ignore"):
            with pytest.raises(error, match=message):
                sk.EMA(model, module=module, buffers=buffers)
    assert model[0].weight.requires_grad


class Headed(nn.DataParallel):
    """A wrapper with its own submodule."""

    def __init__(self, model):
        super().__init__(model)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.module(x))


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["plain", "compiled"])
def test_a_subclass_of_a_wrapper_with_parts_of_its_own_is_a_model(impl, wrap):
    model = Headed(network())
    ema = sk.EMA(wrap(model), 0.5, impl=impl)
    assert type(ema.module) is Headed
    fill(ema, 1)
    fill(model, 3)
    ema.update()
    assert_filled(ema, 2, 7)
    x = torch.ones(2, 3)
    model.load_state_dict(ema.module.state_dict())
    assert torch.equal(ema.eval()(x), model.eval()(x))
