"""Arguments of the fused optimizers: torch's own by name, numbers and parameters of every kind."""

import copy
import math

import pytest
import torch
from helpers import randn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import selfsup_kernels as sk

OURS = [sk.optim.SGD, sk.optim.LARS, sk.optim.AdamW]
PAIRS = [(sk.optim.SGD, torch.optim.SGD), (sk.optim.AdamW, torch.optim.AdamW)]


def stepped(make, n=5, dtype=torch.float64, steps=2, **arguments):
    p = nn.Parameter(randn(n, dtype=dtype))
    optimizer = make([p], **arguments)
    for step in range(steps):
        p.grad = randn(n, dtype=dtype, seed=1 + step)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("value", [None, True, False])
def test_foreach_and_fused_change_nothing(impl, ours, value):
    want = stepped(ours, lr=0.1, impl=impl)
    for arguments in ({"foreach": value}, {"fused": value}, {"foreach": value, "fused": value}):
        assert torch.equal(stepped(ours, lr=0.1, impl=impl, **arguments), want)
    # GradScaler expects torch's fused kernels to divide the gradients by the scale.
    assert not getattr(ours([nn.Parameter(torch.zeros(1))], fused=value), "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_foreach_and_fused_are_bools(ours, name):
    with pytest.raises(TypeError, match=f"{name}: expected None or a bool, got str"):
        ours([nn.Parameter(torch.zeros(1))], **{name: "yes"})


@pytest.mark.parametrize(
    ("ours", "name"),
    [(ours, "differentiable") for ours in OURS] + [(sk.optim.AdamW, "amsgrad"), (sk.optim.AdamW, "capturable")],
)
def test_options_of_torchs_own_class(impl, ours, name):
    assert torch.equal(stepped(ours, lr=0.1, impl=impl, **{name: False}), stepped(ours, lr=0.1, impl=impl))
    with pytest.raises(ValueError, match=f"{name}: not supported by {ours.__name__}; use torch.optim's own class"):
        ours([nn.Parameter(torch.zeros(1))], **{name: True})


def test_amsgrad_is_the_sixth_argument_as_in_torch():
    with pytest.raises(ValueError, match="amsgrad: not supported by AdamW"):
        sk.optim.AdamW([nn.Parameter(torch.zeros(1))], 0.1, (0.9, 0.99), 1e-8, 0.1, True)


@pytest.mark.parametrize("ours", OURS)
def test_options_in_a_loaded_state(impl, ours):
    """A state of torch's foreach or fused class loads; one with ``differentiable`` makes the next step raise."""
    theirs = torch.optim.AdamW if ours is sk.optim.AdamW else torch.optim.SGD
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = ours([p], lr=0.1, impl=impl)
    for arguments in ({"foreach": True}, {"fused": True}):
        source = theirs([p], lr=0.1, **arguments)
        source.step()
        optimizer.load_state_dict(source.state_dict())
        optimizer.step()
    optimizer.load_state_dict(theirs([p], lr=0.1, differentiable=True).state_dict())
    with pytest.raises(ValueError, match="differentiable: not supported"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["float64", "float32", "float16"])
def test_numbers_of_numpy(impl, kind):
    """Options may be any kind of NumPy number; the values are exact in float16."""
    kind = getattr(pytest.importorskip("numpy"), kind)
    sgd = {"lr": 0.125, "momentum": 0.5, "weight_decay": 0.25}
    for more in ({"dampening": 0.25}, {"nesterov": True}):
        want = stepped(torch.optim.SGD, **sgd, **more)
        given = {name: kind(value) if not isinstance(value, bool) else value for name, value in (sgd | more).items()}
        torch.testing.assert_close(stepped(sk.optim.SGD, impl=impl, **given), want, rtol=1e-13, atol=1e-13)
    adamw = {"lr": 0.125, "eps": 2.0**-10, "weight_decay": 0.25}
    want = stepped(torch.optim.AdamW, betas=(0.5, 0.75), **adamw)
    given = {name: kind(value) for name, value in adamw.items()}
    got = stepped(sk.optim.AdamW, impl=impl, betas=(kind(0.5), kind(0.75)), **given)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    lars = {"lr": 0.125, "weight_decay": 0.25, "trust_coefficient": 0.5, "eps": 2.0**-10}
    want = stepped(sk.optim.LARS, impl=impl, **lars)
    assert torch.equal(stepped(sk.optim.LARS, impl=impl, **{name: kind(value) for name, value in lars.items()}), want)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_whole_numbers(impl, ours, theirs):
    numpy = pytest.importorskip("numpy")
    for one in (1, numpy.int64(1), torch.tensor(1), torch.tensor([1], dtype=torch.int32)):
        got = stepped(ours, lr=one, weight_decay=numpy.int64(0), impl=impl)
        torch.testing.assert_close(got, stepped(theirs, lr=1.0, weight_decay=0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_rate_in_a_tensor_of_one_element(impl, ours, theirs, shape, dtype):
    """The rate may be a tensor of one element, for parameters with and without dimensions."""
    lr = torch.full(shape, 0.125, dtype=dtype, requires_grad=dtype == torch.float64)
    for n in ((), 5):
        p, q = (nn.Parameter(randn(*([n] if n else []), dtype=torch.float64)) for _ in range(2))
        optimizers = [ours([p], lr=lr, impl=impl), theirs([q], lr=0.125)]
        for step in range(2):
            for x, optimizer in zip((p, q), optimizers, strict=True):
                x.grad = torch.full_like(x, 0.5 - step)
                optimizer.step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert p.shape == q.shape


@pytest.mark.parametrize("ours", OURS)
def test_a_rate_that_is_not_a_number(impl, ours):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = ours([p], lr=0.1, impl=impl)
    for bad in (torch.tensor([0.1, 0.2]), torch.tensor(0.1 + 1j)):
        optimizer.param_groups[0]["lr"] = bad
        with pytest.raises(ValueError, match="lr: expected a number or a real tensor of one element"):
            optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match="lr: expected the device of params, cpu, got meta"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))


class Named(torch.Tensor):
    """A subclass with plain memory that overrides no operators."""


@pytest.mark.parametrize("ours", OURS)
def test_tensors_that_override_operators(impl, ours):
    """The kernels would read memory that a wrapper tensor lacks; a plain subclass works like any tensor."""
    plain, wrapper = nn.Parameter(torch.ones(3)), nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    for p in (plain, wrapper):
        p.grad = torch.ones_like(p)
    optimizer = ours([{"params": [plain]}, {"params": [wrapper]}], lr=0.1, impl=impl)
    with pytest.raises(TypeError, match=r"params: expected plain tensors, got a TwoTensor .* torch\.optim's own"):
        optimizer.step()
    assert torch.equal(plain.detach(), torch.ones(3))
    assert not any(optimizer.state.values())
    named = nn.Parameter(torch.ones(3).as_subclass(Named))
    named.grad = torch.ones(3)
    ours([named], lr=0.1, impl=impl).step()
    optimizer = ours([plain], lr=0.1, impl=impl)
    optimizer.step()
    assert torch.equal(named.detach().as_subclass(torch.Tensor), plain.detach())


@pytest.mark.parametrize("ours", OURS)
def test_parameters_without_memory(ours):
    """Tensors may have only a shape: on the meta device, or as fake tensors of tools that estimate memory."""
    p = nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    ours([p], lr=0.1).step()
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = ours([p], lr=0.1)
        optimizer.step()
        assert all(x.shape == p.shape for name, x in optimizer.state[p].items() if name != "step")


@pytest.mark.parametrize("ours", OURS)
def test_parameters_of_other_dtypes(impl, ours):
    """Frozen parameters are skipped; those with a gradient raise because of their dtype."""
    counts = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    ours([counts, p], lr=0.1, impl=impl).step()
    assert counts.tolist() == [1, 2]
    phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    phase.grad = torch.ones_like(phase)
    with pytest.raises(TypeError, match="params: expected float64, float32, bfloat16 or float16, got complex64"):
        ours([phase], lr=0.1, impl=impl).step()


@pytest.mark.parametrize("ours", OURS)
def test_an_expanded_parameter_changes_nothing(impl, ours):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1).expand(3))
    for x in (p, q):
        x.grad = torch.ones(3)
    optimizer = ours([p, q], lr=0.1, impl=impl)
    with pytest.raises(RuntimeError, match=r"params: expected elements that do not share memory.*strides \(0,\)"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("ours", OURS)
def test_parameters_without_elements(impl, ours):
    empty, one = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.tensor(1.0))
    model = nn.ParameterList([empty, one])
    ema = sk.EMA(model, 0.5, impl=impl)
    for p in (empty, one):
        p.grad = torch.zeros_like(p)
    ours(model.parameters(), lr=0.1, weight_decay=0.0, ema=ema, impl=impl).step()
    assert empty.shape == ema.module[0].shape == (0, 3)
    assert math.isclose(ema.module[1].item(), 1.0)


