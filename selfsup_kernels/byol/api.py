"""``byol_loss``: check the arguments, choose an implementation, apply."""

import torch

from selfsup_kernels.byol import reference
from selfsup_kernels.byol.autograd import BYOL
from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.transforms import apply


def byol_loss(predictions, targets, *, eps=1e-12, reduction="mean", impl="auto"):
    r"""BYOL's regression loss over V views (arXiv:2006.07733, eq. 2), in one pass each way.

    For ``(B, D)`` pairs each row's loss is :math:`2 - 2 \cos(p_a, t_a)`. For V views the loss of anchor :math:`(u, a)`
    is the mean of :math:`2 - 2 \cos(p_{u,a}, t_{v,a})` over the other views :math:`v \ne u`; with V = 2 this is half
    of BYOL's symmetrised loss, the mean of its two terms instead of their sum.

    Args:
        predictions: ``(B, D)``, ``(V, B, D)`` with V >= 2, or a sequence of V ``(B, D)`` tensors.
        targets: the same shape; receives no gradient.
        eps: the floor of each norm (``1e-12`` as in ``F.normalize``; ``cosine_similarity`` uses ``1e-8``).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(B,)`` or ``(V, B)``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"cuda"``.

    Returns:
        The loss in the dtype of the predictions (float32 under autocast). It can be differentiated once.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here, or a second derivative is requested.
    """
    pairs = isinstance(predictions, torch.Tensor) and predictions.dim() == 2
    p = check.views("predictions", [predictions] if pairs else predictions, 1 if pairs else 2)
    if pairs and not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets: expected a (B, D) tensor like predictions, got {type(targets).__name__}")
    paired_target = pairs and targets.dim() == 2
    t = check.views("targets", [targets] if paired_target else targets, 1)
    if len(p) != len(t) or p[0].shape != t[0].shape or pairs != paired_target:
        raise ValueError(
            f"targets: expected the shape of predictions, {len(p)} view(s) of {tuple(p[0].shape)},"
            f" got {len(t)} of {tuple(t[0].shape)}"
        )
    autocast = check.autocasts(p[0].device)
    named = {f"predictions[{i}]": x for i, x in enumerate(p)} | {f"targets[{i}]": x for i, x in enumerate(t)}
    check.same_dtype_and_device(named, not autocast)
    reduction = check.choice("reduction", reduction, ops.REDUCTIONS)
    eps = check.positive_number("eps", eps)
    impl = backends.select(impl, p[0], "byol")

    dtype = p[0].dtype
    stacked = not pairs and isinstance(predictions, torch.Tensor) and isinstance(targets, torch.Tensor)
    if stacked and predictions.dtype == targets.dtype:
        tensors = [predictions, _constant(targets)]
    else:
        stacked = False
        if autocast:
            both, _ = check.one_dtype([*p, *t], None)
            p, t = both[: len(p)], both[len(p) :]
        tensors = [*p, *map(_constant, t)]
    constants = (eps, reduction, stacked, 1 if stacked else len(p))
    if impl == "reference" and reference.takes(p[0]):
        loss = reference.by_autograd(*constants, *tensors)
    else:
        loss = apply(BYOL, impl, *constants, *tensors)
    if pairs and loss.dim():
        loss = loss.squeeze(0)
    return loss if autocast else loss.to(dtype)


def _constant(target):
    """Return the target detached; an inference tensor is copied, since autograd cannot save one."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not target.is_inference():
        return target.detach()
    return target.clone()
