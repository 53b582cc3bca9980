"""Drop-ins for the losses of sentence-transformers."""

import torch
from torch import nn

from selfsup_kernels.compat._common import is_from, unsupported
from selfsup_kernels.compat._gradient import ScaleGradient
from selfsup_kernels.compat._one_way import OneWay
from selfsup_kernels.compat._processes import every_process
from selfsup_kernels.core.validate import pair

__all__ = ["MultipleNegativesRankingLoss", "cos_sim", "dot_score", "multiple_negatives_ranking_loss"]

_ORIGINAL = "sentence_transformers' MultipleNegativesRankingLoss"
_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
_HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def cos_sim(a, b):
    """Return the matrix of cosines. The losses only check which function they are given; they do not call it.

    Example:
        >>> from selfsup_kernels.compat.sentence_transformers import cos_sim
        >>> cos_sim(torch.randn(4, 8), torch.randn(6, 8)).shape
        torch.Size([4, 6])
    """
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def dot_score(a, b):
    """Return the matrix of inner products; see :func:`cos_sim`.

    Example:
        >>> from selfsup_kernels.compat.sentence_transformers import dot_score
        >>> dot_score(torch.ones(1, 8), torch.ones(1, 8))
        tensor([[8.]])
    """
    return a @ b.T


class MultipleNegativesRankingLoss(nn.Module):
    r"""In-batch negatives: a drop-in for the ``sentence_transformers`` 6.2 loss of this name, in linear memory.

    .. math:: L = \operatorname{mean}_a \left[ \log Z_a - S(q_a, d_a) \right], \qquad S = scale \cdot \cos

    (arXiv:1705.00652, section 4.4). By default :math:`Z_a` sums :math:`e^{S(q_a, d)}` over all documents of the batch:
    the positives :math:`d_b` and the hard negatives of every query, all of which receive gradients. ``directions`` adds
    terms to :math:`Z_a`, ``partition_mode="per_direction"`` averages one loss per direction, and ``hardness_mode``
    raises the scores of negatives without gradient: all as in the original, whose documentation explains each.

    Departure: each column of sentences is encoded by a separate call of the model, while the original joins columns of
    hard negatives (equal except for dropout's random numbers).

    Args:
        model: the encoder; ``forward`` calls ``model(features)["sentence_embedding"]``.
        scale: the reciprocal of the temperature.
        similarity_fct: ``cos_sim`` or ``dot_score``, ours or sentence-transformers'.
        gather_across_devices: use the embeddings of all processes as candidates. The loss is the mean over the process'
            own queries, with gradients to all.
        directions, partition_mode, hardness_mode, hardness_strength: as in the original.

    Raises:
        ValueError: an argument does not fit; the message says which and why.
        RuntimeError: the similarity is another function; hardness with ``dot_score`` or a strength above 40; at a scale
            above 40, ``"doc_to_doc"`` of pairs without ``"doc_to_query"``, or ``"query_to_query"`` with hardness.

    Example:
        >>> from selfsup_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss
        >>> criterion = MultipleNegativesRankingLoss(model=None, scale=20.0)
        >>> queries, documents = torch.randn(2, 256, 128)
        >>> criterion.compute_loss_from_embeddings([queries, documents]).shape
        torch.Size([])
    """

    def __init__(
        self,
        model,
        scale=20.0,
        similarity_fct=cos_sim,
        gather_across_devices=False,
        directions=("query_to_doc",),
        partition_mode="joint",
        hardness_mode=None,
        hardness_strength=0.0,
    ):
        super().__init__()
        _check(scale, similarity_fct, directions, partition_mode, hardness_mode, hardness_strength)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength

    def forward(self, sentence_features, labels=None):
        """Return the loss of the features of queries, documents, and any number of columns of hard negatives."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings, labels=None):
        """Return the loss of ``[queries, documents, *hard negatives]``, each ``(B, D)``; ``labels`` is not used."""
        return multiple_negatives_ranking_loss(embeddings, **_arguments(self))

    def get_config_dict(self):
        """Return the arguments, for a model card."""
        return _arguments(self) | {"similarity_fct": self.similarity_fct.__name__}

    @property
    def temperature(self):
        return 1.0 / self.scale


def _arguments(module):
    return {
        "scale": module.scale,
        "similarity_fct": module.similarity_fct,
        "gather_across_devices": module.gather_across_devices,
        "directions": module.directions,
        "partition_mode": module.partition_mode,
        "hardness_mode": module.hardness_mode,
        "hardness_strength": module.hardness_strength,
    }


def multiple_negatives_ranking_loss(
    embeddings,
    *,
    scale=20.0,
    similarity_fct=cos_sim,
    gather_across_devices=False,
    directions=("query_to_doc",),
    partition_mode="joint",
    hardness_mode=None,
    hardness_strength=0.0,
):
    """Return :class:`MultipleNegativesRankingLoss` of embeddings.

    Args:
        embeddings: ``[queries, documents, *hard negatives]``, each ``(B, D)``.

    The other arguments are those of the class.

    Example:
        >>> from selfsup_kernels.compat.sentence_transformers import multiple_negatives_ranking_loss
        >>> queries, documents, hard_negatives = torch.randn(3, 256, 128)
        >>> multiple_negatives_ranking_loss([queries, documents, hard_negatives]).shape
        torch.Size([])
    """
    _check(scale, similarity_fct, directions, partition_mode, hardness_mode, hardness_strength)
    embeddings = list(embeddings)
    if len(embeddings) < 2:
        raise ValueError(f"embeddings: expected at least queries and documents, got {len(embeddings)}")
    for i, column in enumerate(embeddings[1:], 1):
        pair("embeddings[0]", embeddings[0], f"embeddings[{i}]", column)
    group = every_process() if gather_across_devices else None
    way = OneWay(scale, similarity_fct.__name__ == "cos_sim", 1e-12, group)
    strength = hardness_strength if hardness_mode is not None else 0.0
    parts = _Parts(way, embeddings, set(directions), hardness_mode, strength)
    to_documents = torch.logsumexp(torch.stack(parts.from_query()), 0)
    from_documents = parts.from_document()
    if not from_documents:
        losses = to_documents
    elif partition_mode == "per_direction":
        losses = (to_documents + from_documents[0]) / 2
    else:
        losses = torch.logsumexp(torch.stack([to_documents, *from_documents]), 0)
    return losses.mean()  # float32 or float64, like the original's similarities


class _Parts:
    """The parts of the denominators, ``(B,)`` logarithms of sums, relative to the positive's score."""

    def __init__(self, way, embeddings, directions, mode, strength):
        self.way, self.directions, self.mode, self.strength = way, directions, mode, strength
        self.query, self.document, *self.negatives = embeddings
        self.harder = OneWay(way.scale + strength, way.normalize, way.eps, way.group)
        self._of_views = {}

    def from_query(self):
        """Return the parts of queries against documents and, with ``query_to_query``, against each other."""
        everything = self.strength and self.mode != "hard_negatives"
        queries = "query_to_query" in self.directions
        parts = []
        if everything:
            parts += [self._others(self.query, self.document), torch.zeros_like(self._own_positive())]
            if queries:
                self._self_sums_fit("query_to_query with hardness_mode")
                parts.append(self.way.others(self.query, self.query) - self._own_positive())
        else:
            parts.append(self._views("supcon_out" if queries else "cross_view")[0])
        for negative in self.negatives:
            own = self.way.own(self.query, negative)
            if not self.strength:
                parts.append(self.way.losses(self.query, negative)[0] + own - self._own_positive())
                continue
            if everything:
                parts.append(self._others(self.query, negative))
            else:
                parts.append(self.way.others(self.query, negative) - self._own_positive())
            if self.mode != "in_batch_negatives":
                own = own + self.strength * (own / self.way.scale).detach()
            parts.append(own - self._own_positive())
        return parts

    def from_document(self):
        """Return the parts of positive documents against queries and against other queries' documents."""
        queries, documents = ("doc_to_query" in self.directions, "doc_to_doc" in self.directions)
        if not documents:
            return [self._views("cross_view")[1]] if queries else []
        if self.negatives:
            # Other samples' rows of all columns in one call: decoupled excludes the positive from the denominator.
            columns = [self.document, *self.negatives]
            loss = self.way.losses(*columns, objective="decoupled", core_view=0)[0]
            own = torch.stack([self.way.own(self.document, n) for n in self.negatives]).mean(0)
            part = loss + own - self._own_positive()
            return [self._views("cross_view")[1], part] if queries else [part]
        if queries:
            return [self._views("supcon_out")[1]]
        self._self_sums_fit("doc_to_doc without doc_to_query")
        return [self.way.others(self.document, self.document) - self._own_positive()]

    def _views(self, objective):
        """Return the losses of queries and positives: ``cross_view``, or an objective with each view's own rows."""
        if objective not in self._of_views:
            self._of_views[objective] = self.way.losses(self.query, self.document, objective=objective)
        return self._of_views[objective]

    def _own_positive(self):
        if "own" not in self._of_views:
            self._of_views["own"] = self.way.own(self.query, self.document)
        return self._of_views["own"]

    def _others(self, x, y):
        """Return the log-sum of other samples' penalised scores; the penalty's share of the gradient is removed."""
        others = self.harder.others(x, y)
        return ScaleGradient.apply(others, self.way.scale / self.harder.scale) - self._own_positive()

    def _self_sums_fit(self, feature):
        if self.way.scale > 40 or not self.way.normalize:
            raise unsupported(_ORIGINAL, feature, "it takes cos_sim with a scale of 40 at most")


