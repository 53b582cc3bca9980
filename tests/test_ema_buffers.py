"""Buffers and parameters of real models: created by a forward, views of each other, integers, complex, sparse. The
average and the drop-ins are compared with torch's AveragedModel (timm's: tests/interop/test_ema.py)."""

import copy

import pytest
import torch
from helpers import randn
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn as torch_ema_multi_avg_fn

import selfsup_kernels as sk
from selfsup_kernels.compat.swa_utils import get_ema_multi_avg_fn
from selfsup_kernels.compat.timm import ModelEmaV3


class Cached(nn.Module):
    """A cache that the first forward creates and a longer input replaces: a mask, rotary or ALiBi tables."""

    def __init__(self, persistent=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.persistent = persistent
        self.register_buffer("cache", None, persistent=persistent)

    def forward(self, x):
        if self.cache is None or len(self.cache) < len(x):
            self.register_buffer("cache", torch.arange(len(x)).float(), persistent=self.persistent)
        return x * self.weight[0] + self.cache[: len(x)]


def averages(model):
    """Return (module, update) for each way to average a model."""
    for buffers in ("copy", "average", "ignore"):
        ema = sk.EMA(model, 0.5, buffers=buffers)
        yield ema.module, ema.update
    for exclude in (False, True):
        timm = ModelEmaV3(model, 0.5, exclude_buffers=exclude)
        yield timm.module, lambda timm=timm: timm.update(model)
    target = copy.deepcopy(model)
    yield target, lambda: sk.ema_update_(target, model, 0.5)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("grown", ["model", "average"])
def test_buffers_that_are_not_saved_are_left_alone_where_they_differ(first, grown):
    for k in range(6):
        model = nn.Sequential(Cached(), nn.BatchNorm1d(4))
        if first:
            model[0](torch.ones(first))
        module, update = list(averages(model))[k]
        (model if grown == "model" else module)[0](torch.ones(7))
        cache = module[0].cache
        before = None if cache is None else cache.clone()
        with torch.no_grad():
            model[0].weight.fill_(3)
        update()
        update()
        assert torch.equal(module[0].weight.detach(), torch.full((4,), 2.5))
        assert module[0].cache is cache
        assert cache is None or torch.equal(cache, before)


def test_unsaved_buffers_follow_the_policy_if_they_fit():
    for k, expected in enumerate([3.0, 2.5, 1.0, 1.0, 3.0, 2.5]):  # timm's average takes the state_dict, or all buffers
        model = Cached()
        model(torch.ones(2))
        model.cache.fill_(1)
        module, update = list(averages(model))[k]
        model.cache.fill_(3)
        update()
        update()
        assert torch.equal(module.cache, torch.full((2,), expected)), k


def test_an_unsaved_buffer_of_integers_is_left_alone():
    model = Cached()
    model(torch.ones(2))
    ema = sk.EMA(model, 0.5)
    model.cache = torch.tensor([5, 6])
    ema.update()
    assert torch.equal(ema.module.cache, torch.arange(2.0))
    model.cache = torch.tensor([5, 6], dtype=torch.bfloat16)
    ema.update()
    assert torch.equal(ema.module.cache, torch.tensor([5.0, 6.0]))


def test_saved_buffers_still_decide_whether_a_model_fits():
    for k in (0, 1, 3, 4, 5):
        model = Cached(persistent=True)
        module, update = list(averages(model))[k]
        model(torch.ones(7))
        with pytest.raises(ValueError, match="only in the source: cache"):
            update()
        module(torch.ones(3))
        if k < 3 or k == 5:
            with pytest.raises(ValueError, match=r"cache \(source\): expected the shape"):
                update()
        assert torch.equal(module.weight.detach(), torch.ones(4))


class Views(nn.Module):
    """Buffers that are views of each other, some disjoint and some overlapping, and an integer flag in two shapes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        table = randn(6, 4).to(dtype) if dtype.is_floating_point else torch.arange(24).view(6, 4).to(dtype)
        self.register_buffer("table", table)
        self.register_buffer("head", table[:2])
        self.register_buffer("tail", table[1:5, 1:])
        self.register_buffer("last", table[5])


@torch.no_grad()
def change(model, step=1):
    for i, x in enumerate((*model.parameters(), *model.buffers())):
        x.copy_(x + step + i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_views_of_one_another_are_copied(impl, dtype):
    model = Views(dtype)
    ema = sk.EMA(model, 0.5, impl=impl, stochastic_rounding=True)
    for step in range(3):
        change(model, step)
        ema.update()
        for (name, got), want in zip(ema.module.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(got, want), name


def test_an_average_that_would_depend_on_the_order_is_refused():
    model = Views()
    ema = sk.EMA(model, 0.5, buffers="average")
    change(model)
    before = [x.detach().clone() for x in ema.module.state_dict().values()]
    with pytest.raises(RuntimeError, match=r"\(target\): expected memory of its own, but it partly overlaps"):
        ema.update()
    assert all(map(torch.equal, before, ema.module.state_dict().values()))
    whole = sk.EMA(Views(torch.int64), 0.5, buffers="average")  # these are copied
    whole.update()


class Everything(nn.Module):
    """Parameters and buffers of every kind of number that torch's average takes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(3, 5))
        self.filter = nn.Parameter(torch.complex(randn(4), randn(4, seed=1)))
        self.levels = nn.Parameter(torch.tensor([3, -7, 250]), requires_grad=False)
        self.chosen = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("flag", torch.tensor([True, True, False]))
        self.register_buffer("rotary", torch.complex(randn(6, seed=2), randn(6, seed=3)))
        self.register_buffer("low", randn(7, dtype=torch.float16))
        self.add_module("views", Views())


@torch.no_grad()
def train(model, step):
    for i, x in enumerate((*model.parameters(), *model.buffers())):
        x.copy_(~x if x.dtype == torch.bool else x + randn(*x.shape, seed=10 * step + i).mul(20).to(x.dtype))


@pytest.mark.parametrize("decay", [0.9, 0.25, torch.tensor(0.75)], ids=str)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_the_drop_in_averages_everything_that_torchs_average_accepts(decay, use_buffers):
    model = Everything()
    ours, theirs = (
        AveragedModel(model, multi_avg_fn=function(decay), use_buffers=use_buffers)
        for function in (get_ema_multi_avg_fn, torch_ema_multi_avg_fn)
    )
    for step in range(5):
        train(model, step)
        for average in (ours, theirs):
            average.update_parameters(model)
        for (name, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(got, want), f"{name} at step {step}"


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_the_drop_in_averages_everything_that_timms_average_accepts(exclude_buffers):
    """Average like timm 1.0.31, tensor by tensor in the order of the names."""
    model = Everything()
    ours, theirs = ModelEmaV3(model, 0.9, exclude_buffers=exclude_buffers), copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for step in range(5):
        train(model, step)
        ours.update(model)
        source = model.state_dict()
        for name, value in theirs.state_dict().items():
            if (name in parameters and (value.is_floating_point() or (exclude_buffers and value.is_complex()))) or (
                value.is_floating_point() and not exclude_buffers
            ):
                value.lerp_(source[name], 1 - 0.9)
            else:
                value.copy_(source[name])
        for name, want in theirs.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], want), f"{name} at step {step}"


