"""Averages notice everything that changes between two updates in the modules and their tensors."""

import copy

import pytest
import torch
from ema_cases import M, Model, assert_update, freed, move, settled, values
from helpers import randn
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selfsup_kernels as sk


def both(change):
    """The same change of the model and of the copy."""

    def of(model, ema):
        change(model)
        change(ema.module)

    return of


def of_model(change):
    return lambda model, ema: change(model)


def of_copy(change):
    return lambda model, ema: change(ema.module)


def data(module):
    module.a.weight.data = randn(4, 4, seed=9)


def double_data(module):
    module.a.weight.data = randn(4, 4, seed=9).double()


def transposed_data(module):
    module.a.weight.data = randn(4, 4, seed=9).t()


def expanded_data(module):
    module.a.weight.data = randn(4, 1, seed=9).expand(4, 4)


def other_shape(module):
    module.a.weight.data = randn(2, 5, seed=9)


def transposed_in_place(module):
    module.a.weight.data.t_()
    module.b[0].weight.data = module.b[0].weight.data.t()


def resized(module):
    module.b[0].bias.requires_grad_(False).resize_(2)


def resized_statistics(module):
    module.b[1].running_mean.resize_(1)


def in_dictionary(module):
    module.b[0]._parameters["weight"] = nn.Parameter(randn(4, 4, seed=9))


def other_dictionary(module):
    module.b[0]._parameters = {k: nn.Parameter(p.detach() + 1) for k, p in module.b[0]._parameters.items()}


def other_attributes(module):
    module.b[0].__dict__ = nn.Linear(4, 4).__dict__


def other_buffer(module):
    module.b[1].running_mean = randn(4, seed=9)


def buffer_in_dictionary(module):
    module.b[1]._buffers["running_var"] = randn(4, seed=9)


def other_layer(module):
    module.b[0] = nn.Linear(4, 4)


def more_layers(module):
    module.b.append(nn.Linear(4, 2))


def fewer_layers(module):
    del module.b[0]


def no_bias(module):
    module.a.bias = None


def later_parameter(module):
    module.a.later = nn.Parameter(randn(3, seed=9))


def later_buffer(module):
    module.a.register_buffer("later", randn(3, seed=9))


def other_order(module):
    weight = module.a._parameters.pop("weight")
    module.a.register_parameter("weight", weight)


def other_class(module):
    module.a.__class__ = type("Other", (nn.Linear,), {})


def converted(module):
    module.double()


