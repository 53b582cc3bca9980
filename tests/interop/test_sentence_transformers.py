"""Compare compat.sentence_transformers with the installed sentence-transformers."""

import inspect
import itertools

import pytest
import torch
from interop.helpers import assert_near, assert_same, run_processes, value_and_grads, views
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Original
from sentence_transformers.util import cos_sim, dot_score

from selfsup_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss

FURTHER = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *c) for r in range(4) for c in itertools.combinations(FURTHER, r)]


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(24, 16)

    def forward(self, features):
        return features | {"sentence_embedding": self.linear(features["values"])}


def compare(count, similarity=cos_sim, shrink=1.0, **arguments):
    inputs = [shrink * x for x in views(32, 16, count)]
    ours = MultipleNegativesRankingLoss(Encoder(), similarity_fct=similarity, **arguments)
    original = Original(Encoder(), similarity_fct=similarity, **arguments)
    assert_same(
        lambda *x: ours.compute_loss_from_embeddings(list(x), None),
        lambda *x: original.compute_loss_from_embeddings(list(x), None),
        inputs,
    )
    assert ours.get_config_dict() == original.get_config_dict()


def test_the_signature():
    mine, theirs = (inspect.signature(x.__init__).parameters for x in (MultipleNegativesRankingLoss, Original))
    assert list(mine) == list(theirs)
    for name in mine:
        if name != "similarity_fct":
            assert mine[name].default == theirs[name].default, name


@pytest.mark.parametrize("mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("directions", DIRECTIONS, ids=lambda d: "+".join(d[1:]) or "default")
def test_directions_and_hardness(directions, negatives, mode):
    compare(2 + negatives, directions=directions, hardness_mode=mode, hardness_strength=9.0 if mode else 0.0)


@pytest.mark.parametrize("scale", [20.0, 2.0, 100.0])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
@pytest.mark.parametrize("negatives", [0, 2])
def test_scales_and_partitions(negatives, partition, scale):
    for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query")):
        compare(2 + negatives, scale=scale, directions=directions, partition_mode=partition)


def test_dot_products():
    compare(3, dot_score, 0.2, scale=1.0, directions=DIRECTIONS[-1])


def test_a_model_trains_as_with_the_original():
    modules = []
    inputs = views(16, 24, 3)
    for of in (MultipleNegativesRankingLoss, Original):
        torch.manual_seed(0)
        module = of(Encoder())
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(20):
            optimizer.zero_grad()
            module([{"values": x} for x in inputs], torch.zeros(16)).backward()
            optimizer.step()
        modules.append(module)
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=2e-4, atol=2e-5)


def _ranks(rank, world):
    inputs = [x[5 * rank : 5 * rank + 5] for x in views(10, 8, 4, dtype=torch.float64)]
    results = []
    for arguments in CASES:
        modules = [of(Encoder(), gather_across_devices=True, **arguments) for of in OF]
        results.append(
            [
                value_and_grads(
                    lambda *x, m=m: (1 + 0.5 * rank) * m.compute_loss_from_embeddings(list(x), None), inputs
                )
                for m in modules
            ]
        )
    return results


OF = (MultipleNegativesRankingLoss, Original)
CASES = [
    {},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": DIRECTIONS[-1]},
    {"directions": DIRECTIONS[-1], "hardness_mode": "all_negatives", "hardness_strength": 5.0},
]


def test_two_processes():
    for rank, results in enumerate(run_processes(2, _ranks)):
        for arguments, (got, want) in zip(CASES, results, strict=True):
            where = f"rank {rank}, {arguments}"
            assert_near(f"{where}: value", got[0], want[0], 1e-9)
            for g, w in zip(got[1], want[1], strict=True):
                assert_near(f"{where}: gradient", g, w, 1e-9)
