"""``byol_loss``: check the arguments, choose an implementation, apply."""

import torch

from selfsup_kernels.byol import reference
from selfsup_kernels.byol.autograd import BYOL
from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.core.transforms import active, apply


@explained("byol_loss([p0, p1], [t0, t1])")
def byol_loss(predictions, targets, *, eps=1e-12, reduction="mean", impl="auto"):
    r"""BYOL's regression loss over V views (arXiv:2006.07733, eq. 2), in one pass each way.

    For ``(B, D)`` pairs each row's loss is :math:`2 - 2 \cos(p_a, t_a)`. For V views the loss of anchor :math:`(u, a)`
    is the mean of :math:`2 - 2 \cos(p_{u,a}, t_{v,a})` over the other views :math:`v \ne u`; with V = 2 this is half
    of BYOL's symmetrised loss, the mean of its two terms instead of their sum.
    ``byol_loss([p0, p1], [t0, t1])`` takes both in the order of the views and pairs p0 with t1 and p1 with t0.

    Args:
        predictions: ``(B, D)``, ``(V, B, D)`` with V >= 2, or a sequence of V ``(B, D)`` tensors.
        targets: the same shape, in the same order of views; receives no gradient.
        eps: the floor of each norm (``1e-12`` as in ``F.normalize``; ``cosine_similarity`` uses ``1e-8``).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(B,)`` or ``(V, B)``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"cuda"``.

    Returns:
        The loss in the dtype of the predictions (float32 under autocast). It can be differentiated once.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here, or a second derivative is requested.

    Example:
        >>> p1, p2, t1, t2 = torch.randn(4, 256, 128)
        >>> loss = sk.byol_loss([p1, p2], [t1, t2])       # p1 against t2 and p2 against t1
        >>> twice = sk.byol_loss(p1, t2) + sk.byol_loss(p2, t1)
        >>> torch.testing.assert_close(2 * loss, twice)
    """
    pairs = isinstance(predictions, torch.Tensor) and predictions.dim() == 2
    p, shape = check.views(
        "predictions", [predictions] if pairs else predictions, 1 if pairs else 2, "; one view: two (B, D) tensors"
    )
    if pairs and not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets: expected a (B, D) tensor like predictions, got {type(targets).__name__}")
    paired_target = pairs and targets.dim() == 2
    t, target_shape = check.views("targets", [targets] if paired_target else targets, 1)
    if shape != target_shape or pairs != paired_target:
        (num_views, *of_each), (num_targets, *of_target) = shape, target_shape
        raise ValueError(
            f"targets: expected the shape of predictions, {num_views} view(s) of {tuple(of_each)},"
            f" got {num_targets} of {tuple(of_target)}"
        )
    if len(p) != len(t):  # one is stacked, the other a sequence
        p, t = (list(x[0].unbind(0)) if len(x) == 1 else x for x in (p, t))
    num, device, dtype = len(p), p[0].device, p[0].dtype
    autocast = check.autocasts(device)
    tensors = [*p, *t]

    def name(i):
        return f"predictions[{i}]" if i < num else f"targets[{i - num}]"

    check.same_dtype_and_device(tensors, name, not autocast)
    reduction = check.choice("reduction", reduction, ops.REDUCTIONS)
    eps = check.positive_number("eps", eps)
    impl = backends.select(impl, p[0], "byol")

    if autocast:
        tensors, _ = check.one_dtype(tensors, None)
    tensors[num:] = map(_constant, tensors[num:])
    constants = (eps, reduction, not pairs and num == 1, num)
    if impl == "reference" and reference.takes(p[0], shape[1] * shape[2]):
        loss = reference.by_autograd(*constants, *tensors)
    else:
        loss = apply(BYOL, impl, *constants, *tensors)
    if pairs and loss.dim():
        loss = loss.squeeze(0)
    return loss if autocast or loss.dtype == dtype else loss.to(dtype)


def _constant(target):
    """Return the target without gradient; an inference tensor is copied, since autograd cannot save one."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not target.is_inference():
        return target.detach() if target.requires_grad or active() else target
    return target.clone()
