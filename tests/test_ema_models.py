"""EMA of real models, compared step by step with torch's AveragedModel: BatchNorm, torch.compile, tied weights, moved
and replaced parameters. The same for the drop-ins for timm's and torch's averages."""

import copy
import math

import pytest
import torch
from helpers import randn
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn as torch_ema_multi_avg_fn

import selfsup_kernels as sk
from selfsup_kernels.compat.swa_utils import get_ema_multi_avg_fn
from selfsup_kernels.compat.timm import ModelEmaV3
from selfsup_kernels.ema.named_tensors import named_tensors

DECAY = 0.97


class Network(nn.Module):
    """A model with BatchNorm statistics, tied weights, and a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 5, bias=False)
        self.conv = nn.Conv1d(1, 3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(12, 5)
        self.out = nn.Linear(5, 5)
        self.out.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.out(self.head(self.norm(self.conv(self.embed(x)[:, None])).flatten(1)))


def train(model, steps, after):
    """Train; call ``after(step)`` after every optimizer step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        x = 1 + randn(8, 5, seed=step)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def values(module):
    return {k.replace("_orig_mod.", ""): v.detach() for k, v in (*module.named_parameters(), *module.named_buffers())}


def assert_equal(got, want, skip=()):
    got, want = values(got), values(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name not in skip:
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_bit_for_bit_as_torch_over_many_steps(impl, buffers):
    model = Network()
    ema = sk.EMA(model, DECAY, buffers=buffers, impl=impl)
    average = AveragedModel(model, multi_avg_fn=torch_ema_multi_avg_fn(DECAY), use_buffers=buffers == "average")
    average.update_parameters(model)  # its first call copies

    def both(step):
        ema.update()
        average.update_parameters(model)

    train(model, 300, both)
    # When torch averages buffers, it also averages and truncates the batch count.
    assert_equal(ema.module, average.module, skip=["norm.num_batches_tracked"] if buffers == "average" else [])
    assert ema.module.norm.num_batches_tracked == 300


def test_batch_statistics_are_copied_by_default(impl):
    model = Network()
    ema = sk.EMA(model, DECAY, impl=impl)
    expected = {k: v.double() for k, v in values(model).items() if k in dict(model.named_parameters())}

    def follow(step):
        ema.update()
        for name, p in model.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * p.detach().double()

    train(model, 50, follow)
    for name, value in values(ema.module).items():
        if name in expected:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, values(model)[name]), name
    assert not torch.equal(ema.module.norm.weight, model.norm.weight)
    x = randn(4, 5)
    torch.testing.assert_close(ema.module.eval()(x), torch.func.functional_call(model.eval(), values(ema.module), x))


def test_the_drop_in_for_torchs_average_is_torchs(impl):
    for use_buffers in (True, False):
        model = Network()
        averages = [
            AveragedModel(model, multi_avg_fn=function(DECAY), use_buffers=use_buffers)
            for function in (get_ema_multi_avg_fn, torch_ema_multi_avg_fn)
        ]

        def both(step, averages=averages, model=model):
            for average in averages:
                average.update_parameters(model)

        train(model, 60, both)
        assert_equal(*averages)
        assert averages[0].n_averaged == 60
        assert averages[0].state_dict().keys() == averages[1].state_dict().keys()


def test_the_drop_in_for_torchs_average_of_other_dtypes():
    averages = [[torch.ones(3, dtype=torch.complex64)], [torch.tensor([5, 9, -7])], []]
    current = [[2j * torch.ones(3, dtype=torch.complex64)], [torch.tensor([6, 20, 8])], []]
    for average, other in zip(averages, current, strict=True):
        expected = [x.clone() for x in average]
        get_ema_multi_avg_fn(0.75)(average, other, 1)
        if expected:
            torch_ema_multi_avg_fn(0.75)(expected, other, 1)
            assert torch.equal(average[0], expected[0])
    average = [torch.ones(3)]
    get_ema_multi_avg_fn(0.75)(average, [torch.full((3,), 3.0, dtype=torch.bfloat16)], 1)
    assert average[0].tolist() == [1.5] * 3
    with pytest.raises(ValueError, match=r"decay.*1\.5"):
        get_ema_multi_avg_fn(1.5)


