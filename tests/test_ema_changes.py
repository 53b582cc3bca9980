"""Averages notice everything that changes between two updates: in the modules, in their tensors, and in lists."""

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref

import pytest
import torch
from helpers import randn
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selfsup_kernels as sk
from selfsup_kernels.core import backends

M = 0.75


class Model(nn.Module):
    """A model with running statistics, an unsaved buffer, a complex one, an empty one, and an empty parameter."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(4, 4)
        self.b = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("nothing", torch.ones(0))


def values(module):
    return {
        k.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): v.detach().clone()
        for k, v in (*module.named_parameters(), *module.named_buffers())
    }


def averages(before, model, buffers="copy"):
    """The averages of ``before`` and the model in float64, by name."""
    averaged = {id(x) for x in (*model.parameters(), *(model.buffers() if buffers == "average" else ()))}
    want = {}
    for name, source in (*model.named_parameters(), *model.named_buffers()):
        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        old, new = before[name].double(), source.detach().double()
        if id(source) in averaged and source.is_floating_point():
            want[name] = M * old + (1 - M) * new
        else:
            want[name] = old if buffers == "ignore" or old.shape != new.shape else new
    return want


def assert_update(ema, model):
    before = values(ema.module)
    want = averages(before, model, ema.buffer_policy)
    ema.update()
    got = values(ema.module)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def move(model, seed):
    for i, x in enumerate((*model.parameters(), *model.buffers())):
        x.add_(randn(*x.shape, seed=seed + i) if x.is_floating_point() else 1)


def settled(impl, **options):
    """A model and its EMA after two updates: the second one has found its tensors without a walk."""
    model = Model()
    ema = sk.EMA(model, M, impl=impl, **options)
    for seed in (1, 2):
        move(model, 100 * seed)
        assert_update(ema, model)
    if backends.unavailable("cpu") is None:
        assert ema._kept.pairs(ema) is not None
    return model, ema


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


def freed(tensor):
    tensor.untyped_storage().resize_(0)


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


def replace_first(targets, sources):
    targets[0] = torch.zeros(4)


def shorter(targets, sources):
    del targets[-1], sources[-1]


def other_memory(targets, sources):
    sources[1].data = randn(2, 3, seed=5)


def other_dtype(targets, sources):
    targets[1].data = targets[1].double()


def other_shapes(targets, sources):
    targets[1].data, sources[1].data = randn(5, 2, seed=5), randn(5, 2, seed=6)


def other_strides(targets, sources):
    sources[1].as_strided_((2, 3), (1, 2))


@pytest.mark.parametrize(
    "change", [replace_first, shorter, other_memory, other_dtype, other_shapes, other_strides, lambda t, s: None]
)
def test_a_list_that_changes_is_followed(impl, change):
    targets, sources = ([randn(4, seed=k), randn(2, 3, seed=k + 1), torch.tensor([k])] for k in (0, 10))
    for _ in range(2):
        sk.ema_update_(targets, sources, M, impl=impl)
    change(targets, sources)
    pairs = zip(targets, sources, strict=True)
    want = [M * t.double() + (1 - M) * s.double() if t.is_floating_point() else s for t, s in pairs]
    sk.ema_update_(targets, sources, M, impl=impl)
    for got, value in zip(targets, want, strict=True):
        torch.testing.assert_close(got, value.to(got.dtype), rtol=1e-6, atol=1e-6)


def shares_source(targets, sources):
    targets[0].data = sources[1].data.view(-1)[:4]


def shares_target(targets, sources):
    targets[0].data = targets[1].data.view(-1)[2:]


def twice(targets, sources):
    targets[0], sources[0] = targets[1], sources[1].clone()


def freed_source(targets, sources):
    freed(sources[0])


def longer_target(targets, sources):
    targets[0].resize_(9)


def expanded_target(targets, sources):
    targets[0].data = torch.zeros(1).expand(4)


def integer_source(targets, sources):
    sources[0].data = torch.arange(4)


def one_source_less(targets, sources):
    del sources[-1]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (shares_source, RuntimeError),
        (shares_target, RuntimeError),
        (twice, ValueError),
        (freed_source, RuntimeError),
        (longer_target, ValueError),
        (expanded_target, RuntimeError),
        (integer_source, TypeError),
        (one_source_less, ValueError),
    ],
)
def test_a_list_that_changes_is_refused(impl, change, error):
    targets, sources = ([randn(4, seed=k), randn(2, 3, seed=k + 1), torch.tensor([k])] for k in (0, 10))
    for _ in range(2):
        sk.ema_update_(targets, sources, M, impl=impl)
    change(targets, sources)
    before = [t.clone() for t in targets]
    with pytest.raises(error):
        sk.ema_update_(targets, sources, M, impl=impl)
    for got, old in zip(targets, before, strict=True):
        assert torch.equal(got.nan_to_num(), old.nan_to_num())


def test_two_threads_update_different_averages(impl):
    def work(seed, results):
        model = Model(seed)
        ema = sk.EMA(model, M, impl=impl)
        targets, sources = [torch.zeros(5)], [torch.full((5,), float(seed))]
        for step in range(150):
            if step % 7 == 0:
                model.b[0] = nn.Linear(4, 4)
                with torch.no_grad():
                    model.b[0].weight.fill_(seed + step)
            ema.update()
            sk.ema_update_(targets, sources, M, impl=impl)
        results[seed] = values(ema.module), targets[0]

    # The initial numbers come from the one generator, but after 150 updates only the model's own numbers are left.
    apart, together = {}, {}
    for seed in (1, 2):
        work(seed, apart)
    threads = [threading.Thread(target=work, args=(seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == {1, 2}
    for seed, (got, target) in together.items():
        torch.testing.assert_close(got["b.0.weight"], apart[seed][0]["b.0.weight"], rtol=1e-5, atol=1e-3)
        assert torch.equal(target, apart[seed][1])
        torch.testing.assert_close(target, torch.full((5,), float(seed)), rtol=1e-6, atol=0.0)


def test_many_lists_and_averages_leave_nothing_behind(impl):
    def calls(n):
        alive = []
        for k in range(n):
            targets, sources = ([randn(k % 5 + 1, seed=s) for _ in range(k % 3 + 1)] for s in (0, 1))
            for _ in range(2):
                sk.ema_update_(targets, sources, M, impl=impl)
            alive += map(weakref.ref, (*targets, *sources))
            if k % 20 == 0:
                model = Model()
                ema = sk.EMA(model, M, impl=impl)
                ema.update()
                ema.update()
                alive += map(weakref.ref, (model, ema))
        del targets, sources, model, ema
        gc.collect()
        assert not any(x() is not None for x in alive)

    tracemalloc.start()
    try:
        calls(1000)  # fills the interpreter's own caches
        before, _ = tracemalloc.get_traced_memory()
        calls(1000)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 60_000  # bytes: less than an entry for each list


def test_replaced_tensors_are_not_kept_alive(impl):
    model, ema = settled(impl)
    old = [weakref.ref(x) for x in (model.a.weight, ema.module.a.weight, model.b[0], model.b[0].weight)]
    for module in (model, ema.module):
        module.a.weight = nn.Parameter(torch.zeros(4, 4))
        module.b[0] = nn.Linear(4, 4)
    gc.collect()
    assert not any(x() is not None for x in old)
    assert_update(ema, model)


def test_a_class_that_knows_its_average_does_not_keep_it_alive(impl):
    def train():
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def teacher(self):
                return ema

        model = Net()
        ema = sk.EMA(model, M, impl=impl)
        ema.update()
        ema.update()
        Net.average = ema
        return weakref.ref(ema), weakref.ref(model)

    found = train()
    gc.collect()
    assert [x() for x in found] == [None, None]


def test_averages_may_compare_as_they_like(impl):
    class Equal(sk.EMA):
        def __eq__(self, other):
            return self is other

        __hash__ = None

    model = Model()
    ema = Equal(model, M, impl=impl)
    for _ in range(3):
        assert_update(ema, model)


def test_copies_and_pickles_do_not_take_the_trees_along(impl):
    _, ema = settled(impl)
    for other in (copy.deepcopy(ema), copy.copy(ema), pickle.loads(pickle.dumps(ema))):
        assert other._kept is None
        other.update()
    assert ema._kept is not None or backends.unavailable("cpu") is not None


@pytest.mark.parametrize("scratch", [None, ()])
def test_a_module_without_a_set_of_unsaved_buffers(impl, scratch):
    model, ema = settled(impl)
    model.a._non_persistent_buffers_set = scratch
    for _ in range(3):
        assert_update(ema, model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_leaves_updates_out(impl):
    target, source = torch.ones(3), torch.zeros(3)

    def f(x):
        sk.ema_update_([target], [source], M, impl=impl)
        return 2 * x

    traced = torch.jit.trace(f, (torch.ones(2),), check_trace=False)
    assert torch.equal(traced(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(target, torch.full((3,), M))


def test_a_refused_copy_is_noticed_by_autograd(impl):
    model = nn.Linear(3, 3)
    model.register_buffer("table", torch.zeros(3, 4))
    ema = sk.EMA(model, M, impl=impl)
    ema.update()
    with torch.inference_mode():
        ema.module.table = torch.ones(4, 3).t()  # in another layout than the model's
    for _ in range(2):
        with torch.no_grad():
            model.weight.add_(1)
        before, version = values(ema.module)["weight"], ema.module.weight._version
        with pytest.raises(RuntimeError):
            ema.update()
        assert not torch.equal(ema.module.weight, before)
        assert ema.module.weight._version > version
