"""Repeated updates: of lists that change, in threads, without keeping memory alive, and in traces."""

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref

import pytest
import torch
from ema_cases import M, Model, assert_update, freed, settled, values
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.core import backends


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