def test_a_compiled_model_moves_and_is_saved_under_its_own_names(impl):
    plain, compiled = Network(), torch.compile(Network(), backend="eager")
    assert all(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    emas = [sk.EMA(model, DECAY, impl=impl) for model in (plain, compiled)]
    for model, ema in zip((plain, compiled), emas, strict=True):
        train(model, 20, lambda step, ema=ema: ema.update())
    assert_equal(*emas)
    assert emas[0].state_dict().keys() == emas[1].state_dict().keys()
    assert not torch.equal(emas[0].module.head.weight, plain.head.weight)
    Network().load_state_dict(emas[1].module.state_dict())


def test_a_model_that_is_compiled_in_place_later(impl):
    model = Network()
    ema = sk.EMA(model, 0.0, impl=impl)
    model.head = torch.compile(model.head, backend="eager")
    model.compile(backend="eager")
    train(model, 2, lambda step: ema.update())
    assert_equal(ema.module, model)


def test_tensors_have_the_names_and_the_order_that_torch_gives_them():
    """A model with a part that has two names, parts and tensors that are None, and nested containers."""
    model = nn.Sequential(Network(), nn.ModuleList([nn.Sequential(nn.Linear(2, 3, bias=False)), nn.BatchNorm2d(3)]))
    model.again, model.last = model[1], nn.ParameterList([torch.ones(2), torch.zeros(3)])
    model.register_module("no_part", None)
    model.register_parameter("no_parameter", None)
    model.register_buffer("no_buffer", None)
    found = named_tensors(model)
    for own, expected in zip(found[:2], (model.named_parameters(), model.named_buffers()), strict=True):
        expected = list(expected)
        assert list(own) == [name for name, _ in expected]
        assert all(own[name] is tensor for name, tensor in expected)
    assert len(found[0]) > 5
    assert len(found[1]) > 3


def test_tied_weights_move_once_per_update(impl):
    model = Network()
    ema = sk.EMA(model, 0.5, impl=impl)
    before = ema.module.embed.weight.clone()
    with torch.no_grad():
        model.embed.weight.add_(8)
    ema.update()
    torch.testing.assert_close(ema.module.embed.weight, before + 4)
    assert ema.module.out.weight is ema.module.embed.weight


def _assign(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def _data(model):
    for p in model.parameters():
        p.data = p.data.clone() + 1


def _replace(model):
    model.head = nn.Linear(12, 5)


def _channels(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach().transpose(0, 2).contiguous().transpose(0, 2) + 1)


def _flat(model):
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for p in model.parameters():
        p.data, flat = flat[: p.numel()].view(p.shape) + 1, flat[p.numel() :]


@pytest.mark.parametrize("change", [_assign, _data, _replace, _channels, _flat, lambda model: model.double()])
def test_parameters_that_were_moved_or_replaced_are_followed(impl, change):
    model = Network()
    ema = sk.EMA(model, 0.5, buffers="average", impl=impl)
    ema.update()
    before = {k: v.clone() for k, v in values(ema.module).items()}
    change(model)
    # Tied weights that are untied by assignment become two parameters: a different model.
    if model.out.weight is not model.embed.weight:
        with pytest.raises(ValueError, match=r"only in the source: out\.weight"):
            ema.update()
        model.out.weight = model.embed.weight
    ema.update()
    source = values(model)
    for name, value in values(ema.module).items():
        want = 0.5 * before[name] + 0.5 * source[name].float() if value.is_floating_point() else source[name]
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_one_side_on_another_device_is_an_error_and_both_moved_are_not():
    model = Network()
    ema = sk.EMA(model)
    elsewhere = copy.deepcopy(model).to("meta")
    object.__setattr__(ema, "_model", elsewhere)
    with pytest.raises(ValueError, match=r"\(source\).*device.*cpu.*meta"):
        ema.update()
    ema.to("meta")
    ema.update()


# timm's


def schedule(step, start=10, gamma=2.0, power=0.75, lowest=0.3, highest=0.9):
    k = step - start - 1
    return 0.0 if k <= 0 else min(max(1 - (1 + k / gamma) ** -power, lowest), highest)


@pytest.mark.parametrize("exclude_buffers", [False, True])
@pytest.mark.parametrize("warmup", [False, True])
def test_timms_average(warmup, exclude_buffers):
    model = Network()
    ema = ModelEmaV3(
        model,
        0.9,
        min_decay=0.3,
        update_after_step=10,
        use_warmup=warmup,
        warmup_gamma=2.0,
        warmup_power=0.75,
        exclude_buffers=exclude_buffers,
    )
    assert not ema.module.training
    expected = values(copy.deepcopy(model))
    parameters = dict(model.named_parameters())

    def follow(step):
        model.scratch.add_(1)
        ema.update(model, step)
        decay = schedule(step) if warmup else 0.0 if step <= 11 else 0.9
        assert ema.get_decay(step) == pytest.approx(decay, abs=1e-15)
        for name, source in values(model).items():
            if name in parameters or (source.is_floating_point() and not exclude_buffers and name != "scratch"):
                expected[name] = torch.lerp(expected[name], source, 1 - decay)
            elif exclude_buffers or name != "scratch":
                expected[name] = source.clone()

    train(model, 40, follow)
    for name, value in values(ema.module).items():
        assert torch.equal(value, expected[name]), name
    assert ema.get_decay() == 0.9
    assert set(ema.state_dict()) == {f"module.{name}" for name in model.state_dict()}
    ema.set(model)
    assert_equal(ema.module, model, skip=["scratch"])


def test_timms_average_in_another_dtype():
    model = Network().bfloat16()
    ema = ModelEmaV3(model, 0.75, dtype=torch.float32)
    before = ema.module.head.weight.clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    ema.update(model)
    want = 0.75 * before.double() + 0.25 * model.head.weight.double()
    torch.testing.assert_close(ema.module.head.weight.double(), want, rtol=1e-6, atol=1e-7)


def test_timms_average_rounds_bfloat16_alone_at_random():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
            self.b = nn.Parameter(torch.ones(64, dtype=torch.float16))

    def after(**arguments):
        model = Mixed()
        ema = ModelEmaV3(model, 0.999, **arguments)
        state = torch.random.get_rng_state()
        with torch.no_grad():
            model.a.fill_(2), model.b.fill_(2)
        for _ in range(100):
            ema.update(model)
        assert torch.equal(torch.random.get_rng_state(), state)
        return ema.module

    moved = after()
    assert moved.a.double().mean().item() == pytest.approx(2 - 0.999**100, abs=0.01)
    assert torch.equal(moved.a, after().a)
    assert not torch.equal(moved.a, after(stochastic_rounding_seed=1).a)
    assert after(stochastic_rounding=False).a.eq(1).all()
    reference = torch.ones(64, dtype=torch.float16)
    for _ in range(100):
        reference.lerp_(torch.full((64,), 2.0, dtype=torch.float16), 1 - 0.999)
    torch.testing.assert_close(moved.b, reference, rtol=2e-3, atol=0)


def test_timms_average_of_wrapped_and_mismatched_models():
    model = Network()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        ema = ModelEmaV3(model, 0.0)
        ema.apply_update_(wrapped, math.nextafter(0.0, 1.0))
        ema.update(wrapped)
        assert_equal(ema.module, model, skip=["scratch"])
    ema = ModelEmaV3(torch.compile(model, backend="eager"), 0.0)
    ema.update(model)
    with pytest.raises(ValueError, match=r"only in the target: .*embed\.weight"):
        ema.update(nn.Linear(2, 2))
