"""The six N-view contrastive objectives: their names, their numbers in the ops, and which view pairs they use."""

OBJECTIVES = ("supcon_out", "supcon_in", "per_positive", "pairwise", "cross_view", "decoupled")
"""The position of an objective in this tuple is its number in the ops (``csrc/common/objectives.h`` has the same)."""

SYNONYMS = {
    "clip": ["'cross_view'"],
    "cliploss": ["'cross_view'"],
    "cmc": ["'cross_view'"],
    "ntxent": ["'supcon_out'"],
    "ntxentloss": ["'supcon_out'"],
    "simclr": ["'supcon_out'"],
    "supcon": ["'supcon_out'"],
    "supconloss": ["'supcon_out'"],
    "infonce": ["'supcon_out' (both views' rows are negatives)", "'cross_view' (those of the other view alone)"],
    "dcl": ["'decoupled'"],
    "dclloss": ["'decoupled'"],
}
"""What the field calls objectives, in small letters without punctuation, and their names here: for the message."""

LABEL_OBJECTIVES = ("supcon_out", "supcon_in", "per_positive", "decoupled")
"""Objectives that are defined for labels: those whose denominator does not depend on the view of the positive."""


def interacts(u: int, v: int, core_view: int) -> bool:
    """Whether views ``u`` and ``v`` meet at all, as positives or as negatives of each other.

    Without a core view (``core_view < 0``) all do. With one, two different views meet only if one of them is the core
    (CMC's core-view graph, arXiv:1906.05849, section 3.4); a view always meets itself.
    """
    return core_view < 0 or u == v or core_view in (u, v)


def positive_views(u: int, num_views: int, core_view: int) -> list[int]:
    """The views in which an anchor of view ``u`` has its positives."""
    return [v for v in range(num_views) if v != u and interacts(u, v, core_view)]


def negative_views(u: int, num_views: int, core_view: int, objective: str) -> list[int]:
    """The views in which an anchor of view ``u`` has negatives (its own too, but for ``cross_view``)."""
    return [v for v in range(num_views) if interacts(u, v, core_view) and not (v == u and objective == "cross_view")]