@pytest.mark.parametrize(
    ("ours", "name", "state", "got"),
    [
        (ours, name, state, got)
        for ours, name in ((sk.optim.SGD, "momentum_buffer"), (sk.optim.AdamW, "exp_avg_sq"))
        for state, got in ((torch.zeros(5), r"float32 \(5,\) on cpu"), (0.0, "float"), (None, "NoneType"))
        if state is not None or ours is sk.optim.AdamW  # SGD makes its buffer at any step
    ],
)
def test_a_loaded_state_that_does_not_fit_is_refused_before_anything_is_written(impl, ours, name, state, got):
    """The bad state is in the last group, and the message names its parameter."""
    params = [nn.Parameter(torch.ones(n)) for n in (2, 4, 3)]
    ema = sk.EMA(nn.ParameterList(params), impl=impl)
    arguments = {"momentum": 0.9} if ours is sk.optim.SGD else {}
    optimizer = ours([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, ema=ema, impl=impl, **arguments)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(good)
    bad["state"][2][name] = state
    optimizer.load_state_dict(bad)
    tensors = [*params, *ema.parameters(), *optimizer.state[params[0]].values()]
    before = [x.detach().clone() for x in tensors]
    want = rf"state: expected {name} of param_groups\[1\]\['params'\]\[1\] to be float32 \(3,\) on cpu.*, got {got}"
    for _ in range(2):
        with pytest.raises(ValueError, match=want):
            optimizer.step()
        assert all(map(torch.equal, tensors, before))
    optimizer.load_state_dict(good)
    optimizer.step()
    assert not torch.equal(params[2], before[2])


def test_a_state_of_another_dtype_or_device_at_the_first_step(impl):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for arguments, got in (({"dtype": torch.float64}, "float64"), ({"device": "meta"}, r"float32 \(3,\) on meta")):
        optimizer = sk.optim.SGD([p], lr=0.5, momentum=0.5, impl=impl)
        optimizer.state[p]["momentum_buffer"] = torch.zeros(3, **arguments)
        with pytest.raises(ValueError, match=f"state: expected momentum_buffer of .*, got {got}"):
            optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_a_state_that_is_not_used_is_not_checked(impl):
    p = nn.Parameter(torch.ones(3))
    optimizer = sk.optim.SGD([p], lr=0.5, impl=impl)
    p.grad, optimizer.state[p]["momentum_buffer"] = torch.ones(3), torch.zeros(5)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.5))
