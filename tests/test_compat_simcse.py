"""SimCSE's objectives against the paper's formulas in float64."""

import math

import pytest
import torch
from helpers import randn

from selfsup_kernels.compat.simcse import supervised_loss, unsupervised_loss


def cosines(x, y):
    return torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)


def eager(z1, z2, z3=None, temperature=0.05, weight=0.0):
    """Cross-entropy over cosines with all entailed and contradicting sentences; the latter's diagonal is raised."""
    scores = cosines(z1, z2) / temperature
    if z3 is not None:
        scores = torch.cat([scores, cosines(z1, z3) / temperature + weight * torch.eye(len(z1)).double()], 1)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(z1)))


def sentences(batch=7, dim=6):
    base = randn(batch, dim, dtype=torch.float64)
    return [base + (0.3 + 0.3 * i) * randn(batch, dim, dtype=torch.float64, seed=1 + i) for i in range(3)]


def compare(ours, oracle, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss, want = ours(*leaves), oracle(*leaves)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_unsupervised(temperature):
    compare(
        lambda *z: unsupervised_loss(*z, temperature), lambda *z: eager(*z, temperature=temperature), sentences()[:2]
    )


@pytest.mark.parametrize("weight", [0.0, math.log(3), -2.0, 30.0, -40.0])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_supervised(temperature, weight):
    compare(
        lambda *z: supervised_loss(*z, temperature, hard_negative_weight=weight),
        lambda *z: eager(*z, temperature=temperature, weight=weight),
        sentences(),
    )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_one_sentence(weight):
    compare(lambda *z: supervised_loss(*z, 0.05, weight), lambda *z: eager(*z, weight=weight), sentences(1))
    assert unsupervised_loss(*sentences(1)[:2]) == 0


def test_the_default_temperature_is_the_papers():
    z1, z2, z3 = sentences()
    assert unsupervised_loss(z1, z2) == unsupervised_loss(z1, z2, 0.05)
    assert supervised_loss(z1, z2, z3) == supervised_loss(z1, z2, z3, 0.05)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unsupervised_loss(torch.zeros(4, 3), torch.zeros(3, 3)), ValueError, r"z2.*\(4, 3\).*\(3, 3\)"),
        (lambda: supervised_loss(*[torch.zeros(4, 3)] * 2, torch.zeros(4)), ValueError, r"z3.*\(4,\)"),
        (lambda: unsupervised_loss(torch.zeros(4, 3), torch.zeros(4, 3), 0), ValueError, "temperature"),
        (lambda: supervised_loss(*[torch.zeros(4, 3)] * 3, 0.05, -41), RuntimeError, "hard_negative_weight=-41.*-40"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
