"""The sigmoid loss over the batch of several processes: values and gradients are those of one with the whole batch."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import IMPLS, randn
from ranks import Ranks

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.compat.open_clip import SigLipLoss

SIZES = {1: (5,), 2: (3, 8), 3: (4, 1, 6), 4: (3, 3, 3, 3)}
WEIGHTS = (1.0, 0.3, 2.0, 0.7)
"""The processes' upstream gradients, which may differ."""
WIDTH = 6


@pytest.fixture(scope="module")
def four():
    processes = Ranks(4)
    yield processes
    processes.close()


def own(group, x):
    return x.split(SIZES[dist.get_world_size(group)])[dist.get_rank(group)]


def inputs(world):
    batch = sum(SIZES[world])
    x, y = (randn(batch, WIDTH, dtype=torch.float64, seed=seed) for seed in (0, 1))
    scalars = torch.tensor(4.0, dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    return x, x + y, *scalars


def duplicates(world):
    return torch.arange(sum(SIZES[world])) * 7 % 5


def one(group, impl, reduction, with_duplicates):
    """Return this process's loss and the gradients of its rows and of the scalars."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    x, y, scale, bias = inputs(world)
    leaves = [t.clone().requires_grad_() for t in (own(group, x), own(group, y), scale, bias)]
    ids = own(group, duplicates(world)) if with_duplicates else None
    loss = sk.siglip_loss(
        *leaves[:2], scale=leaves[2], bias=leaves[3], duplicates=ids, reduction=reduction, group=group, impl=impl
    )
    grads = torch.autograd.grad(WEIGHTS[rank] * loss.sum(), leaves)
    if reduction == "none":
        return loss.detach(), grads, None
    return (
        loss.detach(),
        grads,
        sk.siglip_value_and_grad(
            *leaves[:2], scale=scale, bias=bias, duplicates=ids, reduction=reduction, group=group, impl=impl
        ),
    )


@pytest.mark.parametrize("with_duplicates", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("world", SIZES)
def test_values_and_gradients(four, world, impl, reduction, with_duplicates):
    leaves = [t.requires_grad_() for t in inputs(world)]
    ids = duplicates(world) if with_duplicates else None
    loss = spec.siglip_loss(*leaves[:2], scale=leaves[2], bias=leaves[3], duplicates=ids, reduction=reduction)
    sizes = SIZES[world]
    if reduction == "none":
        upstream = torch.cat([torch.full((n,), w, dtype=torch.float64) for n, w in zip(sizes, WEIGHTS, strict=False)])
        want = torch.autograd.grad(loss, leaves, upstream)
    else:
        want = torch.autograd.grad(sum(WEIGHTS[:world]) * loss, leaves, retain_graph=True)
        unweighted = torch.autograd.grad(world * loss, leaves)
    results = four.run(world, one, impl, reduction, with_duplicates)
    for rank, (value, grads, again) in enumerate(results):
        expected = loss.split(sizes)[rank] if reduction == "none" else loss
        torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
        for got, whole in zip(grads[:2], want[:2], strict=True):
            torch.testing.assert_close(got, whole.split(sizes)[rank], rtol=1e-9, atol=1e-12)
        if again is not None:
            torch.testing.assert_close(again[0], value)
            for got, whole in zip(again[1:3], unweighted[:2], strict=True):
                torch.testing.assert_close(got, whole.split(sizes)[rank], rtol=1e-9, atol=1e-12)
    for k in (2, 3):  # each process has the part of its own rows; with reductions the upstreams add up
        parts = sum(grads[k] for _, grads, _ in results)
        torch.testing.assert_close(parts, want[k], rtol=1e-9, atol=1e-12)


def share(group, dist_impl):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    x, y, scale, bias = inputs(world)
    leaves = [t.clone().requires_grad_() for t in (own(group, x), own(group, y), scale, bias)]
    module = SigLipLoss(rank=rank, world_size=4, dist_impl=dist_impl)
    loss = module(*leaves)
    return loss.detach(), torch.autograd.grad(WEIGHTS[rank] * loss, leaves)


@pytest.mark.parametrize("dist_impl", [None, "gather"])
def test_the_drop_in_has_the_loss_of_its_own_images(four, dist_impl):
    """And the gradient of the sum of all processes' losses, of which each may have another weight."""
    leaves = [t.requires_grad_() for t in inputs(4)]
    losses = spec.siglip_loss(*leaves[:2], scale=leaves[2], bias=leaves[3], normalize=False, reduction="none")
    losses = torch.stack([part.mean() for part in losses.split(SIZES[4])])
    want = torch.autograd.grad(losses, leaves, torch.tensor(WEIGHTS, dtype=torch.float64))
    results = four.run(4, share, dist_impl)
    for rank, (loss, grads) in enumerate(results):
        torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-9, atol=0)
        for got, whole in zip(grads[:2], want[:2], strict=True):
            torch.testing.assert_close(got, whole.split(SIZES[4])[rank], rtol=1e-9, atol=1e-12)
    for k in (2, 3):
        torch.testing.assert_close(sum(grads[k] for _, grads in results), want[k], rtol=1e-9, atol=1e-12)


