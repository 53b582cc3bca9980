"""InfoNCE over the processes of a group: gloo, 2, 3 and 4 uneven ranks, against one process with the whole batch."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import IMPLS, assert_within, randn, random_labels, run
from ranks import Ranks
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SIZES = {2: (9, 4), 3: (5, 1, 11), 4: (2, 13, 1, 6)}


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks(4)
    yield processes
    processes.close()


def own(group, tensor, dim=1):
    """Return this rank's samples of a tensor of the whole batch."""
    sizes = SIZES[dist.get_world_size(group)]
    rank = dist.get_rank(group)
    return tensor.narrow(dim, sum(sizes[:rank]), sizes[rank])


def shares(group, views, cases):
    """Return (loss, gradients of own rows and temperature) per case ``(impl, temperature, upstream, arguments)``."""
    results = []
    for impl, temperature, upstream, arguments in cases:
        arguments = dict(arguments)
        if arguments.get("labels") is not None:
            arguments["labels"] = own(group, arguments["labels"], 0)
        for name in ("duplicates", "logq"):
            if name in arguments:
                arguments[name] = own(group, arguments[name], 0)
        if arguments.get("queue") is not None and arguments["queue"].dim() == 3:
            arguments["queue"] = arguments["queue"][dist.get_rank(group)]
        if upstream.dim():
            upstream = own(group, upstream)
        results.append(
            run(sk.info_nce_loss, own(group, views), temperature, upstream, group=group, impl=impl, **arguments)
        )
    return results


def check(ranks, world, views, temperature, upstream, **arguments):
    """Compare all implementations with the dense loss. Averaged like in DistributedDataParallel, the gradient of "mean"
    and "sum" is that of one process; that of "none" is already a sum over the ranks and is not averaged."""
    queue = arguments.get("queue")
    if queue is not None and queue.dim() == 3:
        want = _each_with_its_queue(world, views, temperature, upstream, arguments)
    else:
        wide = {**arguments, "queue": None if queue is None else queue.double()}
        want = run(spec.info_nce_loss, views.double(), temperature, upstream.double(), **wide)
    cases = [(impl, temperature, upstream, arguments) for impl in IMPLS]
    averaged = world if arguments.get("reduction", "mean") != "none" else 1
    for results in zip(*ranks.run(world, shares, views, cases), strict=True):
        losses, grads, temperatures = zip(*results, strict=True)
        loss = torch.cat(losses, 1) if averaged == 1 else losses[0]
        assert averaged == 1 or all(torch.equal(other, loss) for other in losses)
        for name, got, expected in zip(
            ("loss", "grad", "temperature"),
            (loss, torch.cat(grads, 1) / averaged, sum(temperatures) / averaged),
            want,
            strict=True,
        ):
            assert_within(name, got, expected)


def _each_with_its_queue(world, views, temperature, upstream, arguments):
    """Expected results if each rank's anchors use only that rank's queue."""
    results = []
    arguments = {**arguments, "reduction": "none"}
    rank = torch.repeat_interleave(torch.tensor(SIZES[world]))
    for r, queue in enumerate(arguments.pop("queue").double()):
        weight = upstream.double() * (rank == r)
        loss, *grads = run(spec.info_nce_loss, views.double(), temperature, weight, queue=queue, **arguments)
        results.append((loss * (rank == r), *grads))
    return [sum(parts) for parts in zip(*results, strict=True)]


ONE = torch.tensor(1.0, dtype=torch.float64)


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mean(ranks, world, objective):
    views = randn(3, sum(SIZES[world]), 7, dtype=torch.float64)
    check(ranks, world, views, 0.3, ONE, objective=objective)
    check(ranks, world, views, 0.05, ONE, objective=objective, core_view=1, reduction="sum")


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("classes", [1, 3, 10**6])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_labels(ranks, world, objective, classes):
    batch = sum(SIZES[world])
    queue = randn(5, 7, dtype=torch.float64, seed=1) if classes == 1 else None
    views = randn(2, batch, 7, dtype=torch.float64)
    check(ranks, world, views, 0.3, ONE, objective=objective, labels=random_labels(batch, classes), queue=queue)


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_duplicates_and_logq(ranks, world, objective):
    """Ids mean the same on every process, and so does the least of the log probabilities."""
    batch = sum(SIZES[world])
    views, logq = randn(2, batch, 7, dtype=torch.float64), 2 * randn(batch, dtype=torch.float64, seed=4)
    weight = randn(2, batch, dtype=torch.float64, seed=5)
    arguments = {"objective": objective, "duplicates": random_labels(batch, 5), "logq": logq}
    check(ranks, world, views, 0.3, ONE, **arguments)
    check(ranks, world, views, 0.3, weight, reduction="none", **arguments)


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_per_anchor_losses(ranks, world, objective):
    """Each anchor's loss has its own weight, known only to its rank."""
    batch = sum(SIZES[world])
    views, weight = randn(2, batch, 7, dtype=torch.float64), randn(2, batch, dtype=torch.float64, seed=5)
    check(ranks, world, views, 0.3, weight, objective=objective, reduction="none")


