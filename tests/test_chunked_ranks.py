"""Chunks on two uneven gloo ranks: every trained parameter has the gradient of one process with the whole batch."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.distributed as dist
from helpers import randn
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint

import selfsup_kernels as sk

SAMPLES = 11


def tower(inside, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inside, 7), nn.Tanh(), nn.Linear(7, 4)).double()


class Towers(nn.Module):
    """Two encoders, and a layer that no input reaches."""

    inputs = ("image", "text")

    def __init__(self, locked=False):
        super().__init__()
        self.image, self.text, self.spare = tower(6, 0), tower(6, 1), tower(6, 2)
        self.text.requires_grad_(not locked)

    def forward(self, image=None, text=None):
        return self.text(text) if image is None else self.image(image)


class Experts(nn.Module):
    """Each sample goes to one of four layers, by its first feature; no sample goes to the fifth."""

    inputs = (None, None)

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(tower(6, seed) for seed in range(5))

    def forward(self, x):
        rows, chosen = x.new_zeros(len(x), 4), (x[:, 0].abs() * 10).long() % 4
        for i in chosen.unique():
            rows = rows.index_add(0, (chosen == i).nonzero()[:, 0], self.experts[i](x[chosen == i]))
        return rows


class Checkpointed(nn.Module):
    """Reentrant checkpointing hides its parameters from a walk through the graph."""

    inputs = (None, None)

    def __init__(self):
        super().__init__()
        self.first, self.hidden = tower(6, 0), tower(4, 1)

    def forward(self, x):
        return checkpoint(self.hidden, self.first(x), use_reentrant=True)


class Words(nn.Module):
    """A model with sparse gradients."""

    inputs = (None, None)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(9, 6, sparse=True).double(), tower(6, 1)

    def forward(self, x):
        return self.last(self.table((x[:, :2].abs() * 4).long().clamp(max=8)).sum(1))


MODELS = {"towers": Towers, "locked": lambda: Towers(locked=True), "experts": Experts}
MODELS |= {"checkpointed": Checkpointed, "words": Words}


def batches(step, even=False):
    samples = SAMPLES - SAMPLES % 2 if even else SAMPLES
    x = randn(samples, 6, seed=step, dtype=torch.float64)
    return [x, x * 0.6 + 0.4 * randn(samples, 6, seed=step + 50, dtype=torch.float64)]


def given(model, views):
    return [{name: x} if name else x for name, x in zip(model.inputs, views, strict=True)]


def own(group, views):
    """Return the rows of this rank: 7 and 4 of 11, 5 and 5 of 10."""
    first = 7 if len(views[0]) == SAMPLES else len(views[0]) // 2
    return [x[:first] if dist.get_rank(group) == 0 else x[first:] for x in views]


def encode(model, x):
    return model(**x) if isinstance(x, dict) else model(x)


def loss(group=None):
    return sk.InfoNCELoss(0.3, objective="cross_view", group=group)


def dense(grad):
    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return grad if grad is None or not grad.is_sparse else grad.to_dense()


def gradients(model):
    return [None if p.grad is None else dense(p.grad).clone() for p in model.parameters()]


def assert_same(got, want, bound=1e-9):
    assert [g is None for g in got] == [w is None for w in want]
    for g, w in zip(got, want, strict=True):
        if w is not None:
            assert (g - w).norm() <= bound * w.norm()


def one_process(name, steps, clear=lambda model: None, even=False):
    """Gradients after each step."""
    model, after = MODELS[name](), []
    for step in range(steps):
        clear(model)
        loss()([encode(model, x) for x in given(model, batches(step, even))]).backward()
        after.append(gradients(model))
    return after


CLEAR = {
    "none": lambda model: model.zero_grad(),
    "zeros": lambda model: model.zero_grad(set_to_none=False),
    "kept": lambda model: None,
}


def chunked(group, name, clear, options):
    model, after = MODELS[name](), []
    wrapped = DistributedDataParallel(model, process_group=group, **options)
    for step in range(3):
        CLEAR[clear](model)
        views = given(model, own(group, batches(step)))
        sk.chunked_backward(wrapped, views, loss(group), 3 - dist.get_rank(group))
        after.append(gradients(model))
    return after


@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_that_any_chunk_trained_has_the_gradient_of_one_process(ranks, name, unused, clear):
    """Includes cases where DDP alone raises: two forwards with find_unused_parameters, unused parameters without it."""
    want = one_process(name, 3, CLEAR[clear])
    for got in ranks.run(2, chunked, name, clear, {"find_unused_parameters": unused}):
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)


@pytest.mark.parametrize("options", [{"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1e-4}])
@pytest.mark.parametrize("name", ["towers", "experts"])
def test_buckets(ranks, name, options):
    want = one_process(name, 3)
    for got in ranks.run(2, chunked, name, "kept", options):
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)


def in_parts(group):
    """A plain module with DistributedDataParallel parts; the third one is unused."""
    model, after = Towers(), []
    for part in ("image", "text", "spare"):
        setattr(model, part, DistributedDataParallel(getattr(model, part), process_group=group))
    for step in range(2):
        sk.chunked_backward(model, given(model, own(group, batches(step))), loss(group), 3 - dist.get_rank(group))
        after.append(gradients(model))
    return after


def test_a_module_with_parts_that_are_wrapped(ranks):
    want = one_process("towers", 2)
    for got in ranks.run(2, in_parts):
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)


def accumulated(group, how):
    """Gradients after each of three calls, the first two inside no_sync()."""
    model, after = Towers(), []
    wrapped = DistributedDataParallel(model, process_group=group, find_unused_parameters=how == "chunks, unused")
    for p in model.spare.parameters():
        p.requires_grad_(how != "one pass")
    if how == "one pass":
        wrapped = DistributedDataParallel(model, process_group=group)
    for step in range(3):
        views = given(model, own(group, batches(step)))
        with wrapped.no_sync() if step < 2 else contextlib.nullcontext():
            if how == "one pass":
                loss(group)([encode(wrapped, x) for x in views]).backward()
            else:
                sk.chunked_backward(wrapped, views, loss(group), 3 - dist.get_rank(group))
        after.append(gradients(model))
    return after


@pytest.mark.parametrize("how", ["chunks", "chunks, unused"])
def test_an_outer_no_sync_synchronises_nothing(ranks, how):
    got, want = ranks.run(2, accumulated, how), ranks.run(2, accumulated, "one pass")
    for g, w in zip(got, want, strict=True):
        for a, b in zip(g, w, strict=True):
            assert_same(a, b)
    first, second = got
    assert (first[1][0] - second[1][0]).norm() > 0.1 * first[1][0].norm()  # not reduced yet
    assert_same(first[2], second[2], 0)


def hooked(group, how):
    """Return what parameter hooks saw: gradient norms before and after clipping, and the number of calls."""
    model, seen = Towers(), []
    model.spare.requires_grad_(how == "chunks")

    def clip(grad):
        seen.append(grad.norm().item())
        return grad.clamp(-0.02, 0.02)

    for p in model.parameters() if how == "chunks" else (*model.image.parameters(), *model.text.parameters()):
        p.register_hook(clip)
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    wrapped = DistributedDataParallel(model, process_group=group)
    for step in range(2):
        views = given(model, own(group, batches(step)))
        if how == "chunks":
            sk.chunked_backward(wrapped, views, loss(group), 2)
        else:
            loss(group)([encode(wrapped, x) for x in views]).backward()
    return gradients(model), sorted(seen)


def test_hooks_of_parameters_see_the_whole_gradient_once(ranks):
    for (got, seen), (want, expected) in zip(
        ranks.run(2, hooked, "chunks"), ranks.run(2, hooked, "one pass"), strict=True
    ):
        assert_same(got, want)
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-9, atol=1e-12)


def compiled(group, outside):
    model = Towers()
    if outside:
        wrapped = torch.compile(DistributedDataParallel(model, process_group=group), backend="eager")
    else:
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager"), process_group=group)
    for step in range(2):
        sk.chunked_backward(wrapped, given(model, own(group, batches(step))), loss(group), 3)
    return gradients(model)


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_encoders(ranks, outside):
    want = one_process("towers", 2)[-1]
    for got in ranks.run(2, compiled, outside):
        assert_same(got, want)


# Sharded parameters: gradients are reduced in every chunk


def sharded(group, kind, name):
    model, after = MODELS[name](), []
    inputs = functools.partial(given, copy.deepcopy(model))
    if kind == "FSDP1":
        policy = ModuleWrapPolicy({nn.Sequential})
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, group, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        for part in model.children() if kind == "FSDP2, parts" else ():
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for step in range(3):
        if kind == "FSDP2, accumulating":
            model.set_requires_gradient_sync(step == 2)
        sk.chunked_backward(model, inputs(own(group, batches(step, even=True))), loss(group), 2)
        whole = FullyShardedDataParallel.summon_full_params(model, with_grads=True) if kind == "FSDP1" else None
        with whole or contextlib.nullcontext():
            after.append(gradients(model))
    return after


@pytest.mark.parametrize("name", ["towers", "locked"])
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2", "FSDP2, parts", "FSDP2, accumulating"])
def test_sharded_encoders(ranks, kind, name):
    want = one_process(name, 3, even=True)
    for got in ranks.run(2, sharded, kind, name):
        for step, (g, w) in enumerate(zip(got, want, strict=True)):
            if kind == "FSDP2, accumulating" and step < 2:
                assert all(grad is None for grad in g)  # not yet reduced
                continue
            for grad, expected in zip(g, w, strict=True):
                if expected is None:
                    assert grad is None or not grad.any()
                else:
                    assert (grad - expected).norm() <= 1e-9 * expected.norm()


# Errors, raised on every process


def refused(group, how):
    rank, views = dist.get_rank(group), own(group, batches(0))
    model = Towers()
    wrapped = DistributedDataParallel(model, process_group=group, static_graph=how == "static_graph")
    if how == "mixed_precision":  # its constructor needs an accelerator
        wrapped.mixed_precision = _MixedPrecision()
    call = functools.partial(sk.chunked_backward, wrapped, given(model, views), loss(group), 2)
    context = contextlib.nullcontext()
    if how == "join":
        context = Join([wrapped])
    elif how == "inside":
        model.forward = lambda: sk.chunked_backward(model.image, views, loss(group), 2)
        call = wrapped
    elif how == "frozen later":
        model.text.requires_grad_(False)
    elif how == "counts":
        model = Towers()
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        call = functools.partial(sk.chunked_backward, model, given(model, views), loss(group), [2, 2 - rank])
    elif how == "nothing on rank 1":
        model.forward = lambda image=None, text=None: tower(6, 0)(text if image is None else image).detach()
        if rank == 0:
            del model.forward
    try:
        with context:
            call()
    except (RuntimeError, ValueError) as error:
        return str(error), gradients(model)
    return None, gradients(model)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("static_graph", "encoder: expected DistributedDataParallel without static_graph=True"),
        ("mixed_precision", "encoder: expected DistributedDataParallel without mixed_precision="),
        ("join", "encoder: expected DistributedDataParallel without join()"),
        ("inside", "chunked_backward: expected a call outside of the forward of a DistributedDataParallel"),
        ("counts", "chunk_size: expected as many chunks in each process"),
        ("frozen later", "Expected to have finished reduction"),
    ],
)
def test_unsupported_wrappers_raise(ranks, how, message):
    for error, grads in ranks.run(2, refused, how):
        assert error.startswith(message)
        assert how == "frozen later" or all(g is None for g in grads)


def test_a_process_that_trains_nothing_raises_and_others_do_not_wait(ranks):
    (no_error, grads), (error, other_grads) = ranks.run(2, refused, "nothing on rank 1")
    assert no_error is None
    assert error.startswith("encoder: expected rows that require grad, got none in any chunk")
    assert_same(grads, other_grads, 0)
