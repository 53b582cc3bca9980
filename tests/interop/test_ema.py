"""compat.timm against the installed timm, and sk.EMA in its terms."""

import copy
import inspect
import itertools

import pytest
import torch
from interop.helpers import rows
from timm.utils import ModelEmaV3 as Original
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.compat.timm import ModelEmaV3


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    return model.to(dtype)


def train(model, steps, after):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        x = rows(16, 6, seed=step).to(next(model.parameters()).dtype)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.scratch.add_(1)
        after(step)


def state(module):
    return {k: v.detach() for k, v in (*module.named_parameters(), *module.named_buffers())}


def assert_equal(got, want, skip=()):
    got, want = state(got), state(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert name in skip or torch.equal(got[name], value), name


def test_the_signature_and_the_state():
    assert str(inspect.signature(ModelEmaV3.__init__).parameters.keys()) == str(
        inspect.signature(Original.__init__).parameters.keys()
    )
    for name, parameter in inspect.signature(Original.__init__).parameters.items():
        assert inspect.signature(ModelEmaV3.__init__).parameters[name].default == parameter.default, name
    ours, original = ModelEmaV3(network()), Original(network())
    assert list(ours.state_dict()) == list(original.state_dict())
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in original.parameters()]
    assert ours.training == original.training
    assert ours.module.training == original.module.training


SCHEDULES = [
    {},
    {"decay": 0.9},
    {"decay": 0.99, "use_warmup": True, "update_after_step": 5, "min_decay": 0.2},
    {"decay": 0.9, "use_warmup": True, "warmup_gamma": 3.0, "warmup_power": 0.9},
]


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_the_schedule(arguments):
    ours, original = ModelEmaV3(network(), **arguments), Original(network(), **arguments)
    for step in (None, *range(-1, 50), 10**4, 10**7):
        assert ours.get_decay(step) == original.get_decay(step)


@pytest.mark.parametrize("arguments", SCHEDULES)
@pytest.mark.parametrize(("exclude_buffers", "foreach"), list(itertools.product([False, True], repeat=2)))
def test_bit_for_bit_over_many_steps(arguments, exclude_buffers, foreach):
    model = network()
    averages = [
        of(model, exclude_buffers=exclude_buffers, foreach=foreach, **arguments) for of in (ModelEmaV3, Original)
    ]
    train(model, 200, lambda step: [average.update(model, step if step > 3 else None) for average in averages])
    assert_equal(*averages)
    for average in averages:
        average.set(model)
    assert_equal(*averages)


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_ema_in_timms_terms(exclude_buffers):
    model = network()
    original = Original(model, 0.95, exclude_buffers=exclude_buffers)
    ema = sk.EMA(model, 0.95, buffers="copy" if exclude_buffers else "average")
    train(model, 200, lambda step: (original.update(model), ema.update()))
    assert_equal(ema.module, original.module, skip=() if exclude_buffers else ["scratch"])


def test_a_float32_copy_of_a_bfloat16_model():
    model = network(torch.bfloat16)
    averages = [of(model, 0.9, dtype=torch.float32) for of in (ModelEmaV3, Original)]
    train(model, 100, lambda step: [average.update(model) for average in averages])
    for name, value in state(averages[1]).items():  # timm adds two rounded products here
        torch.testing.assert_close(state(averages[0])[name], value, rtol=1e-5, atol=1e-6)


def test_bfloat16_has_the_same_expectation():
    model = nn.Linear(128, 128, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    averages = [of(model, 0.998) for of in (ModelEmaV3, Original)]
    nn.init.constant_(model.weight, 2)
    for _ in range(200):
        for average in averages:
            average.update(model)
    ours, original = (average.module.weight.double().mean().item() for average in averages)
    assert ours == pytest.approx(original, abs=2e-3)
    assert original > 1.2


def test_a_device_given_by_name():
    model = network()
    averages = [of(model, 0.9, device=torch.device("cpu")) for of in (ModelEmaV3, Original)]
    train(model, 20, lambda step: [average.update(copy.deepcopy(model)) for average in averages])
    assert_equal(*averages)