@pytest.mark.parametrize("labelled", [False, True])
def test_queues_of_their_own(ranks, labelled):
    batch = sum(SIZES[3])
    views, weight = randn(2, batch, 7, dtype=torch.float64), randn(2, batch, dtype=torch.float64, seed=5)
    labels = random_labels(batch, 3) if labelled else None
    queue = randn(3, 6, 7, dtype=torch.float64, seed=1)
    check(ranks, 3, views, 0.3, weight, reduction="none", labels=labels, queue=queue)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(ranks, dtype):
    views = randn(2, sum(SIZES[3]), 16, dtype=dtype)
    temperature = torch.tensor(0.2, dtype=dtype).item()
    check(ranks, 3, views, temperature, torch.ones((), dtype=dtype), normalize=False)
    check(ranks, 3, views, temperature, torch.ones((), dtype=dtype))


def weighted(group, views, weights):
    """Return the gradient if every rank weights the common loss differently."""
    leaf = own(group, views).clone().requires_grad_()
    (sk.info_nce_loss(leaf, group=group) * weights[dist.get_rank(group)]).backward()
    return leaf.grad


def test_ranks_that_weigh_the_loss_differently(ranks):
    """The gradient is that of the sum, over the ranks, of the values that each computes from its result."""
    views = randn(2, sum(SIZES[3]), 7, dtype=torch.float64)
    weights = (0.5, 2.0, -3.0)
    _, want, _ = run(spec.info_nce_loss, views, 0.1, ONE * sum(weights))
    assert_within("grad", torch.cat(ranks.run(3, weighted, views, weights), 1), want)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7)).double()


class Trained(nn.Module):
    """A network with its loss, as a trainer wraps it: the temperature is one of its parameters."""

    def __init__(self, group=None):
        super().__init__()
        self.network = network()
        self.loss = sk.InfoNCELoss(0.2, learnable_temperature=True, objective="cross_view", group=group)

    def forward(self, views):
        return self.loss([self.network(x) for x in views])


def train(group, views, steps):
    """Run steps of DistributedDataParallel with its averaging; return the parameters."""
    method = nn.parallel.DistributedDataParallel(Trained(group), process_group=group)
    optimizer = torch.optim.SGD(method.parameters(), 0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = method(own(group, views))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in method.parameters()]


@pytest.mark.parametrize("world", SIZES)
def test_distributed_data_parallel_trains_as_one_process(ranks, world):
    views = randn(2, sum(SIZES[world]), 6, dtype=torch.float64)
    alone = Trained()
    optimizer = torch.optim.SGD(alone.parameters(), 0.5)
    expected = []
    for _ in range(4):
        optimizer.zero_grad()
        z = torch.stack([alone.network(x) for x in views])
        loss = spec.info_nce_loss(z, temperature=alone.loss.temperature.double(), objective="cross_view")
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for losses, parameters in ranks.run(world, train, views, 4):
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)  # the temperature is a float32 number
        for got, want in zip(parameters, alone.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-8)


def error_of(group, arguments):
    """Return the error of a call with this rank's arguments; assert that the group still works."""
    try:
        sk.info_nce_loss(group=group, **arguments[dist.get_rank(group)])
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "nothing"
    total = torch.ones(())
    dist.all_reduce(total, group=group)
    assert total.item() == dist.get_world_size(group)
    return text


GOOD = {"views": torch.ones(2, 3, 4)}
LABELS = torch.arange(3)


