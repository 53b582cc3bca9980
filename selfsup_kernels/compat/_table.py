"""Which name of which library :func:`selfsup_kernels.compat.patch` gives to which drop-in of ours."""

from typing import NamedTuple


class Swap(NamedTuple):
    """``module.attribute`` of a library, and the name of our drop-in for it in ``selfsup_kernels.compat.<library>``.

    ``module`` is the one to import; other modules that hold the same object are found by identity.
    """

    module: str
    attribute: str
    ours: str


TESTED = {"lightly": "1.6.0", "pytorch_metric_learning": "2.9.0"}
"""The version of each library that the drop-ins follow."""

TABLE = {
    "lightly": [
        Swap("lightly.loss", "NTXentLoss", "NTXentLoss"),
        Swap("lightly.loss", "NegativeCosineSimilarity", "NegativeCosineSimilarity"),
        Swap("lightly.loss", "DCLLoss", "DCLLoss"),
        Swap("lightly.loss", "DCLWLoss", "DCLWLoss"),
        Swap("lightly.models.utils", "update_momentum", "update_momentum"),
    ],
    "pytorch_metric_learning": [
        Swap("pytorch_metric_learning.losses", "NTXentLoss", "NTXentLoss"),
        Swap("pytorch_metric_learning.losses", "SupConLoss", "SupConLoss"),
    ],
}