DISAGREE = {
    "features": (lambda rank: {"y": torch.ones(3, 5 + rank), "x": torch.ones(3, 5 + rank)}, "features.*5 on rank 0"),
    "scale": (lambda rank: {"scale": 1.0 + rank}, "scale.*1.0 on rank 0 and 2.0 on rank 1"),
    "bias": (lambda rank: {"bias": torch.tensor(float(rank))}, "bias.*0.0 on rank 0 and 1.0 on rank 1"),
    "duplicates": (lambda rank: {"duplicates": torch.arange(3) if rank else None}, "duplicates.*None on rank 0.*given"),
    "reduction": (lambda rank: {"reduction": ("mean", "sum")[rank]}, "reduction.*'mean' on rank 0 and 'sum'"),
    "dtype": (lambda rank: {n: torch.ones(3, 5, dtype=(torch.float32, torch.float64)[rank]) for n in "xy"}, "dtype"),
    "gradient": (
        lambda rank: {"x": torch.ones(3, 5, requires_grad=rank == 1)},
        "a gradient has.*not wanted on rank 0 and of x on rank 1",
    ),
    "refused": (lambda rank: {"scale": 1.0 - rank}, "scale: expected a finite number > 0|refused on rank 1"),
}


def disagree(group, name):
    change, _ = DISAGREE[name]
    try:
        sk.siglip_loss(**({"x": torch.ones(3, 5), "y": torch.ones(3, 5)} | change(dist.get_rank(group))), group=group)
    except (ValueError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize("name", DISAGREE)
def test_arguments_that_differ_raise_on_every_rank(ranks, name):
    for message in ranks.run(2, disagree, name):
        assert re.search(DISAGREE[name][1], message), message


def gradients_of(group):
    """Return the mean over the ranks of a model's gradient, as DistributedDataParallel takes it, and the scalars'."""
    torch.manual_seed(0)
    left, right = (torch.nn.Linear(WIDTH, 4).double() for _ in range(2))
    loss = sk.SigLIPLoss(4.0, -2.0, group=group).double()
    x, y, *_ = inputs(2)
    loss(left(own(group, x)), right(own(group, y))).backward()
    grads = [p.grad for m in (left, right, loss) for p in m.parameters()]
    for g in grads:
        dist.all_reduce(g)
    return [g / 2 for g in grads]


def test_the_average_of_data_parallel_training_is_the_gradient_of_the_whole_batch(ranks):
    torch.manual_seed(0)
    left, right = (torch.nn.Linear(WIDTH, 4).double() for _ in range(2))
    loss = sk.SigLIPLoss(4.0, -2.0).double()
    x, y, *_ = inputs(2)
    loss(left(x), right(y)).backward()
    want = [p.grad for m in (left, right, loss) for p in m.parameters()]
    for got in ranks.run(2, gradients_of):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def narrow(group):
    """Return the loss of bfloat16 rows, whose gradient crosses the processes in float32."""
    x, y, *_ = inputs(2)
    leaves = [own(group, F.normalize(t, dim=-1)).bfloat16().requires_grad_() for t in (x, y)]
    loss = sk.siglip_loss(*leaves, group=group)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def test_half_precision(ranks):
    x, y, *_ = inputs(2)
    leaves = [F.normalize(t, dim=-1).bfloat16().double().requires_grad_() for t in (x, y)]
    loss = spec.siglip_loss(*leaves)
    want = torch.autograd.grad(2 * loss, leaves)
    for rank, (value, grads) in enumerate(ranks.run(2, narrow)):
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), loss.detach(), rtol=2**-8, atol=0)
        for got, whole in zip(grads, want, strict=True):
            part = whole.split(SIZES[2])[rank]
            assert (got.double() - part).norm() <= 2**-8 * part.norm()


def several_uses(group):
    """Return the gradient of two losses of one upstream gradient, and that tensor after a backward."""
    x, y, *_ = inputs(2)
    leaf = own(group, x).clone().requires_grad_()
    both = sk.siglip_loss(leaf, own(group, y), group=group) + sk.siglip_loss(leaf, own(group, y), group=group)
    upstream = torch.ones((), dtype=torch.float64)
    both.backward(upstream)
    return leaf.grad, upstream


def test_an_upstream_gradient_with_several_uses(ranks):
    """In float64 it is summed over the processes without a conversion, which would copy it."""
    x, y, *_ = inputs(2)
    leaf = x.requires_grad_()
    (want,) = torch.autograd.grad(4 * spec.siglip_loss(leaf, y), leaf)
    for rank, (grad, upstream) in enumerate(ranks.run(2, several_uses)):
        assert upstream == 1
        torch.testing.assert_close(grad, want.split(SIZES[2])[rank], rtol=1e-9, atol=1e-12)


def calls_of_different_kinds(group, kind):
    x, first = torch.ones(3, 5), dist.get_rank(group) == 0
    try:
        if kind == "value and gradient":
            (sk.siglip_value_and_grad if first else sk.siglip_loss)(x, x, group=group)
        elif kind == "drop-in":
            loss = sk.siglip_loss(x, x, group="world") if first else None
            loss = loss or SigLipLoss(rank=1, world_size=2)(x, x, 10.0, -10.0)
        else:
            (sk.info_nce_value_and_grad if first else sk.info_nce_loss)([x, x], group=group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["value and gradient", "drop-in", "InfoNCE"])
def test_calls_of_different_kinds_raise_on_every_rank(ranks, kind):
    """They would wait for different exchanges."""
    for message in ranks.run(2, calls_of_different_kinds, kind):
        assert "has to be the same on every rank" in message
        assert "not wanted" in message