@pytest.mark.parametrize(
    ("bad", "on_the_bad_rank", "elsewhere"),
    [
        ({"views": torch.ones(2, 3, 5)}, "ValueError: group: features has to be .* 4 on rank 0 and 5 on rank 1", None),
        ({"views": torch.ones(3, 3, 4)}, "ValueError: group: views has to be .* 2 on rank 0 and 3 on rank 1", None),
        (
            {"views": torch.ones(2, 3, 4, dtype=torch.float64)},
            "ValueError: group: dtype has .* 'float32' on rank 0 and 'float64' on rank 1",
            None,
        ),
        ({**GOOD, "objective": "decoupled"}, "ValueError: group: objective .* 'supcon_out' .* 'decoupled'", None),
        ({**GOOD, "temperature": 0.2}, "ValueError: group: temperature .* 0.1 on rank 0 and 0.2 on rank 1", None),
        ({**GOOD, "reduction": "none"}, "ValueError: group: reduction .* 'mean' .* 'none'", None),
        ({**GOOD, "labels": LABELS}, "ValueError: group: labels .* None on rank 0 and labels on rank 1", None),
        (
            {**GOOD, "duplicates": LABELS},
            "ValueError: group: .*duplicates .* None on rank 0 and dupl.* on rank 1",
            None,
        ),
        ({**GOOD, "logq": torch.ones(3)}, "ValueError: group: logq .* None on rank 0 and given on rank 1", None),
        ({**GOOD, "queue": torch.ones(2, 4)}, "ValueError: group: queue .* None on rank 0 and given on rank 1", None),
        ({**GOOD, "impl": "reference"}, "ValueError: group: impl has to be", None),
        (
            {"views": torch.ones(2, 3, 4, requires_grad=True)},
            "ValueError: group: gradient .* not wanted on rank 0 and wanted on rank 1",
            None,
        ),
        ({**GOOD, "temperature": 10**400}, "ValueError: temperature: ", "RuntimeError: group: the arguments were ref"),
        (
            {"views": torch.ones(2, 0, 4)},
            "ValueError: views: expected a non-empty batch",
            "RuntimeError: group: the arguments were refused on rank 1",
        ),
        ({"views": "no tensors"}, "TypeError: views: ", "RuntimeError: group: the arguments were refused on rank 1"),
    ],
)
def test_bad_input_is_an_error_on_every_rank(ranks, bad, on_the_bad_rank, elsewhere):
    errors = ranks.run(3, error_of, [GOOD, bad, GOOD])
    for rank, error in enumerate(errors):
        with pytest.raises(AssertionError, match=on_the_bad_rank if rank == 1 else elsewhere or on_the_bad_rank):
            raise AssertionError(error)


def test_one_sample_together_is_too_few(ranks):
    (error,) = ranks.run(1, error_of, [{"views": torch.ones(2, 1, 4)}])
    assert error.startswith("ValueError: views: expected at least 2 samples in the group (one sample has no negatives)")


def test_one_sample_each_is_enough(ranks):
    views = randn(2, 3, 4, dtype=torch.float64)
    one = [{"views": views[:, r : r + 1]} for r in range(3)]
    assert ranks.run(3, error_of, one) == ["nothing"] * 3


def modes(group, views):
    """Run calls under the modes of autograd and autocast; return each gradient or error."""
    mine = own(group, views)

    def loss(x, **arguments):
        return sk.info_nce_loss(x, group=group, **arguments)

    found = {}
    with torch.no_grad():
        found["no_grad"] = loss(mine)
    leaf = mine.clone().requires_grad_()
    value = loss(leaf)
    value.backward(retain_graph=True)
    value.backward()
    found["twice"] = leaf.grad
    leaf = mine.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False).backward()
    found["checkpoint"] = leaf.grad
    leaf = mine.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    half = [x.half().requires_grad_() for x in mine]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half)
    value.backward()
    found["autocast"] = torch.stack([x.grad for x in half])
    return found


def test_autograd_and_autocast(ranks):
    views = randn(2, sum(SIZES[3]), 7).half().double()
    loss, want, _ = run(spec.info_nce_loss, views, 0.1)
    results = ranks.run(3, modes, views)
    for found in results:
        assert_within("no_grad", found["no_grad"], loss)
    for name, times in (("twice", 2), ("checkpoint", 1), ("autocast", 1)):
        assert_within(name, torch.cat([r[name] for r in results], 1) / 3, times * want)


