"""The drop-in for MultipleNegativesRankingLoss against its definition by scores, in loops in float64."""

import itertools

import pytest
import torch
from helpers import randn

from selfsup_kernels.compat import sentence_transformers as drop_in
from selfsup_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss, multiple_negatives_ranking_loss

FURTHER = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *c) for r in range(4) for c in itertools.combinations(FURTHER, r)]


def written_out(columns, scale, directions, partition="joint", mode=None, strength=0.0, cosine=True):
    """Compute each query's candidate scores pair by pair, including the hardness penalty."""
    query, *documents = ([row / row.norm() if cosine else row for row in column] for column in columns)
    losses = []
    for a in range(len(query)):
        positive = scale * (query[a] @ documents[0][a])
        candidates = {name: [] for name in directions}
        for b in range(len(query)):
            for k, column in enumerate(documents):
                similarity = query[a] @ column[b]
                own, hard = a == b, k > 0 and a == b
                raised = {
                    "in_batch_negatives": not own,
                    "hard_negatives": hard,
                    "all_negatives": not own or hard,
                }.get(mode, False)
                score = scale * similarity + (strength * similarity.detach() if raised else 0)
                candidates["query_to_doc"].append(score)
                if not own and "doc_to_doc" in directions:
                    candidates["doc_to_doc"].append(scale * (documents[0][a] @ column[b]))
            if "doc_to_query" in directions:
                candidates["doc_to_query"].append(scale * (documents[0][a] @ query[b]))
            if a != b and "query_to_query" in directions:
                candidates["query_to_query"].append(scale * (query[a] @ query[b]))
        groups = list(candidates.values())
        groups = [[score for group in groups for score in group]] if partition == "joint" else groups
        losses.append(sum(torch.stack(group).logsumexp(0) for group in groups) / len(groups) - positive)
    return sum(losses) / len(losses)


def columns(negatives, batch=6, dim=5, dtype=torch.float64):
    base = randn(batch, dim, dtype=torch.float64)
    return [
        (base + (0.4 + 0.4 * i) * randn(batch, dim, dtype=torch.float64, seed=1 + i)).to(dtype)
        for i in range(2 + negatives)
    ]


def compare(inputs, oracle, rtol=1e-9, **arguments):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = multiple_negatives_ranking_loss(leaves, **arguments)
    want = oracle(leaves)
    torch.testing.assert_close(loss, want, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), rtol=rtol, atol=rtol
    )