def test_timms_drop_in_broadcasts_and_converts_like_copy_and_lerp():
    model, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    ema = ModelEmaV3(model, 0.75)
    ema.module.num_batches_tracked = torch.zeros(3, dtype=torch.int32)
    other.num_batches_tracked = torch.tensor(7.9)
    other.weight, other.running_mean = nn.Parameter(torch.tensor([5.0])), torch.tensor(4)
    ema.update(other)
    assert ema.module.num_batches_tracked.tolist() == [7, 7, 7]
    assert ema.module.weight.tolist() == [2.0] * 4
    assert ema.module.running_mean.tolist() == [1.0] * 4
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    for name, wrong in (("running_var", torch.ones(3)), ("num_batches_tracked", torch.ones(2))):
        bad = nn.BatchNorm1d(4)
        setattr(bad, name, wrong)
        nn.init.zeros_(bad.weight)
        with pytest.raises(ValueError, match=rf"{name} \(source\): expected the shape"):
            ema.update(bad)
        assert all(torch.equal(v, before[k]) for k, v in ema.module.state_dict().items())


def test_timms_average_of_a_model_on_two_devices():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    ema = ModelEmaV3(model, 0.5)
    want = ema.module[0].weight.detach() + 1
    with torch.no_grad():
        model[0].weight.add_(2)
    ema.update(model)
    torch.testing.assert_close(ema.module[0].weight.detach(), want)


def test_the_average_of_every_kind_of_number(impl):
    model = Everything()
    del model.views  # refused where they are averaged: above
    for buffers in ("copy", "average", "ignore"):
        ema = sk.EMA(model, 0.75, buffers=buffers, impl=impl)
        before = {k: v.clone() for k, v in ema.module.state_dict().items()}
        train(model, 0)
        ema.update()
        source = model.state_dict()
        for name, got in ema.module.state_dict().items():
            buffer = name in dict(model.named_buffers())
            if buffer and buffers == "ignore":
                want = before[name]
            elif not (got.is_floating_point() or got.is_complex()) or (buffer and buffers == "copy"):
                want = source[name]
            else:
                want = torch.lerp(before[name], source[name], 0.25)
            assert torch.equal(got, want), name


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
def test_sparse_and_quantised_buffers_are_copied(impl):
    """Sparse buffers include a graph's adjacency matrix, quantised ones the weights of torch.ao."""
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    model.register_buffer("table", torch.quantize_per_tensor(randn(4), 0.1, 0, torch.qint8))
    ema = sk.EMA(model, 0.5, impl=impl)
    model.graph = (2 * torch.eye(3)).to_sparse()
    model.table = torch.quantize_per_tensor(randn(4, seed=1), 0.1, 0, torch.qint8)
    with torch.no_grad():
        model.weight.add_(2)
    want = ema.module.weight + 1
    ema.update()
    assert torch.equal(ema.module.graph.to_dense(), 2 * torch.eye(3))
    assert torch.equal(ema.module.table.dequantize(), model.table.dequantize())
    torch.testing.assert_close(ema.module.weight, want)


def test_expanded_buffers_cannot_be_written():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(1).expand(3))
    ema = sk.EMA(model, 0.5)
    before = ema.module.weight.clone()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"mask \(target\).*expanded"):
        ema.update()
    assert torch.equal(ema.module.weight, before)