def infinite(group, views, labels):
    return sk.info_nce_loss(
        own(group, views), group=group, reduction="none", normalize=False, labels=own(group, labels, 0), impl="cpu"
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_nan_and_inf_give_the_same_losses_as_one_process(ranks, value):
    views, labels = randn(2, sum(SIZES[3]), 7, dtype=torch.float64), random_labels(sum(SIZES[3]), 4)
    views[1, 5, 3] = value
    want = sk.info_nce_loss(views, reduction="none", normalize=False, labels=labels, impl="reference")
    got = torch.cat(ranks.run(3, infinite, views, labels), 1)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-9, atol=1e-9)


def compiled(group, views):
    leaf = own(group, views).clone().requires_grad_()
    loss = torch.compile(lambda x: sk.info_nce_loss(2 * x, group=group) + 1, backend="eager")(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def test_a_compiled_caller(ranks):
    views = randn(2, sum(SIZES[2]), 7, dtype=torch.float64)
    loss, want, _ = run(spec.info_nce_loss, views, 0.1)
    results = ranks.run(2, compiled, views)
    assert_within("grad", torch.cat([grad for _, grad in results], 1) / 2, want)
    assert_within("loss", results[0][0], loss + 1)


def scaling_benchmark():
    """Import `benchmarks/scaling.py` on demand: the sanitizers' copy of the tree has no benchmarks."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    import scaling

    return scaling


def sent(group, views, labels):
    """Return the bytes that this rank receives in a forward and backward."""
    scaling = scaling_benchmark()
    leaf = own(group, views).clone().requires_grad_()
    with scaling.counted() as received:
        sk.info_nce_loss(leaf, labels=None if labels is None else own(group, labels, 0), group=group).backward()
    return sum(received)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_bytes_received_match_the_documents(ranks, labelled):
    """Shares of different sizes are padded to the longest one."""
    labels = random_labels(sum(SIZES[3]), 4) if labelled else None
    # log_weights, positives and the upstream gradient of each row, in float64.
    columns = 1 + 3 + 1 if labelled else 3 + 3 + 1
    expected = scaling_benchmark().received_bytes(3, 3 * max(SIZES[3]), 5, 3, 4, 8, columns, labelled)
    assert ranks.run(3, sent, randn(3, sum(SIZES[3]), 5), labels) == [expected] * 3


def copied(group, views):
    """Return the loss of a method with a group and that of its copy."""
    torch.manual_seed(0)
    method = sk.methods.SimCLR(nn.Linear(7, 7).double(), nn.Identity(), group=group)
    other = copy.deepcopy(method)
    assert other.loss.group is group
    assert other.encoder.weight is not method.encoder.weight
    assert copy.deepcopy(sk.methods.MoCo(nn.Linear(7, 7), nn.Identity(), 8, dim=7, group=group)).group is group
    return method(*own(group, views)).item(), other(*own(group, views)).item()


def test_copies_share_the_group(ranks):
    for one, other in ranks.run(2, copied, randn(2, sum(SIZES[2]), 7, dtype=torch.float64)):
        assert one == other


def leaves(group, views, dead):
    """One rank exits silently; return how long the others wait, and their errors."""
    if dist.get_rank(group) == dead:
        import os

        os._exit(0)
    try:
        sk.info_nce_loss(own(group, views), group=group)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_the_remaining_ranks_raise_if_one_dies():
    processes = Ranks(3)
    views = randn(2, sum(SIZES[3]), 7)
    processes.start(3, leaves, views, 1)
    errors = [processes.answer(rank) for rank in (0, 2)]
    processes.close()
    assert all(error is None and name != "nothing" for name, error in errors), errors


def test_groups_that_are_none():
    views = copy.deepcopy(GOOD["views"])
    for group in ("word", 3, True, [0, 1]):
        for make in (sk.InfoNCELoss, lambda group: sk.info_nce_loss(views, group=group)):
            with pytest.raises(TypeError, match=r"group: expected 'world', 'local', None or a torch\.distributed\.Pro"):
                make(group=group)
    with pytest.raises(ValueError, match="group: expected a group that this process is a member of"):
        sk.info_nce_loss(views, group=dist.GroupMember.NON_GROUP_MEMBER)
