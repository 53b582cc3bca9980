"""What other libraries call the package's classes and functions, for the message about a name that it does not have."""

from selfsup_kernels.compat._table import TABLE
from selfsup_kernels.core.hints import plain
from selfsup_kernels.info_nce.objectives import SYNONYMS

NAMES = {
    "adamw": "optim.AdamW",
    "alignment": "contrastive_stats",
    "averagedmodel": "EMA",
    "contrastive": "InfoNCELoss",
    "cosineschedule": "cosine_momentum",
    "emamodel": "EMA",
    "exponentialmovingaverage": "EMA",
    "gradcache": "chunked_backward",
    "lars": "optim.LARS",
    "modelema": "EMA",
    "modelemav2": "EMA",
    "modelemav3": "EMA",
    "negativecosinesimilarity": "BYOLLoss",
    "normalizedmse": "BYOLLoss",
    "sgd": "optim.SGD",
    "uniformity": "contrastive_stats",
    "updatemomentum": "ema_update_",
}
"""By the other name, as :func:`selfsup_kernels.core.hints.plain` returns it."""


def here(name, package):
    """Return what is meant by ``name``, which ``package`` does not have, as the end of a message."""
    key = plain(name)
    known = [ours for ours in package.__all__ if plain(ours) == key]
    known += [f"methods.{ours}" for ours in package.methods.__all__ if plain(ours) == key]
    known += [f"InfoNCELoss(objective={ours})" for ours in SYNONYMS.get(key, ()) if not known]
    known += [NAMES[key]] if key in NAMES else []
    known += [f"compat.{library}.{name}" for library, swaps in TABLE.items() for s in swaps if s.ours == name]
    return f"; here it is {', '.join(known)}" if known else ""