def _check(scale, similarity_fct, directions, partition_mode, hardness_mode, hardness_strength):
    if not scale > 0:
        raise ValueError(f"scale: expected a number > 0, got {scale}")
    name = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
    if not is_from("sentence_transformers", similarity_fct, ["cos_sim", "dot_score"]):
        raise unsupported(_ORIGINAL, f"similarity_fct={name}", "it takes cos_sim and dot_score")
    if isinstance(directions, str) or not directions or not set(directions) <= set(_DIRECTIONS):
        raise ValueError(f"directions: expected some of {', '.join(_DIRECTIONS)}, got {directions!r}")
    if "query_to_doc" not in directions:
        raise ValueError(f"directions: expected 'query_to_doc' among them, got {directions!r}")
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(f"partition_mode: expected 'joint' or 'per_direction', got {partition_mode!r}")
    if partition_mode == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
        raise ValueError(
            "partition_mode: expected 'joint' with 'query_to_query' or 'doc_to_doc', which have no positive"
        )
    if hardness_mode not in _HARDNESS:
        raise ValueError(f"hardness_mode: expected one of {', '.join(map(str, _HARDNESS))}, got {hardness_mode!r}")
    if not hardness_strength >= 0:
        raise ValueError(f"hardness_strength: expected a number >= 0, got {hardness_strength}")
    if hardness_mode is not None and hardness_strength > 0 and (name != "cos_sim" or hardness_strength > 40):
        raise unsupported(_ORIGINAL, f"hardness_mode={hardness_mode!r}", "it takes cos_sim and strengths up to 40")
