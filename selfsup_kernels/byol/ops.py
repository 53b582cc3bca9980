"""The ops ``byol_forward`` and ``byol_backward``."""

from selfsup_kernels.byol import reference
from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype, define


def _forward_fake(predictions, targets, eps, reduction):
    num_views, batch = len(predictions), predictions[0].shape[0]
    acc = accumulation_dtype(predictions[0].dtype)
    new = predictions[0].new_empty
    return (
        new((num_views, batch) if REDUCTIONS[reduction] == "none" else (), dtype=acc),
        new((3, num_views, batch), dtype=acc),
    )


def _backward_fake(grad, predictions, targets, stats, reduction):
    return predictions[0].new_empty((len(predictions), *predictions[0].shape))


# stats is (3, V, B): 1/max(|p|, eps), 1/max(|t|, eps) (both negated where the norm is below eps) and the sum of each
# anchor's cosines.
define(
    "byol_forward",
    "(Tensor[] predictions, Tensor[] targets, float eps, int reduction) -> (Tensor loss, Tensor stats)",
    gpu="cuda",
    reference=reference.forward,
    fake=_forward_fake,
    batched=True,
)
define(
    "byol_backward",
    "(Tensor grad, Tensor[] predictions, Tensor[] targets, Tensor stats, int reduction) -> Tensor",
    gpu="cuda",
    reference=reference.backward,
    fake=_backward_fake,
    batched=True,
)
