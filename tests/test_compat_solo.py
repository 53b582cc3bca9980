"""The drop-ins for solo-learn's functions against their papers' formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from selfsup_kernels.compat.solo import byol_loss_func, mocov3_loss_func, simclr_loss_func


def same(ours, eager, *inputs, floor=1e-12):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss, want = ours(*leaves), eager(*leaves)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    for got, expected in zip(
        torch.autograd.grad(loss, leaves, allow_unused=True),
        torch.autograd.grad(want, leaves, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=floor)


def share_of_positives(z, indexes, temperature):
    """The mean over rows of -log(share of the other rows with the same index among all other rows)."""
    z = [row / row.norm() for row in z]
    losses = []
    for i, anchor in enumerate(z):
        scores = {j: (anchor * row).sum() / temperature for j, row in enumerate(z) if j != i}
        positive = torch.stack([s for j, s in scores.items() if indexes[j] == indexes[i]])
        losses.append(torch.stack(list(scores.values())).logsumexp(0) - positive.logsumexp(0))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize("indexes", [[7, 1, 4, 7, 1, 4], [0, 0, 0, 2, 2, 0, 2, 2, 2], [5] * 6, [3, 1, 2] * 3])
def test_simclr(indexes, temperature):
    z = randn(len(indexes), 5, dtype=torch.float64)
    labels = torch.tensor(indexes)
    same(
        lambda z: simclr_loss_func(z, indexes=labels, temperature=temperature),
        lambda z: share_of_positives(z, indexes, temperature),
        z,
    )


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize("classes", [1, 7, 75])
def test_simclr_in_float32(classes, temperature):
    indexes = (torch.arange(150) % classes)[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    z = (randn(150, 24) + 0.5 * randn(24, seed=1)).requires_grad_()
    wide = z.detach().double().requires_grad_()
    loss = simclr_loss_func(z, indexes, temperature)
    rows = F.normalize(wide, dim=-1)
    scores = (rows @ rows.T / temperature).masked_fill(torch.eye(150, dtype=torch.bool), -torch.inf)
    positive = scores.masked_fill(indexes[:, None] != indexes, -torch.inf)
    want = (scores.logsumexp(1) - positive.logsumexp(1)).mean()
    if classes == 1:
        assert abs(loss.item()) < 2e-5
        return
    grads = torch.autograd.grad(loss, z)[0].double(), torch.autograd.grad(want, wide)[0]
    assert abs(loss.item() - want.item()) <= 2e-5 * want.item()
    assert (grads[0] - grads[1]).norm() <= 2e-5 * grads[1].norm()


def test_a_row_without_positives_makes_simclr_infinite():
    assert simclr_loss_func(randn(5, 4), torch.tensor([0, 0, 1, 2, 2])).item() == float("inf")


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_simclr_of_two_views(temperature):
    z1, z2 = (randn(6, 5, dtype=torch.float64, seed=s) for s in (0, 1))
    same(
        lambda a, b: simclr_loss_func(a, b, temperature),
        lambda a, b: share_of_positives(torch.cat([a, b]), [*range(6)] * 2, temperature),
        z1,
        z2,
    )


@pytest.mark.parametrize("simplified", [True, False])
def test_byol(simplified):
    p, z = (randn(6, 5, dtype=torch.float64, seed=s) for s in (0, 1))
    p[0] *= 1e-9  # a row for which the two norm floors matter
    eps = 1e-8 if simplified else 1e-12

    def eager(p, z):
        p, z = (x / x.norm(dim=-1, keepdim=True).clamp_min(eps) for x in (p, z.detach()))
        return (2 - 2 * (p * z).sum(-1)).mean()

    same(lambda p, z: byol_loss_func(p, z, simplified), eager, p, z, floor=1e-6)
    assert byol_loss_func(p, z) == byol_loss_func(p, z, simplified=True)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_mocov3(temperature):
    query, key = (randn(6, 5, dtype=torch.float64, seed=s) for s in (0, 1))

    def eager(query, key):
        scores = F.normalize(query, dim=1) @ F.normalize(key.detach(), dim=1).T / temperature
        return 2 * temperature * F.cross_entropy(scores, torch.arange(6))

    same(lambda q, k: mocov3_loss_func(q, k, temperature=temperature), eager, query, key)
    assert mocov3_loss_func(query, key) == mocov3_loss_func(query, key, 0.2)


def test_one_sample():
    z1, z2 = (randn(1, 5, seed=s).requires_grad_() for s in (0, 1))
    for loss in (
        simclr_loss_func(z1, z2),
        mocov3_loss_func(z1, z2),
        simclr_loss_func(torch.cat([z1, z2]), torch.zeros(2, dtype=int)),
    ):
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, z1)
        assert not grad.any()


def test_not_supported():
    with pytest.raises(RuntimeError, match=r"extra_pos_mask.*indexes"):
        simclr_loss_func(randn(4, 3), randn(4, 3), extra_pos_mask=torch.zeros(8, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (simclr_loss_func, (randn(4, 3), [0, 1]), TypeError, "indexes.*list"),
        (simclr_loss_func, (randn(4, 3), torch.arange(3)), ValueError, r"labels.*\(4,\).*\(3,\)"),
        (simclr_loss_func, (randn(4), torch.arange(4)), ValueError, r"z: .*\(4,\)"),
        (simclr_loss_func, (randn(4, 3), randn(4, 2)), ValueError, r"z2.*\(4, 3\).*\(4, 2\)"),
        (byol_loss_func, (randn(4, 3), randn(3, 3)), ValueError, r"z: .*\(4, 3\).*\(3, 3\)"),
        (mocov3_loss_func, (randn(4, 3), randn(3, 3)), ValueError, r"key: .*\(4, 3\).*\(3, 3\)"),
        (mocov3_loss_func, (randn(4, 3), None), TypeError, "key.*NoneType"),
    ],
)
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
