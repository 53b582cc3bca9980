"""Drop-ins over two gloo processes: values, and gradients of the weighted sum of both processes' losses.

The expected values are computed in one process: each rank's loss is a formula of the whole batch.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import randn

from selfsup_kernels.compat import open_clip, sentence_transformers, simcse, solo

UNEVEN, EVEN = (7, 4), (5, 5)
WEIGHTS = (1.0, 1.5)
"""Each rank's factor for its loss, which reveals a gradient that omits the other rank's loss."""
INDEXES = torch.tensor([3, 1, 3, 2, 0, 0, 1, 1, 2, 3])


def own(rank, sizes, tensor):
    return tensor[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def inputs(sizes, count):
    base = randn(sum(sizes), 6, dtype=torch.float64)
    noise = [randn(sum(sizes), 6, dtype=torch.float64, seed=1 + i) for i in range(count)]
    return [base + (0.3 + 0.3 * i) * x for i, x in enumerate(noise)]


def one_way(x, columns, own_rows, scale, cosine=True, raised=0.0):
    """Cross-entropy of rows ``own_rows`` of x against all columns' rows; the target is the same row of the first."""
    x, *columns = (F.normalize(c, dim=-1) if cosine else c for c in (x, *columns))
    scores = [scale * x[own_rows] @ column.T for column in columns]
    if raised:
        scores[1] = scores[1] + raised * torch.eye(len(x), dtype=x.dtype)[own_rows]
    return F.cross_entropy(torch.cat(scores, 1), own_rows)


def share_of_positives(z, own_rows):
    scores = F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).T / 0.3
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)[own_rows]
    positive = scores.masked_fill(INDEXES[own_rows, None] != INDEXES[None], -torch.inf)
    return (scores.logsumexp(1) - positive.logsumexp(1)).mean()


def clip(rows, image, text):
    return (one_way(image, [text], rows, 9.0, False) + one_way(text, [image], rows, 9.0, False)) / 2


def mnrl(*x):
    return sentence_transformers.multiple_negatives_ranking_loss(x, gather_across_devices=True)


# name: (sizes, columns, drop-in of a rank's own rows and the group, rank's loss of the whole batch and its own rows)
CASES = {
    "SimCSE": (
        UNEVEN,
        2,
        lambda group, *z: simcse.unsupervised_loss(*z, group=group),
        lambda rows, a, b: one_way(a, [b], rows, 20),
    ),
    "SimCSE, hard negatives": (
        UNEVEN,
        3,
        lambda group, *z: simcse.supervised_loss(*z, 0.1, 0.7, group=group),
        lambda rows, a, b, c: one_way(a, [b, c], rows, 10, raised=0.7),
    ),
    "MNRL": (UNEVEN, 3, lambda group, *x: mnrl(*x), lambda rows, a, b, c: one_way(a, [b, c], rows, 20)),
    "MoCo v3": (
        UNEVEN,
        2,
        lambda group, q, k: solo.mocov3_loss_func(q, k, 0.25),
        lambda rows, q, k: 0.5 * one_way(q, [k.detach()], rows, 4),
    ),
    "SimCLR": (
        EVEN,
        1,
        lambda group, z: solo.simclr_loss_func(z, own(group.rank(), EVEN, INDEXES), 0.3),
        lambda rows, z: share_of_positives(z, rows),
    ),
    "CLIP, local loss": (
        UNEVEN,
        2,
        lambda group, *x: open_clip.ClipLoss(True, True, rank=group.rank(), world_size=2)(*x, 9.0),
        clip,
    ),
    "CLIP": (
        UNEVEN,
        2,
        lambda group, *x: open_clip.ClipLoss(False, True, rank=group.rank(), world_size=2)(*x, 9.0),
        lambda rows, *x: clip(torch.arange(sum(UNEVEN)), *x),
    ),
}


def _rank(group, name):
    sizes, count, drop_in, _ = CASES[name]
    rank = dist.get_rank(group)
    leaves = [own(rank, sizes, x).clone().requires_grad_() for x in inputs(sizes, count)]
    loss = drop_in(group, *leaves)
    return loss.detach(), torch.autograd.grad(WEIGHTS[rank] * loss, leaves, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(ranks, name):
    sizes, count, _, formula = CASES[name]
    leaves = [x.requires_grad_() for x in inputs(sizes, count)]
    rows = [own(rank, sizes, torch.arange(sum(sizes))) for rank in range(2)]
    losses = [formula(r, *leaves) for r in rows]
    total = sum(weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True))
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    for rank, (loss, grads) in enumerate(ranks.run(2, _rank, name)):
        torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-9, atol=1e-12)
        for got, want in zip(grads, expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, own(rank, sizes, want), rtol=1e-8, atol=1e-10)


def _rank_of_clip(group, local_loss, gather_with_grad):
    rank = dist.get_rank(group)
    leaves = [own(rank, UNEVEN, x).clone().requires_grad_() for x in inputs(UNEVEN, 2)]
    leaves.append(torch.tensor(9.0, dtype=torch.float64, requires_grad=True))
    loss = open_clip.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=2)(*leaves)
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("mode", [(False, True), (False, False)])
def test_clips_gradients_with_and_without_gather_with_grad(ranks, mode):
    """The features' gradient without gather_with_grad covers one rank's loss instead of both: half the right value."""
    image, text = (x.requires_grad_() for x in inputs(UNEVEN, 2))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    scores = scale * image @ text.T
    labels = torch.arange(sum(UNEVEN))
    loss = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    grads = torch.autograd.grad(loss, (image, text, scale))
    for rank, got in enumerate(ranks.run(2, _rank_of_clip, *mode)):
        for ours, want in zip(got[:2], grads[:2], strict=True):
            torch.testing.assert_close(ours, own(rank, UNEVEN, want) * (1 + mode[1]), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(got[2], grads[2], rtol=1e-8, atol=1e-10)


class HookedClip(open_clip.ClipLoss):
    def get_logits(self, *args, **kwargs):
        return super().get_logits(*args, **kwargs)


def _rank_of_hooked_clip(group, local_loss, gather_with_grad):
    rank, results = dist.get_rank(group), []
    for cls in (HookedClip, open_clip.ClipLoss):
        leaves = [own(rank, EVEN, x).clone().requires_grad_() for x in inputs(EVEN, 2)]
        loss = cls(local_loss, gather_with_grad, rank=rank, world_size=2)(*leaves, 9.0)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return results


@pytest.mark.parametrize("mode", [(False, True), (True, True), (False, False)])
def test_clip_from_the_table_of_all_processes(ranks, mode):
    """A subclass that overrides get_logits has the same loss and gradients as the kernels."""
    for table, kernels in ranks.run(2, _rank_of_hooked_clip, *mode):
        torch.testing.assert_close(table, kernels, rtol=1e-8, atol=1e-10)


def _bad_world_size(group):
    try:
        open_clip.ClipLoss(gather_with_grad=True, world_size=3)(torch.ones(3, 4), torch.ones(3, 4), 1.0)
    except RuntimeError as error:
        return str(error)


def test_another_number_of_processes_is_an_error_on_all(ranks):
    for message in ranks.run(2, _bad_world_size):
        assert "world_size" in message
        assert "2, got 3" in message
