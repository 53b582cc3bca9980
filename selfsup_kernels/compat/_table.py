"""The names in each library that :func:`selfsup_kernels.compat.patch` replaces, and their drop-ins."""

from typing import NamedTuple


class Swap(NamedTuple):
    """``module.attribute`` of a library, and the name of our drop-in for it in ``selfsup_kernels.compat.<library>``.

    For a class, the drop-in's ``methods`` replace its own, for subclasses too. A function is replaced in every module
    that has it; ``module`` is the one to import. ``optional`` names may be missing in some versions of the library.
    """

    module: str
    attribute: str
    ours: str
    methods: tuple[str, ...] = ()
    optional: bool = False


TESTED = {
    "lightly": "1.6.0",
    "open_clip": "3.3.0",
    "pytorch_metric_learning": "2.9.0",
    "sentence_transformers": "6.2.0",
    "solo": "1.0.6",
    "timm": "1.0.31",
}
"""The version of each library that the drop-ins follow."""

TABLE = {
    "lightly": [
        Swap("lightly.loss", "NTXentLoss", "NTXentLoss", ("forward",)),
        Swap("lightly.loss", "NegativeCosineSimilarity", "NegativeCosineSimilarity", ("forward",)),
        Swap("lightly.loss", "DCLLoss", "DCLLoss", ("forward",)),  # and DCLWLoss, a subclass
        Swap("lightly.models.utils", "update_momentum", "update_momentum"),
    ],
    "open_clip": [
        Swap("open_clip.loss", "ClipLoss", "ClipLoss", ("forward",)),
        Swap("open_clip.loss", "SigLipLoss", "SigLipLoss", ("forward",)),
    ],
    "pytorch_metric_learning": [
        Swap("pytorch_metric_learning.losses", "NTXentLoss", "NTXentLoss", ("forward",)),
        Swap("pytorch_metric_learning.losses", "SupConLoss", "SupConLoss", ("forward",)),
    ],
    "sentence_transformers": [
        Swap(
            "sentence_transformers.sentence_transformer.losses",
            "MultipleNegativesRankingLoss",
            "MultipleNegativesRankingLoss",
            ("compute_loss_from_embeddings",),
        ),
    ],
    "solo": [
        Swap("solo.losses", "simclr_loss_func", "simclr_loss_func"),
        Swap("solo.losses", "byol_loss_func", "byol_loss_func"),
        Swap("solo.losses", "mocov3_loss_func", "mocov3_loss_func", optional=True),
    ],
    "timm": [
        Swap("timm.utils", "ModelEmaV3", "ModelEmaV3", ("apply_update_", "apply_update_no_buffers_", "set")),
    ],
}