def assigned(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


def swapped(module):
    torch.utils.swap_tensors(module.a.weight, nn.Parameter(randn(4, 4, seed=9)))


def tied(module):
    module.b[0].weight = module.a.weight


def tied_bias(module):
    module.b[0].bias = module.a.bias


def grown_scratch(module):
    module.scratch.data = randn(7, seed=9)


def other_scratch(module):
    module.scratch = randn(7, seed=9)


def no_scratch(module):
    del module.scratch


def compiled(module):
    module.b = torch.compile(module.b, backend="eager")


def checkpointed(module):
    module.b[0] = checkpoint_wrapper(module.b[0])


def ignoring(model, ema):
    ema.buffer_policy = "ignore"


CHANGES = [
    *map(both, (data, double_data, other_shape, transposed_in_place, resized, resized_statistics, in_dictionary)),
    *map(both, (other_dictionary, other_attributes, other_buffer, other_layer, more_layers, fewer_layers, no_bias)),
    *map(both, (later_parameter, later_buffer, other_order, assigned, swapped, tied, tied_bias, grown_scratch)),
    *map(of_model, (data, double_data, transposed_data, in_dictionary, other_dictionary)),
    *map(of_model, (other_attributes, other_buffer, buffer_in_dictionary, other_layer, other_order, other_class)),
    *map(of_model, (converted, assigned, swapped, grown_scratch, other_scratch, compiled, checkpointed)),
    *map(of_copy, (data, double_data, transposed_data, in_dictionary, other_buffer, buffer_in_dictionary)),
    *map(of_copy, (other_layer, other_order, converted, assigned, swapped, grown_scratch, checkpointed)),
    ignoring,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed(impl, change):
    model, ema = settled(impl)
    change(model, ema)
    for seed in (3, 4, 5):
        assert_update(ema, model)
        move(model, 100 * seed)


def test_a_source_that_is_expanded(impl):
    model, ema = settled(impl)
    expanded_data(model)
    assert_update(ema, model)
    assert_update(ema, model)


def test_an_unsaved_buffer_that_fits_again_is_copied_again(impl):
    model, ema = settled(impl)
    model.scratch.data = randn(5, seed=1)
    assert_update(ema, model)
    assert ema.module.scratch.shape == (2,)
    model.scratch.data = randn(2, seed=2)
    assert_update(ema, model)
    assert torch.equal(ema.module.scratch, model.scratch)


def saved_scratch(model, ema):
    """The same tensors, but the buffer that differs is now one that has to match."""
    other_scratch(model)
    ema.update()
    for module in (model, ema.module):
        module._non_persistent_buffers_set.clear()


def same_memory(model, ema):
    ema.module.b[0].weight.data = ema.module.a.weight.data


def overlapping(model, ema):
    memory = torch.zeros(20)
    ema.module.a.weight.data, ema.module.b[0].weight.data = memory[:16].view(4, 4), memory[4:].view(4, 4)


def in_the_model(model, ema):
    """The copy's weight overlaps the model's, but another one of its rows each."""
    memory = torch.zeros(20)
    model.a.weight.data, ema.module.a.weight.data = memory[:16].view(4, 4), memory[4:].view(4, 4)


def subclass(model, ema):
    class Other(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError("an operator of its own")

    model.a._parameters["weight"] = torch.Tensor._make_subclass(Other, randn(4, 4))


REFUSED = [
    (of_model(other_shape), ValueError, r"a\.weight \(source\): expected the shape"),
    (of_copy(other_shape), ValueError, r"a\.weight \(source\): expected the shape"),
    (of_model(resized), ValueError, r"b\.0\.bias \(source\): expected the shape"),
    (of_copy(resized_statistics), ValueError, r"running_mean \(source\): expected the shape"),
    (of_model(more_layers), ValueError, r"only in the source: b\.3\.weight"),
    (of_copy(fewer_layers), ValueError, r"only in the source"),
    (of_model(no_bias), ValueError, r"only in the target: a\.bias"),
    (of_model(later_parameter), ValueError, r"only in the source: a\.later"),
    (of_copy(later_buffer), ValueError, r"only in the target: a\.later"),
    (of_model(tied), ValueError, r"only in the target: b\.0\.weight"),
    (of_copy(tied_bias), ValueError, r"only in the source: b\.0\.bias"),
    (saved_scratch, ValueError, r"scratch \(source\): expected the shape"),
    (of_copy(expanded_data), RuntimeError, r"elements that do not share memory"),
    (lambda model, ema: freed(model.a.bias), RuntimeError, r"a\.bias \(source\): .*has been freed"),
    (lambda model, ema: freed(ema.module.a.bias), RuntimeError, r"a\.bias \(target\): .*has been freed"),
    (same_memory, ValueError, r"expected every destination once"),
    (overlapping, RuntimeError, r"partly overlaps"),
    (in_the_model, RuntimeError, r"partly overlaps"),
    (of_model(lambda module: module.to("meta")), ValueError, "device"),
    (subclass, NotImplementedError, "an operator of its own"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_a_change_is_refused_before_a_write(impl, change, error, message):
    model, ema = settled(impl)
    change(model, ema)
    kept = [x for x in (*ema.module.parameters(), *ema.module.buffers()) if x.untyped_storage().nbytes()]
    before = [x.detach().clone() for x in kept]
    for _ in range(2):
        with pytest.raises(error, match=message):
            ema.update()
        for x, old in zip(kept, before, strict=True):
            assert torch.equal(x.detach(), old)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_target_that_comes_to_share_its_sources_memory_gets_its_own(impl, buffers):
    model, ema = settled(impl, buffers=buffers)
    ema.module.a.weight.data = model.a.weight.data
    ema.module.b[1].running_mean = model.b[1].running_mean[:]
    ema.update()
    before = values(ema.module)
    move(model, 900)
    for name in ("a.weight", "b.1.running_mean"):
        assert torch.equal(values(ema.module)[name], before[name])


def test_buffers_that_are_views_of_parameters_are_copied_after_the_averages(impl):
    """Copies in the same call would depend on the order."""
    model = Model()
    model.register_buffer("row", model.a.weight.detach()[1])
    ema = sk.EMA(model, M, impl=impl)
    ema.module.row = ema.module.a.weight.detach()[1]
    for seed in (1, 2):
        move(model, 100 * seed)
        before = ema.module.a.weight.clone()
        ema.update()
        want = M * before + (1 - M) * model.a.weight.detach()
        want[1] = model.a.weight.detach()[1]
        torch.testing.assert_close(ema.module.a.weight.detach(), want)


def test_complex_buffers_that_become_conjugates_are_copied(impl):
    model = nn.Module()
    model.register_buffer("z", torch.tensor([1 + 2j, 3 - 1j]))
    ema = sk.EMA(model, M, impl=impl)
    for change in (lambda z: z * 2, torch.conj, lambda z: torch.conj(z).imag.add(1j), lambda z: z * 3):
        ema.update()
        ema.update()
        model.z.data = change(model.z)
        ema.update()
        assert torch.equal(ema.module.z.resolve_conj(), model.z.resolve_conj())


def test_a_module_that_model_and_copy_share(impl):
    model = Model()
    twin = copy.deepcopy(model)
    twin.a = model.a
    ema = sk.EMA(model, M, impl=impl)
    ema.module.a = model.a
    for seed in (1, 2, 3):
        move(model, 100 * seed)
        before, shared = values(ema.module), model.a.weight.detach().clone()
        ema.update()
        assert torch.equal(model.a.weight, shared)
        want = M * before["b.0.weight"] + (1 - M) * model.b[0].weight.detach()
        torch.testing.assert_close(ema.module.b[0].weight.detach(), want)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_backward_notices_every_write(impl, buffers):
    _, ema = settled(impl, buffers=buffers)
    versions = {k: x._version for k, x in (*ema.module.named_parameters(), *ema.module.named_buffers())}
    ema.update()
    for name, x in (*ema.module.named_parameters(), *ema.module.named_buffers()):
        written = x.numel() and (isinstance(x, nn.Parameter) or buffers != "ignore")
        assert (x._version > versions[name]) or not written, name


def test_copies_and_their_models_are_told_apart(impl):
    """A deep copy of an owner has other modules, and what its original found is not for it."""
    owner = nn.Module()
    owner.model = Model()
    owner.ema = sk.EMA(owner.model, M, impl=impl)
    owner.ema.update()
    owner.ema.update()
    twin = copy.deepcopy(owner)
    move(twin.model, 300)
    before = values(owner.ema.module)
    assert_update(twin.ema, twin.model)
    assert_update(twin.ema, twin.model)
    for name, value in values(owner.ema.module).items():
        assert torch.equal(value, before[name])
