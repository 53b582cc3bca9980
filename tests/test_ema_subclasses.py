"""EMA of tensors without plain memory (subclasses that override operators, FakeTensors, meta) and of dtypes that no
kernel takes: their own operators average them, while plain tensors of the same list go in one call."""

import copy

import pytest
import torch
from helpers import randn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.two_tensor import TwoTensor

import selfsup_kernels as sk
from selfsup_kernels.compat.lightly import update_momentum
from selfsup_kernels.compat.swa_utils import get_ema_multi_avg_fn
from selfsup_kernels.compat.timm import ModelEmaV3
from selfsup_kernels.ema import checks as lists


def two(value, *shape):
    return TwoTensor(torch.full(shape, float(value)), torch.full(shape, float(value) + 1))


def network(layers=2):
    """A model as in quantised training: some weights are of a subclass, biases and norms are plain."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)), nn.BatchNorm1d(3))
    for layer in model[:layers]:
        layer.weight = nn.Parameter(two(1, 3, 3))
        nn.init.ones_(layer.bias)
    return model


@torch.no_grad()
def move(model):
    for p in model.parameters():
        p.add_(2)


def swa(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    return average.module, lambda: average.update_parameters(model)


def ema(model, **arguments):
    average = sk.EMA(model, 0.5, **arguments)
    return average.module, average.update


def timm(model, **arguments):
    average = ModelEmaV3(model, 0.5, **arguments)
    return average.module, lambda: average.update(model)


def lightly(model):
    average = copy.deepcopy(model)
    return average, lambda: update_momentum(model, average, 0.5)


def modules(model):
    average = copy.deepcopy(model)
    return average, lambda: sk.ema_update_(average, model, torch.tensor([0.5]))


@pytest.mark.parametrize(
    "make",
    [
        ema,
        lambda model: ema(model, buffers="average"),
        timm,
        lambda model: timm(model, exclude_buffers=True),
        swa,
        lightly,
        modules,
    ],
    ids=["ema", "ema average", "timm", "timm no buffers", "swa", "lightly", "modules"],
)
def test_weights_of_a_wrapper_subclass_are_averaged(make):
    model = network()
    average, update = make(model)
    move(model)
    update()
    for layer in average[:2]:
        assert torch.equal(layer.weight.a, torch.full((3, 3), 2.0))
        assert torch.equal(layer.weight.b, torch.full((3, 3), 3.0))
        assert torch.equal(layer.bias.detach(), torch.full((3,), 2.0))
    assert torch.equal(average[2].weight.detach(), torch.full((3,), 2.0))


def test_plain_tensors_among_subclasses_go_in_one_call():
    class Labelled(nn.Parameter):
        """A subclass that overrides no operators, so it is plain memory."""

    own = [two(0, 2), torch.zeros(3), torch.zeros(4, dtype=torch.complex64), Labelled(torch.zeros(2)), torch.zeros(1)]
    new = [two(1, 2), torch.ones(3), torch.ones(4, dtype=torch.complex64), Labelled(torch.ones(2)), torch.ones(1)]
    with torch.no_grad():
        lanes = lists.check_update(own, new)
        assert [x.numel() for x in lanes.targets] == [3, 2, 1]
        assert {id(x) for x, _ in lanes.others} == {id(own[0]), id(own[2])}
        # A second call with the same memory uses the cached plan.
        assert [x.numel() for x in lists.check_update(own, new).targets] == [3, 2, 1]
    sk.ema_update_(own, new, 0.25)
    assert torch.equal(own[0].a, torch.full((2,), 0.75))
    assert all(torch.equal(x.detach(), torch.full_like(x, 0.75)) for x in own[1:])


def test_pairs_that_are_not_plain_are_checked_too(impl):
    plain = torch.zeros(3)
    for targets, sources, error, message in (
        ([plain, two(0, 2), two(0, 3)], [torch.ones(3), two(1, 2), two(1, 4)], ValueError, r"sources\[2\].*shape"),
        ([two(0, 2), plain, torch.zeros(2)], [two(1, 2), torch.ones(3), torch.ones(3)], ValueError, r"sources\[2\]"),
        ([plain, two(0, 2)], [torch.ones(3), torch.ones(2, dtype=torch.int64)], TypeError, r"sources\[1\].*int64"),
        ([plain, two(0, 2)], [torch.ones(3), "x"], TypeError, r"sources\[1\].*str"),
        ([two(0, 2), torch.zeros(2, device="meta")], [two(1, 2), torch.ones(2)], ValueError, r"targets\[1\].*meta"),
    ):
        with pytest.raises(error, match=message):
            sk.ema_update_(targets, sources, 0.5, impl=impl)
        assert torch.equal(plain, torch.zeros(3))
        assert torch.equal(two(0, 2).a, torch.zeros(2))
    twice, other = two(0, 2), two(1, 2)
    with pytest.raises(ValueError, match=r"targets\[2\].*once.*targets\[0\]"):
        sk.ema_update_([twice, plain, twice], [other, torch.ones(3), other], 0.5, impl=impl)
    sk.ema_update_([twice], [twice], 0.5, impl=impl)
    assert torch.equal(twice.a, torch.zeros(2))


def test_the_fused_optimizers_average_parameters_that_they_do_not_step(impl):
    """Frozen weights of a subclass, as with LoRA, and a plain part that trains."""
    model = network()
    for layer in model[:2]:
        layer.weight.requires_grad_(False)
    average = sk.EMA(model, 0.5, impl=impl)
    optimizer = sk.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0, ema=average, impl=impl)
    move(model)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for layer in average.module[:2]:
        assert torch.equal(layer.weight.a, torch.full((3, 3), 2.0))
        assert torch.equal(layer.bias.detach(), torch.full((3,), 2.0))


def test_the_fused_optimizers_refuse_to_step_them(impl):
    model = network(1)
    before = model[0].bias.detach().clone()
    for which, what in ((model.parameters(), "tensors"), ([model[0].bias], "gradients")):
        optimizer = sk.optim.SGD(which, 0.1, impl=impl)
        model.zero_grad()
        model(randn(4, 3)).sum().backward()
        assert isinstance(model[0].bias.grad, TwoTensor)  # of a plain parameter
        with pytest.raises(TypeError, match=rf"params: expected plain {what}, got a TwoTensor.*torch\.optim"):
            optimizer.step()
        assert torch.equal(model[0].bias, before)


@pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("optimizer", [None, sk.optim.SGD, sk.optim.AdamW, sk.optim.LARS])
def test_a_training_step_under_fake_tensors(optimizer):
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        average = sk.EMA(model, 0.5)
        if optimizer is None:
            average.update()
            average.update(torch.tensor(0.5))
            ModelEmaV3(model, 0.5).update(model)
            sk.ema_update_(list(average.module.parameters()), list(model.parameters()), 0.5)
        else:
            fused = optimizer(model.parameters(), lr=0.1, ema=average)
            sk.info_nce_loss([model(torch.randn(6, 3)), model(torch.randn(6, 3))]).backward()
            fused.step()
        assert [tuple(p.shape) for p in average.parameters()] == [(4, 3), (4,), (4,), (4,)]
        assert all(type(p).__name__ == "FakeTensor" for p in average.parameters())


def test_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for buffers in ("copy", "average"):
        sk.EMA(model, 0.5, buffers=buffers).update()
    sk.ema_update_([torch.zeros(2, device="meta")], [torch.zeros(2, device="meta")], 0.5)
    with pytest.raises(ValueError, match=r"sources\[0\].*shape"):
        sk.ema_update_([torch.zeros(2, device="meta")], [torch.zeros(3, device="meta")], 0.5)


def test_freed_memory_raises_instead_of_crashing(impl):
    """A parameter that is temporarily stored elsewhere."""
    freed, whole = torch.zeros(8)[3:], torch.ones(5)
    sk.ema_update_([whole], [freed], 0.5, impl=impl)
    freed.untyped_storage().resize_(0)
    for targets, sources, name in (([freed], [whole], "targets"), ([whole], [freed], "sources")):
        with pytest.raises(RuntimeError, match=rf"{name}\[0\].*freed"):
            sk.ema_update_(targets, sources, 0.5, impl=impl)
    assert torch.equal(whole, torch.full((5,), 0.5))


# Complex numbers


@pytest.mark.parametrize("momentum", [0.3, 0.9, torch.tensor(0.9), torch.tensor([0.3], dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_averaged_as_by_torch_lerp(impl, dtype, momentum):
    target, source = (torch.complex(randn(40, seed=i), randn(40, seed=i + 1)).to(dtype) for i in (0, 2))
    base = torch.zeros(40, 2, dtype=dtype)  # a column
    base[:, 1] = target
    expected = torch.lerp(target, source, 1 - float(momentum))
    got = [target.clone(), base[:, 1]]
    sk.ema_update_(got, [source, source], momentum, impl=impl)
    for x in got:
        torch.testing.assert_close(x, expected, rtol=0 if dtype == torch.complex64 else 1e-7, atol=0)
    assert torch.equal(base[:, 0], torch.zeros(40, dtype=dtype))


def test_complex_parameters_of_a_model(impl):
    model = nn.Linear(2, 2)
    model.filter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    average = sk.EMA(model, 0.5, impl=impl)
    with torch.no_grad():
        model.filter.mul_(3j)
        model.bias.fill_(4)
    before = average.module.bias.clone()
    for _ in range(2):
        average.update()
    assert torch.equal(average.module.filter, torch.full((3,), 0.25 + 2.25j))
    torch.testing.assert_close(average.module.bias, before / 4 + 3)


def test_complex_destinations_that_share_memory_are_refused(impl):
    base = torch.zeros(6, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"targets\[1\].*overlaps targets\[0\]"):
        sk.ema_update_([base[:4], base[3:]], [torch.ones(4).cfloat(), torch.ones(3).cfloat()], 0.5, impl=impl)
    with pytest.raises(RuntimeError, match="overlaps"):
        sk.ema_update_([base], [base.conj()], 0.5, impl=impl)  # one address, other numbers
    with pytest.raises(RuntimeError, match="overlaps"):
        sk.ema_update_([base, torch.view_as_real(base)], [torch.ones(6).cfloat(), torch.ones(6, 2)], 0.5, impl=impl)
    assert torch.equal(base, torch.zeros(6).cfloat())


@pytest.mark.parametrize("averaged", [True, False])
def test_conjugate_and_negative_views(impl, averaged):
    """The views differ from the tensor only in a bit; a later update of the same memory must see it too."""

    def update(target, source):
        if averaged:
            sk.ema_update_([target], [source], 0.25, impl=impl)
        else:
            lists.copy_(lists.check_update([target], [source], averaged=False))

    weight = 0.25 if averaged else 0.0
    for bit in (torch.conj, torch._neg_view):
        memory, value = (torch.complex(randn(4, seed=i), randn(4, seed=i + 1)) for i in (0, 2))
        for target, source in ((value, memory), (value, bit(memory)), (bit(value), memory), (value, memory)):
            want = weight * target.resolve_conj().resolve_neg() + (1 - weight) * source
            update(target, source)
            torch.testing.assert_close(target, want)
    for view in (lambda z: z.conj().imag, lambda z: torch._neg_view(z.real)):
        memory, value = (torch.complex(randn(4, seed=i), randn(4, seed=i + 1)) for i in (0, 2))
        for target, source in ((value.imag, memory.imag), (value.imag, view(memory)), (view(value), memory.imag)):
            want = weight * target.resolve_neg() + (1 - weight) * source
            update(target, source)
            torch.testing.assert_close(target, want)


def test_a_conjugate_of_the_destination_is_another_tensor(impl):
    z = torch.complex(randn(4), randn(4, seed=1))
    sk.ema_update_([z], [z], 0.5, impl=impl)
    with pytest.raises(RuntimeError, match=r"targets\[0\]: expected memory of its own"):
        sk.ema_update_([z], [z.conj()], 0.5, impl=impl)
    with pytest.raises(RuntimeError, match=r"targets\[0\]: expected memory of its own"):
        sk.ema_update_([z.imag], [z.conj().imag], 0.5, impl=impl)
