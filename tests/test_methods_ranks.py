"""Methods and chunked encoding under DistributedDataParallel: two uneven gloo ranks against one process."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import randn
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import selfsup_kernels as sk

SIZES = (7, 4)


def own(group, views):
    rank = dist.get_rank(group)
    return [x.narrow(0, sum(SIZES[:rank]), SIZES[rank]) for x in views]


def batches(step, num_views=2):
    x = randn(sum(SIZES), 6, seed=step, dtype=torch.float64)
    return [
        x + (0.3 + 0.2 * v) * randn(sum(SIZES), 6, seed=100 * (v + 1) + step, dtype=x.dtype) for v in range(num_views)
    ]


def layers(*sizes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1]).double()


def make(name, group=None):
    f, g, q = layers(6, 8), layers(8, 5, seed=1), layers(5, 5, seed=2)
    if name == "SimCLR":
        return sk.methods.SimCLR(f, g, 0.3, learnable_temperature=True, group=group).double()
    if name == "CMC":
        return sk.methods.CMC([f, layers(6, 8, seed=3)], g, 0.3, group=group)
    if name == "MoCo":
        method = sk.methods.MoCo(f, g, 16, 0.9, 0.3, group=group)
        # Unit rows in float64 too.
        method.queue = F.normalize(method.queue.double(), dim=-1)
        return method
    if name == "MoCo, symmetric":
        method = sk.methods.MoCo(f, g, 16, 0.9, 0.3, q, symmetric=True, group=group)
        method.queue = F.normalize(method.queue.double(), dim=-1)
        return method
    if name == "SigLIP":
        return sk.methods.SigLIP(f, layers(6, 8, seed=3), scale=5.0, bias=-2.0, group=group).double()
    return sk.methods.BYOLContrast(f, g, q, 0.9, 0.3, byol_weight=0.7, contrast_weight=1.3, group=group)


def train(method, wrapped, steps, take):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for step in range(steps):
        loss = wrapped(*take(batches(step, 3 if isinstance(method, sk.methods.BYOLContrast) else 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(method, "update_target"):
            method.update_target()
        losses.append(loss.detach())
    return torch.stack(losses), method.state_dict()


def train_on_a_rank(group, name):
    method = make(name, group)
    wrapped = DistributedDataParallel(method, process_group=group, broadcast_buffers=False)
    return train(method, wrapped, 3, lambda views: own(group, views))


@pytest.mark.parametrize("name", ["SimCLR", "CMC", "MoCo", "MoCo, symmetric", "SigLIP", "BYOLContrast"])
def test_training_equals_one_process(ranks, name):
    """Losses, weights and the target after three steps; the ranks' batches differ in size and data."""
    one = make(name)
    losses, want = train(one, one, 3, lambda views: views)
    results = ranks.run(2, train_on_a_rank, name)
    for got_losses, state in results:
        torch.testing.assert_close(got_losses, losses, rtol=1e-9, atol=0)
        assert state.keys() == want.keys()
        for key, value in want.items():
            if key != "queue":
                torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-10, msg=key)
    if "MoCo" in name:
        first, second = (state["queue"] for _, state in results)
        assert torch.equal(first, second)
        # Keys are stored rank by rank, so with several views their order differs.
        torch.testing.assert_close(rows_in_order(first), rows_in_order(want["queue"]), rtol=1e-8, atol=1e-10)
        if "symmetric" not in name:
            torch.testing.assert_close(first, want["queue"], rtol=1e-8, atol=1e-10)


def rows_in_order(queue):
    return queue[queue[:, 0].argsort()]


def enqueue_another_width(group):
    rows = torch.ones(3, 4 + dist.get_rank(group))
    method = sk.methods.MoCo(nn.Identity(), nn.Identity(), 8, dim=rows.shape[1], group=group)
    try:
        method.enqueue(rows)
    except ValueError as error:
        return str(error)


def test_keys_of_another_width_on_one_rank_are_an_error_on_all(ranks):
    for message in ranks.run(2, enqueue_another_width):
        assert message == "group: expected rows of one width on all processes, got [4, 5]"


# Chunked encoding


def encode(seed=0):
    return nn.Sequential(layers(6, 16, seed=seed), nn.Linear(16, 5, dtype=torch.float64))