@pytest.mark.parametrize("mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("directions", DIRECTIONS, ids=lambda d: "+".join(d[1:]) or "default")
def test_value_and_gradients(directions, negatives, mode):
    strength = 0.0 if mode is None else 5.0
    for partition in ("joint", "per_direction") if set(directions) <= {"query_to_doc", "doc_to_query"} else ("joint",):
        compare(
            columns(negatives),
            lambda x, p=partition: written_out(x, 10.0, directions, p, mode, strength),
            scale=10.0,
            directions=directions,
            partition_mode=partition,
            hardness_mode=mode,
            hardness_strength=strength,
        )


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("directions", [DIRECTIONS[0], DIRECTIONS[-1], ("query_to_doc", "query_to_query")])
@pytest.mark.parametrize("mode", [None, "all_negatives"])
def test_one_sample_is_compared_only_with_its_own_documents(mode, directions, negatives):
    strength = 5.0 if mode else 0.0
    compare(
        columns(negatives, batch=1),
        lambda x: written_out(x, 20.0, directions, mode=mode, strength=strength),
        directions=directions,
        hardness_mode=mode,
        hardness_strength=strength,
    )


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_a_large_scale_and_one_that_underflows(scale):
    inputs = columns(1)
    inputs[0][0] = inputs[1][0]  # a query equal to its document: its loss is far below one rounding of the scores
    for mode, strength in ((None, 0.0), ("all_negatives", 9.0)):
        compare(
            inputs,
            lambda x, m=mode, s=strength: written_out(x, scale, ("query_to_doc",), "joint", m, s),
            rtol=1e-7,
            scale=scale,
            hardness_mode=mode,
            hardness_strength=strength,
        )


def test_dot_products():
    inputs = [0.5 * x for x in columns(1)]
    directions = DIRECTIONS[-1]
    compare(
        inputs,
        lambda x: written_out(x, 1.0, directions, cosine=False),
        scale=1,
        similarity_fct=drop_in.dot_score,
        directions=directions,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_a_float32_loss(dtype):
    """The loss is converted as in the original's similarities."""
    inputs = [x.to(dtype) for x in columns(2, batch=40, dim=16)]
    loss = multiple_negatives_ranking_loss(inputs)
    assert loss.dtype == torch.float32
    want = written_out([x.double() for x in inputs], 20.0, ("query_to_doc",)).item()
    assert loss.item() == pytest.approx(want, rel=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = multiple_negatives_ranking_loss(inputs)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want, rel=2 * torch.finfo(dtype).eps)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, features):
        return features | {"sentence_embedding": self.linear(features["values"])}


def test_the_module_encodes_every_column():
    model, inputs = Encoder(), columns(1)
    module = MultipleNegativesRankingLoss(model)
    loss = module(({"values": x} for x in inputs), torch.zeros(6))
    embeddings = [model({"values": x})["sentence_embedding"] for x in inputs]
    want = written_out(embeddings, 20.0, ("query_to_doc",))
    torch.testing.assert_close(loss, want)
    grads = [torch.autograd.grad(x, model.linear.weight)[0] for x in (loss, want)]
    torch.testing.assert_close(*grads)
    assert list(module.state_dict()) == ["model.linear.weight", "model.linear.bias"]
    assert module.temperature == 0.05
    assert module.get_config_dict() == {
        "scale": 20.0,
        "similarity_fct": "cos_sim",
        "gather_across_devices": False,
        "directions": ("query_to_doc",),
        "partition_mode": "joint",
        "hardness_mode": None,
        "hardness_strength": 0.0,
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": 0}, ValueError, "scale"),
        ({"directions": ()}, ValueError, "directions"),
        ({"directions": "query_to_doc"}, ValueError, "directions"),
        ({"directions": ("query_to_doc", "up")}, ValueError, "directions.*up"),
        ({"directions": ("doc_to_query",)}, ValueError, "directions.*query_to_doc"),
        ({"partition_mode": "none"}, ValueError, "partition_mode.*none"),
        ({"partition_mode": "per_direction", "directions": DIRECTIONS[-1]}, ValueError, "partition_mode.*joint"),
        ({"hardness_mode": "most"}, ValueError, "hardness_mode.*most"),
        ({"hardness_strength": -1}, ValueError, "hardness_strength.*-1"),
        ({"similarity_fct": torch.cdist}, RuntimeError, "similarity_fct=cdist.*cos_sim and dot_score"),
        (
            {"similarity_fct": drop_in.dot_score, "hardness_mode": "all_negatives", "hardness_strength": 1.0},
            RuntimeError,
            "hardness_mode='all_negatives'.*cos_sim",
        ),
        ({"hardness_mode": "all_negatives", "hardness_strength": 41}, RuntimeError, "hardness_mode.*40"),
        ({"scale": 50, "directions": ("query_to_doc", "doc_to_doc")}, RuntimeError, "doc_to_doc without.*40"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        multiple_negatives_ranking_loss(columns(0), **arguments)


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        (columns(0)[:1], ValueError, "embeddings.*got 1"),
        ([torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(5, 3)], ValueError, r"embeddings\[2\].*\(4, 3\).*\(5, 3\)"),
        ([torch.zeros(4, 3), None], TypeError, r"embeddings\[1\].*NoneType"),
    ],
)
def test_bad_embeddings(embeddings, error, message):
    with pytest.raises(error, match=message):
        multiple_negatives_ranking_loss(embeddings)
