"""Compare compat.solo with solo-learn 1.0.2, the last version on the registry. Version 1.0.6 has other signatures;
``tests/test_compat_solo.py`` has its formulas."""

import importlib.util
from pathlib import Path

import pytest
import torch
from interop.helpers import assert_near, assert_same, run_processes, value_and_grads, views

from selfsup_kernels.compat import solo as ours


def load(name):
    """Load one file of the package, whose __init__ imports packages that are not installed."""
    folder = Path(importlib.util.find_spec("solo").origin).parent
    spec = importlib.util.spec_from_file_location(f"solo_{name}", folder / "losses" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr(temperature):
    original = load("simclr").simclr_loss_func
    z1, z2 = views(64, 32)
    assert_same(
        lambda a, b: ours.simclr_loss_func(a, b, temperature), lambda a, b: original(a, b, temperature), [z1, z2]
    )
    # With one positive per row, version 1.0.6 is the same loss as a function of rows and indexes.
    indexes = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert_same(
        lambda a, b: ours.simclr_loss_func(torch.cat([a, b]), indexes.repeat(2), temperature),
        lambda a, b: original(a, b, temperature),
        [z1, z2],
    )


@pytest.mark.parametrize("simplified", [True, False])
def test_byol(simplified):
    original = load("byol").byol_loss_func
    assert_same(
        lambda p, z: ours.byol_loss_func(p, z, simplified), lambda p, z: original(p, z, simplified), views(64, 32)
    )


def _gathered(x):
    return torch.cat(torch.distributed.nn.all_gather(x))


def _simclr_1_0_6(z, indexes, temperature, rank):
    """Return the mean over this process' rows of -log(share of the other rows with the same index)."""
    z = torch.nn.functional.normalize(z, dim=-1)
    scores = z @ _gathered(z).T / temperature
    parts = [torch.empty_like(indexes) for _ in range(2)]
    torch.distributed.all_gather(parts, indexes)
    own = torch.zeros_like(scores, dtype=torch.bool)
    own[:, rank * len(z) :].fill_diagonal_(True)
    same = (indexes[:, None] == torch.cat(parts)[None]) & ~own
    positive = scores.masked_fill(~same, -torch.inf).logsumexp(1)
    return (scores.masked_fill(own, -torch.inf).logsumexp(1) - positive).mean()


def _mocov3_1_0_6(query, key, temperature, rank):
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key.detach()))
    labels = torch.arange(len(query)) + rank * len(query)
    scores = query @ _gathered(key).detach().T / temperature
    return 2 * temperature * torch.nn.functional.cross_entropy(scores, labels)


def _ranks(rank, world):
    z1, z2 = (x[6 * rank : 6 * rank + 6] for x in views(12, 8, dtype=torch.float64))
    indexes = torch.tensor([[4, 1, 4, 2, 0, 1], [0, 1, 1, 2, 4, 4]][rank])  # classes that differ by rank
    weight = 1 + 0.5 * rank
    pairs = (
        (
            lambda z: weight * ours.simclr_loss_func(z, indexes, 0.3),
            lambda z: weight * _simclr_1_0_6(z, indexes, 0.3, rank),
            [z1],
        ),
        (
            lambda q, k: weight * ours.mocov3_loss_func(q, k, 0.3),
            lambda q, k: weight * _mocov3_1_0_6(q, k, 0.3, rank),
            [z1, z2],
        ),
    )
    return [(value_and_grads(mine, inputs), value_and_grads(original, inputs)) for mine, original, inputs in pairs]


def test_two_processes():
    for results in run_processes(2, _ranks):
        for got, want in results:
            assert_near("value", got[0], want[0], 1e-9)
            for g, w in zip(got[1], want[1], strict=True):
                assert_near("gradient", g, w, 1e-9)
