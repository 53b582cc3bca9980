"""The EMA module: copies, averages, changes of the model, errors, saving and loading; the momentum schedule."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk


class Model(nn.Module):
    """A model with running statistics, an integer buffer, a non-persistent buffer, and tied weights."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.stem.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.norm(self.stem(x)) + self.tied(x)


def move(model, seed):
    """Change parameters and statistics, like an optimizer step and a forward in training mode."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(randn(p.numel(), seed=seed + i).view(p.shape))
        for b in model.buffers():
            b.add_(torch.ones_like(b))


def values(module):
    return {k: v.detach().clone() for k, v in (*module.named_parameters(), *module.named_buffers())}


def assert_same(module, expected, rtol=0.0, atol=0.0):
    got = values(module)
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def test_the_copy(impl):
    model = Model()
    model(randn(5, 3)).sum().backward()
    ema = sk.EMA(model, impl=impl)
    assert_same(ema.module, values(model))
    assert model.stem.weight.requires_grad
    for p in ema.parameters():
        assert not p.requires_grad
        assert p.grad is None
    assert ema.module.tied.weight is ema.module.stem.weight
    assert {id(p) for p in ema.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert all(name.startswith("module.") for name in ema.state_dict())
    x = randn(4, 3, seed=5)
    assert torch.equal(ema.eval()(x), model.eval()(x))


def test_mode_follows_the_owner():
    model = Model().eval()
    ema = sk.EMA(model)
    assert not ema.module.training
    owner = nn.ModuleList([ema])
    owner.train()
    assert ema.module.training
    assert ema.module.norm.training
    assert not model.training  # the model is not a submodule


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_updates_match_the_equation_and_buffers_follow_the_policy(impl, buffers):
    model = Model()
    ema = sk.EMA(model, 0.9, buffers=buffers, impl=impl)
    expected = values(ema.module)
    for step, momentum in enumerate([None, 0.5, torch.tensor(0.25), 1.0, 0.0]):
        move(model, step)
        source = values(model)
        ema.update(momentum)
        m = 0.9 if momentum is None else float(momentum)
        for name, t in expected.items():
            parameter = name in dict(model.named_parameters())
            if parameter or (buffers == "average" and t.is_floating_point()):
                expected[name] = (m * t.double() + (1 - m) * source[name].double()).to(t.dtype)
            elif buffers != "ignore":
                expected[name] = source[name]
        assert_same(ema.module, expected, rtol=1e-6, atol=1e-6)
        assert values(model).keys() == source.keys()
        assert_same(model, source)


def test_a_float32_copy_of_a_bfloat16_model(impl):
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1)
    ema = sk.EMA(model, 0.999, dtype=torch.float32, impl=impl)
    assert ema.module.weight.dtype == torch.float32
    with torch.no_grad():
        model.weight.fill_(2)
    for _ in range(200):
        ema.update()
    torch.testing.assert_close(ema.module.weight, torch.full((8, 8), 2 - 0.999**200), rtol=1e-5, atol=0)


def test_a_low_precision_copy_warns_unless_it_rounds_stochastically(impl):
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16"):
        sk.EMA(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema = sk.EMA(model, 0.999, stochastic_rounding=True, impl=impl)
        sk.EMA(model, dtype=torch.float32)
    with torch.no_grad():
        model.weight.fill_(2)
        ema.module.weight.fill_(1)
    for _ in range(100):
        ema.update()
    assert ema.module.weight.double().mean().item() == pytest.approx(2 - 0.999**100, abs=0.01)


def test_tied_weights_move_once(impl):
    model = Model()
    ema = sk.EMA(model, 0.5, impl=impl)
    before = ema.module.stem.weight.clone()
    with torch.no_grad():
        model.stem.weight.add_(8)
    ema.update()
    torch.testing.assert_close(ema.module.stem.weight, before + 4)
    assert ema.module.tied.weight is ema.module.stem.weight


@pytest.mark.parametrize("wrap", ["compiled", "data_parallel", "both"])
def test_a_wrapper_is_treated_as_the_module_inside(impl, wrap):
    model = Model()
    wrapped = nn.DataParallel(model) if wrap != "compiled" else model
    wrapped = torch.compile(wrapped, backend="eager") if wrap != "data_parallel" else wrapped
    ema = sk.EMA(wrapped, 0.0, impl=impl)
    assert type(ema.module) is Model
    move(model, 0)
    ema.update()
    assert_same(ema.module, values(model))


def test_a_part_that_is_compiled_later_is_not_skipped(impl):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = sk.EMA(model, 0.0, impl=impl)
    first = model[0]
    model[0] = torch.compile(first, backend="eager")
    assert "0._orig_mod.weight" in dict(model.named_parameters())
    move(model, 0)
    ema.update()
    assert torch.equal(ema.module[0].weight, first.weight)


def test_replaced_and_converted_parameters_are_noticed(impl):
    model = Model()
    ema = sk.EMA(model, 0.0, impl=impl)
    model.stem.bias = nn.Parameter(torch.full((4,), 7.0))
    model.norm = nn.BatchNorm1d(4).double()
    model.norm.weight.data.fill_(3)
    ema.update()
    assert torch.equal(ema.module.stem.bias, torch.full((4,), 7.0))
    assert torch.equal(ema.module.norm.weight, torch.full((4,), 3.0))
    model.to(torch.bfloat16)
    move(model, 3)
    ema.update()
    assert torch.equal(ema.module.stem.weight, model.stem.weight.float())


def _resize(model):
    model.stem.bias = nn.Parameter(torch.zeros(5))


def _resize_a_buffer(model):
    model.norm.running_mean = torch.zeros(5)


def _retype_a_buffer(model):
    model.norm.num_batches_tracked = torch.tensor(0.0)


def _add(model):
    model.head = nn.Linear(1, 1)


def _remove(model):
    model.stem.bias = None


def _untie(model):
    model.tied.weight = nn.Parameter(torch.zeros(4, 3))


def _move(model):
    model.stem.bias = nn.Parameter(torch.zeros(4, device="meta"))


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_resize, ValueError, r"stem\.bias \(source\).*\(4,\).*\(5,\)"),
        (_resize_a_buffer, ValueError, r"norm\.running_mean \(source\).*\(4,\).*\(5,\)"),
        (_retype_a_buffer, TypeError, r"norm\.num_batches_tracked \(source\).*int64.*float32"),
        (_add, ValueError, r"only in the source: head\.weight, head\.bias"),
        (_remove, ValueError, r"only in the target: stem\.bias"),
        (_untie, ValueError, r"only in the source: tied\.weight"),
        (_move, ValueError, r"stem\.bias \(source\).*device.*meta"),
    ],
)
def test_a_model_that_no_longer_fits_is_refused_and_nothing_changes(impl, buffers, change, error, message):
    model = Model()
    ema = sk.EMA(model, 0.5, buffers=buffers, impl=impl)
    move(model, 0)
    change(model)
    before = values(ema.module)
    with pytest.raises(error, match=message):
        ema.update()
    assert_same(ema.module, before)


def test_a_refused_momentum_changes_nothing(impl):
    model = Model()
    ema = sk.EMA(model, impl=impl)
    move(model, 0)
    before = values(ema.module)
    for momentum in (1.5, math.nan, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="momentum"):
            ema.update(momentum)
    assert_same(ema.module, before)


def test_complex_buffers_are_copied(impl):
    model = nn.Linear(2, 2)
    model.register_buffer("rotary", torch.ones(3, dtype=torch.complex64))
    ema = sk.EMA(model, impl=impl)
    model.rotary.mul_(2j)
    ema.update()
    assert torch.equal(ema.module.rotary, model.rotary)


# State


def saved(ema):
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_round_trip():
    model = Model()
    ema = sk.EMA(model)
    move(model, 0)
    ema.update(0.5)
    other = sk.EMA(Model(seed=3))
    assert not torch.equal(other.module.stem.weight, ema.module.stem.weight)
    result = other.load_state_dict(saved(ema))
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, tensor in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_state_of_another_precision_is_converted():
    state = {k: v.double() if v.is_floating_point() else v for k, v in sk.EMA(Model(seed=1)).state_dict().items()}
    ema = sk.EMA(Model())
    ema.load_state_dict(state)
    assert ema.module.stem.weight.dtype == torch.float32
    assert torch.equal(ema.module.stem.weight, Model(seed=1).stem.weight)


def test_a_refused_state_names_everything_and_changes_nothing():
    ema = sk.EMA(Model())
    state = saved(sk.EMA(Model(seed=1)))
    state["module.norm.weight"] = torch.zeros(5)
    state["module.norm.running_var"] = 3.0
    state["module.stem.bias"] = torch.zeros(4, device="meta")
    del state["module.tied.bias"]
    state["module.other"] = torch.zeros(1)
    before = values(ema.module)
    with pytest.raises(RuntimeError) as caught:
        ema.load_state_dict(state)
    for part in (
        "size mismatch for module.norm.weight: copying a param with shape torch.Size([5])",
        '"module.norm.running_var", expected torch.Tensor or Tensor-like object from checkpoint but received',
        'While copying the parameter named "module.stem.bias"',
        'Missing key(s) in state_dict: "module.tied.bias"',
        'Unexpected key(s) in state_dict: "module.other"',
    ):
        assert part in str(caught.value)
    assert_same(ema.module, before)
    with pytest.raises(TypeError, match=r"state_dict.*list"):
        ema.load_state_dict([])


def test_a_models_state_is_refused_and_loads_into_the_module_inside():
    model = Model(seed=1)
    ema = sk.EMA(Model())
    before = values(ema.module)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"state_dict: .*that of a model; use ema\.module\.load_state_dict"):
            ema.load_state_dict(model.state_dict(), strict=strict)
    assert_same(ema.module, before)
    ema.module.load_state_dict(model.state_dict())


def test_non_strict_loading_skips_missing_names_but_not_other_shapes():
    ema, state = sk.EMA(Model()), saved(sk.EMA(Model(seed=1)))
    del state["module.tied.bias"]
    state["module.other"] = torch.zeros(1)
    before = values(ema.module)
    result = ema.load_state_dict(state, strict=False)
    assert result.missing_keys == ["module.tied.bias"]
    assert result.unexpected_keys == ["module.other"]
    assert torch.equal(ema.module.stem.weight, state["module.stem.weight"])
    assert torch.equal(ema.module.tied.bias, before["tied.bias"])
    before = values(ema.module)
    state["module.stem.bias"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"module\.stem\.bias"):
        ema.load_state_dict({k: v + 1 for k, v in state.items()}, strict=False)
    assert_same(ema.module, before)


def test_a_deep_copy_of_an_owner_follows_its_own_model(impl):
    owner = nn.Module()
    owner.model = Model()
    owner.ema = sk.EMA(owner.model, 0.0, impl=impl)
    assert len(list(owner.named_parameters())) == 10  # five each, the model only once
    twin = copy.deepcopy(owner)
    before = values(owner.ema.module)
    move(twin.model, 0)
    twin.ema.update()
    owner.ema.update()
    assert_same(twin.ema.module, values(twin.model))
    assert_same(owner.ema.module, before)


def test_moving_the_owner_moves_the_copy(impl):
    owner = nn.Module()
    owner.model = Model()
    owner.ema = sk.EMA(owner.model, 0.5, impl=impl)
    owner.double()
    assert owner.ema.module.stem.weight.dtype == torch.float64
    move(owner.model, 0)
    owner.ema.update(0.0)
    assert torch.equal(owner.ema.module.stem.weight, owner.model.stem.weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "resnet"}, TypeError, "model"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"momentum": torch.tensor(0.5)}, TypeError, "momentum"),
        ({"buffers": "clone"}, ValueError, "buffers.*copy, average, ignore.*clone"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"impl": "fast"}, ValueError, "impl"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sk.EMA(**({"model": nn.Linear(2, 2)} | arguments))


def test_repr():
    text = repr(sk.EMA(nn.Linear(2, 2), 0.99, buffers="ignore"))
    assert "momentum=0.99" in text
    assert "buffers='ignore'" in text


# The schedule


def test_cosine_momentum():
    for step in range(0, 101, 10):
        expected = 1 - (1 - 0.99) * (math.cos(math.pi * step / 100) + 1) / 2
        assert sk.cosine_momentum(step, 100, base=0.99) == pytest.approx(expected, abs=1e-15)
    assert sk.cosine_momentum(0, 100) == pytest.approx(0.996, abs=1e-15)
    assert sk.cosine_momentum(50, 100, 0.5, 0.7) == pytest.approx(0.6)
    assert sk.cosine_momentum(100, 100) == 1
    assert sk.cosine_momentum(10**9, 100, final=0.999) == 0.999
    assert all(0 <= sk.cosine_momentum(k, 7, 0.0) <= 1 for k in range(9))


def test_cosine_momentum_of_a_tensor():
    for step in (0, 3, 7, 12):
        got = sk.cosine_momentum(torch.tensor(step), 7, base=0.9)
        assert got.shape == ()
        assert got.item() == pytest.approx(sk.cosine_momentum(step, 7, base=0.9), abs=1e-6)
        assert 0 <= got.item() <= 1


def test_numbers_of_numpy(impl):
    for number in (np.float32, np.float64, np.float16, np.int64, np.uint8):
        expected = sk.cosine_momentum(3, 12, 0.0, 1)
        got = sk.cosine_momentum(number(3), number(12), number(0), number(1))
        assert type(got) is float
        assert got == pytest.approx(expected, abs=1e-12)
        ema = sk.EMA(nn.Linear(2, 2), number(1), impl=impl)
        assert type(ema.momentum) is float
        before = ema.module.weight.clone()
        with torch.no_grad():
            ema._model.weight.add_(1)
        ema.update(number(1))
        assert torch.equal(ema.module.weight, before)
        ema.update(number(0))
        assert torch.equal(ema.module.weight, before + 1)
    target = torch.zeros(3)
    sk.ema_update_([target], [torch.ones(3)], np.float32(0.75), impl=impl)
    assert torch.equal(target, torch.full((3,), 0.25))
    for momentum in (np.float32(1.5), np.int64(-1), np.float64("nan")):
        with pytest.raises(ValueError, match="momentum"):
            sk.ema_update_([target], [torch.ones(3)], momentum, impl=impl)
    for momentum in (np.bool_(True), np.array([0.5, 0.5]), None):
        with pytest.raises(TypeError, match="momentum"):
            sk.ema_update_([target], [torch.ones(3)], momentum, impl=impl)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_momenta_and_steps_of_one_element(impl, shape):
    model = nn.Linear(2, 2)
    ema = sk.EMA(model, impl=impl)
    before = ema.module.weight.clone()
    with torch.no_grad():
        model.weight.add_(4)
    momentum = torch.full(shape, 0.75)
    ema.update(momentum)
    torch.testing.assert_close(ema.module.weight, before + 1)
    optimizer = sk.optim.SGD(model.parameters(), 0.0, ema=ema, impl=impl)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(momentum=momentum)
    torch.testing.assert_close(ema.module.weight, before + 1.75)
    assert momentum.shape == shape
    got = sk.cosine_momentum(torch.full(shape, 3), 7)
    assert got.shape == ()
    assert got.item() == pytest.approx(sk.cosine_momentum(3, 7), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 10), ValueError, "step"),
        ((math.nan, 10), ValueError, "step"),
        (("1", 10), TypeError, "step"),
        ((torch.ones(2), 10), ValueError, "step"),
        ((1, 0), ValueError, "max_steps"),
        ((1, 10, 1.5), ValueError, "base"),
        ((1, 10, 0.5, -1), ValueError, "final"),
        ((1, 10, "0.5"), TypeError, "base"),
        ((1, 10, 0.5, np.bool_(True)), TypeError, "final.*bool"),
        ((1, 10**400), ValueError, "max_steps.*float64"),
        ((10**400, 10), ValueError, "step.*float64"),
    ],
)
def test_cosine_momentum_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sk.cosine_momentum(*arguments)
