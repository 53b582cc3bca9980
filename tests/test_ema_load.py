"""``load_state_dict`` of an EMA: accepted and refused states, and averages that come to share the model's memory."""

import copy

import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.compat.lightly import update_momentum


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@torch.no_grad()
def move(model):
    for i, p in enumerate(model.parameters()):
        p.add_(randn(*p.shape, seed=i + 1))


def copy_of_parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_halfway(target, old, model):
    for got, a, b in zip(target.parameters(), old, model.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), (a + b.detach()) / 2)


def without_batches(model, state):
    """A state from before BatchNorm counted its batches."""
    del state["1.num_batches_tracked"]
    state._metadata["1"] = {"version": 1}


def rows_of_one(model, state):
    """An old state, in which 0-dim tensors have one dimension."""
    state["1.num_batches_tracked"] = state["1.num_batches_tracked"].reshape(1)


def other_integers(model, state):
    model[1].num_batches_tracked = model[1].num_batches_tracked.int()


def old_weight_norm(model, state):
    """A state from before ``weight_norm`` was a parametrization."""
    nn.utils.parametrizations.weight_norm(model[0])
    weight = state.pop("0.weight")
    state["0.weight_g"], state["0.weight_v"] = weight.norm(dim=1, keepdim=True), weight


@pytest.mark.parametrize("change", [without_batches, rows_of_one, other_integers, old_weight_norm])
def test_a_checkpoint_that_the_model_loads(change):
    model, state = network(), network(seed=1).state_dict()
    change(model, state)
    own = type(state)({f"module.{name}": x for name, x in state.items()})
    own._metadata = {f"module.{name}".rstrip("."): x for name, x in state._metadata.items()}
    ema = sk.EMA(model)
    model.load_state_dict(state)
    result = ema.load_state_dict(own)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, want in model.state_dict().items():
        got = ema.module.state_dict()[name]
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name


class Noted(nn.Module):
    """A module with extra state and a buffer that loading replaces."""

    def __init__(self):
        super().__init__()
        self.notes = ["made"]
        self.register_buffer("bank", torch.zeros(2))

    def get_extra_state(self):
        return self.notes

    def set_extra_state(self, state):
        self.notes = state

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.bank = torch.empty_like(state_dict[prefix + "bank"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.fixture(params=[False, True], ids=["copies", "swaps"])
def _swap(request):
    """Set the ``torch.__future__`` option with which loading swaps the contents of parameters."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("_swap")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_refused_load_changes_nothing(assign, strict):
    ema = sk.EMA(nn.Sequential(Noted(), network()))
    state = {name: x + 1 if isinstance(x, torch.Tensor) else ["loaded"] for name, x in ema.state_dict().items()}
    state["module.0.bank"] = torch.ones(5)
    before = {name: (x, x.clone()) for name, x in (*ema.named_parameters(), *ema.named_buffers())}
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.1\.1\.bias"):
        ema.load_state_dict(state | {"module.1.1.bias": torch.zeros(7)}, strict=strict, assign=assign)
    after = dict((*ema.named_parameters(), *ema.named_buffers()))
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor, name
        assert torch.equal(tensor, value), name
    assert ema.module[0].notes == ["made"]
    ema.load_state_dict(state, strict=strict, assign=assign)
    assert ema.module[0].notes == ["loaded"]
    assert torch.equal(ema.module[0].bank, torch.ones(5))


@pytest.mark.parametrize("keep_vars", [False, True])
def test_the_models_own_tensors_are_copied(impl, keep_vars):
    model = network()
    ema = sk.EMA(model, 0.5, impl=impl)
    move(model)
    state = {f"module.{name}": x for name, x in model.state_dict(keep_vars=keep_vars).items()}
    ema.load_state_dict(state, assign=True)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ema.parameters())
    before = copy_of_parameters(model)
    move(model)
    ema.update()
    assert_halfway(ema, before, model)


def test_other_tensors_are_assigned_as_they_are():
    ema, state = sk.EMA(network()), sk.EMA(network(seed=1)).state_dict()
    ema.load_state_dict(state, assign=True)
    for name, x in ema.state_dict().items():
        assert x.data_ptr() == state[name].data_ptr(), name


def by_ema(model, impl):
    ema = sk.EMA(model, 0.5, impl=impl)
    return ema.module, ema.update


def by_lightly(model, impl):
    target = copy.deepcopy(model)
    return target, lambda: update_momentum(model, target, 0.5)


@pytest.mark.parametrize("way", [by_ema, by_lightly])
def test_a_target_in_the_models_memory_gets_its_own(impl, way):
    model = network()
    target, update = way(model, impl)
    for _ in range(2):
        target.load_state_dict(model.state_dict(), assign=True)
        before = copy_of_parameters(model)
        update()
        assert all(map(torch.equal, target.parameters(), before))
        move(model)
        update()
        assert_halfway(target, before, model)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_in_the_models_memory_get_their_own(impl, buffers):
    model = network()
    ema = sk.EMA(model, 0.5, buffers=buffers, impl=impl)
    ema.module.load_state_dict(model.state_dict(), assign=True)
    ema.update()
    model[1].running_mean.fill_(4)
    assert not ema.module[1].running_mean.any()


@pytest.mark.parametrize("make", [sk.optim.SGD, sk.optim.LARS, sk.optim.AdamW])
def test_a_fused_step_with_a_target_in_the_models_memory(impl, make):
    model = network()
    ema = sk.EMA(model, 0.5, impl=impl)
    optimizer = make(model.parameters(), lr=0.1, ema=ema, impl=impl)
    ema.module.load_state_dict(model.state_dict(), assign=True)
    before = copy_of_parameters(model)
    (model(randn(5, 3)) * randn(5, 4, seed=1)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])
    assert_halfway(ema, before, model)


def test_a_module_that_model_and_copy_share_stays_shared(impl):
    """The caller shares a module on purpose: both hold the same Parameter, not two with the same memory."""
    model = network()
    ema = sk.EMA(model, 0.5, impl=impl)
    ema.module[1] = model[1]
    address = model[1].weight.data_ptr()
    ema.update()
    assert ema.module[1].weight is model[1].weight
    assert model[1].weight.data_ptr() == address
