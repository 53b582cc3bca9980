"""Compare compat.timm with the installed timm, and sk.EMA with the matching settings of timm."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from interop.helpers import rows
from lightly.models.utils import update_momentum as lightlys_update_momentum
from timm.utils import ModelEmaV3 as Original
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.testing._internal.two_tensor import TwoTensor

import selfsup_kernels as sk
from selfsup_kernels.compat.lightly import update_momentum
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


class Everything(nn.Module):
    """Parameters and buffers of every kind of number, and buffers that are views of each other."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(rows(3, 5))
        self.filter = nn.Parameter(torch.complex(rows(4, 2), rows(4, 2, seed=1)))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("flag", torch.tensor([True, True, False]))
        self.register_buffer("rotary", torch.complex(rows(6, 1, seed=2), rows(6, 1, seed=3)))
        self.register_buffer("low", rows(7, 2).half())
        self.register_buffer("table", rows(6, 4))
        self.register_buffer("head", self.table[:2])
        self.register_buffer("tail", self.table[1:5, 1:])


@torch.no_grad()
def change(model, step):
    for i, x in enumerate((*model.parameters(), *model.buffers())):
        x.copy_(~x if x.dtype == torch.bool else x + (step + i) / 3)


def numbers(module):
    found = {k.replace("_checkpoint_wrapped_module.", ""): v for k, v in state(module).items()}
    return {k: torch.stack([v.a, v.b]) if isinstance(v, TwoTensor) else v for k, v in found.items()}


def assert_same_numbers(ours, original):
    got, want = numbers(ours), numbers(original)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("exclude_buffers", [True, False])
def test_whatever_timm_takes(foreach, exclude_buffers):
    model = Everything()
    averages = [of(model, 0.9, exclude_buffers=exclude_buffers, foreach=foreach) for of in (ModelEmaV3, Original)]
    for step in range(5):
        change(model, step)
        for average in averages:
            average.update(model)
        assert_same_numbers(*averages)
    for average in averages:
        average.set(model)
    assert_same_numbers(*averages)


@pytest.mark.parametrize("foreach", [True, False])
def test_weights_of_a_wrapper_subclass(foreach):
    """The model has no plain parameters: in one list with a TwoTensor, ``_foreach_lerp_`` moves them twice."""
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)])
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(TwoTensor(rows(2, 2, seed=i), rows(2, 2, seed=4 + i)))
    averages = [of(model, 0.9, foreach=foreach) for of in (ModelEmaV3, Original)]
    for step in range(3):
        change(model, step)
        for average in averages:
            average.update(model)
    assert_same_numbers(*averages)


@pytest.mark.parametrize("exclude_buffers", [True, False])
def test_buffers_are_copied_as_by_copy_(exclude_buffers):
    """Buffers convert and broadcast as in ``copy_``, such as a count that has one dimension in an old checkpoint."""
    model, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    other.num_batches_tracked = torch.tensor(7.9)
    averages = [of(model, 0.9, exclude_buffers=exclude_buffers) for of in (ModelEmaV3, Original)]
    for average in averages:
        average.module.num_batches_tracked = torch.zeros(3, dtype=torch.int32)
        average.update(other)
    assert averages[0].module.num_batches_tracked.tolist() == [7, 7, 7]
    assert_same_numbers(*averages)


def test_averages_broadcast_and_convert_as_in_timm():
    model, other = nn.Linear(3, 4), nn.Linear(3, 1)
    other.bias = nn.Parameter(torch.tensor([3]), requires_grad=False)
    averages = [of(model, 0.75) for of in (ModelEmaV3, Original)]
    for average in averages:
        average.update(other)
    for (name, got), want in zip(averages[0].module.named_parameters(), averages[1].module.parameters(), strict=True):
        # If the dtypes differ, timm adds two rounded products.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match=r"weight \(source\): expected the shape"):
        ModelEmaV3(model, 0.75).update(nn.Linear(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("wrap", ["checkpointed", "scripted", "compiled"])
def test_wrapped_models(wrap):
    model = network()
    if wrap == "scripted":
        del model.scratch
        model = torch.jit.script(model)
    averages = [of(model, 0.9) for of in (ModelEmaV3, Original)]
    if wrap == "checkpointed":
        apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, nn.Linear))
    changed = torch.compile(model, backend="eager") if wrap == "compiled" else model
    for step in range(3):
        change(model, step)
        for average in averages:
            average.update(changed)
    assert_same_numbers(*averages)


def test_a_model_on_two_devices():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    averages = [of(model, 0.5) for of in (ModelEmaV3, Original)]
    with torch.no_grad():
        model[0].weight.add_(2)
    for average in averages:
        average.update(model)
    assert torch.equal(averages[0].module[0].weight, averages[1].module[0].weight)


@pytest.mark.parametrize("decay", [np.float32(0.75), np.int64(1), np.float64(0.75)])
def test_decays_of_numpy(decay):
    model = network()
    averages = [of(model, decay) for of in (ModelEmaV3, Original)]
    change(model, 1)
    for average in averages:
        average.update(model)
    assert_same_numbers(*averages)


def test_lightlys_average_of_every_kind_of_number():
    model = Everything()
    ours, original = copy.deepcopy(model), copy.deepcopy(model)
    for step in range(3):
        change(model, step)
        update_momentum(model, ours, 0.75)
        lightlys_update_momentum(model, original, 0.75)
    for name, value in numbers(original).items():
        torch.testing.assert_close(numbers(ours)[name], value, rtol=1e-6, atol=1e-6)
