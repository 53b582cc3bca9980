"""The six N-view contrastive objectives as data, and which views are compared.

The loss of an anchor is ``log(denominator) - numerator``, and three columns distinguish the six objectives of
:mod:`selfsup_kernels.spec`. Only these two modules use the names; kernels take the numbers. This module imports only
the standard library, since the build reads the numbers for C++.
"""

from enum import IntEnum
from typing import NamedTuple


class Columns(IntEnum):
    """The views whose negatives are in the denominator."""

    ALL = 0
    """All views."""
    OWN_AND_OTHER = 1
    """The anchor's view and the positive's view."""
    OTHER = 2
    """Only the positive's view."""


class Positives(IntEnum):
    """The positives that are in the denominator."""

    ALL = 0
    ITSELF = 1
    """Each positive has its own denominator, which includes only this positive; the loss is their mean."""
    NONE = 2


class Numerator(IntEnum):
    """The function of the positives' scores."""

    MEAN = 0
    LOG_SUM = 1
    """The log of the mean of their exponentials."""


class Ids(IntEnum):
    """What it means that two samples share an id."""

    NONE = 0
    """There are no ids."""
    LABELS = 1
    """They are positives of each other."""
    DUPLICATES = 2
    """They are neither positives nor negatives of each other."""


class Objective(NamedTuple):
    columns: Columns
    inside: Positives
    numerator: Numerator


TABLE = {
    "supcon_out": Objective(Columns.ALL, Positives.ALL, Numerator.MEAN),
    "supcon_in": Objective(Columns.ALL, Positives.ALL, Numerator.LOG_SUM),
    "per_positive": Objective(Columns.ALL, Positives.ITSELF, Numerator.MEAN),
    "pairwise": Objective(Columns.OWN_AND_OTHER, Positives.ITSELF, Numerator.MEAN),
    "cross_view": Objective(Columns.OTHER, Positives.ITSELF, Numerator.MEAN),
    "decoupled": Objective(Columns.ALL, Positives.NONE, Numerator.MEAN),
}

OBJECTIVES = tuple(TABLE)

LABEL_OBJECTIVES = tuple(name for name, objective in TABLE.items() if objective.columns != Columns.OWN_AND_OTHER)
"""Objectives that are defined for labels."""

SYNONYMS = {
    "clip": ["'cross_view'"],
    "cmc": ["'cross_view'"],
    "ntxent": ["'supcon_out'"],
    "simclr": ["'supcon_out'"],
    "supcon": ["'supcon_out'"],
    "infonce": ["'supcon_out' (both views' rows are negatives)", "'cross_view' (those of the other view alone)"],
    "dcl": ["'decoupled'"],
}
"""Common names of objectives, as ``core.hints.plain`` returns them, and their names here, for the error message."""


def positive_views(u: int, num_views: int, core_view: int) -> list[int]:
    """Return the views in which an anchor of view ``u`` has its positives.

    Without a core view (``core_view < 0``) these are all other views. With one, two different views are compared only
    if one of them is the core (CMC's core-view graph, arXiv:1906.05849, section 3.4).
    """
    return [v for v in range(num_views) if v != u and (core_view < 0 or core_view in (u, v))]


def negative_views(u: int, num_views: int, core_view: int, columns: Columns) -> list[int]:
    """Return the views in which an anchor of view ``u`` has negatives: those of its positives, and its own unless
    ``columns`` is OTHER."""
    own = [] if columns == Columns.OTHER else [u]
    return sorted(own + positive_views(u, num_views, core_view))