def contrast(rows):
    """An eager loss of the whole batch in one process."""
    z = [F.normalize(r, dim=-1) for r in rows]
    target = torch.arange(len(z[0]))
    return sum(F.cross_entropy(z[u] @ z[1 - u].T / 0.3, target) for u in (0, 1)) / 2


def chunked(group, start, per_view, chunk_size):
    encoders = copy.deepcopy(start)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    wrapped = [DistributedDataParallel(f, process_group=group) for f in encoders]
    for ddp in wrapped:
        ddp.register_comm_hook(None, hook)
    loss = sk.InfoNCELoss(0.3, objective="cross_view", group=group)
    values = []
    for step in range(2):  # gradients accumulate in the second step
        views = own(group, batches(step))
        size = chunk_size if dist.get_rank(group) == 0 else 1
        values.append(sk.chunked_backward(wrapped if per_view else wrapped[0], views, loss, size))
    return torch.stack(values), [[p.grad for p in f.parameters()] for f in encoders], reduced


@pytest.mark.parametrize("chunk_size", [3, 50])
@pytest.mark.parametrize("per_view", [False, True])
def test_chunks_under_ddp_equal_one_pass_in_one_process(ranks, per_view, chunk_size):
    """Gradients are equal, with one reduction per step and encoder, though the ranks have 2 to 8 chunks."""
    start = [encode(0), encode(1)] if per_view else [encode(0)]
    one = copy.deepcopy(start)
    losses = []
    for step in range(2):
        loss = contrast([f(x) for f, x in zip(one if per_view else one * 2, batches(step), strict=True)])
        loss.backward()
        losses.append(loss.detach())
    for values, grads, reduced in ranks.run(2, chunked, start, per_view, chunk_size):
        torch.testing.assert_close(values, torch.stack(losses), rtol=1e-11, atol=0)
        for f, own_grads in zip(one, grads, strict=True):
            for p, grad in zip(f.parameters(), own_grads, strict=True):
                assert (grad - p.grad).norm() <= 1e-9 * p.grad.norm()
        size = sum(p.numel() for p in start[0].parameters())
        assert reduced == [size] * (4 if per_view else 2)


class Counted(nn.Module):
    """A module whose result depends on the number of calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(()))
        self.double()
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append((self.calls.item(), torch.is_grad_enabled()))
        return self.norm(self.linear(x)) * (1 + 0.1 * self.calls)


def buffers_under_ddp(group):
    torch.manual_seed(dist.get_rank(group))
    encoder = Counted()
    wrapped = DistributedDataParallel(encoder, process_group=group)
    loss = sk.InfoNCELoss(0.3, group=group)
    for step in range(2):
        sk.chunked_backward(wrapped, own(group, batches(step)), loss, 4 - 2 * dist.get_rank(group))
    return encoder.seen, encoder.norm.num_batches_tracked.item(), encoder.linear.weight.grad


def test_buffers_that_ddp_broadcasts(ranks):
    """The first forward of a step broadcasts rank 0's buffers; both encodings must start from these."""
    results = ranks.run(2, buffers_under_ddp)
    for calls, tracked, _ in results:
        assert tracked == calls[-1][0] == 8  # two views of two chunks (4 + 3 samples, 2 + 2), twice
        assert [c for c, grad in calls if not grad] == [c for c, grad in calls if grad] == list(range(1, 9))
    assert torch.equal(results[0][2], results[1][2])


def other_buffers_under_ddp(group):
    """Rank 1's buffers differ before the second step, since rank 0 has one more chunk."""
    encoder = Counted()
    wrapped = DistributedDataParallel(encoder, process_group=group)
    loss = sk.InfoNCELoss(0.3, group=group)
    for step in range(2):
        sk.chunked_backward(wrapped, own(group, batches(step)), loss, 4)
    return encoder.seen


def test_both_encodings_start_from_the_buffers_that_were_broadcast(ranks):
    first, second = ranks.run(2, other_buffers_under_ddp)
    assert [c for c, grad in first if not grad] == list(range(1, 9))
    for calls in (first, second):
        assert [c for c, grad in calls if not grad] == [c for c, grad in calls if grad]
    assert [c for c, _ in second] == [1, 2, 1, 2, 5, 6, 5, 6]
