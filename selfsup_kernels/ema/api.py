"""``ema_update_``: check the tensors, choose an implementation, update."""

import torch

import selfsup_kernels.ema.ops  # noqa: F401  defines the ops
from selfsup_kernels.core import backends, ops
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.ema import checks as lists
from selfsup_kernels.ema.named_tensors import match_modules


@torch.no_grad()
@explained("ema_update_(target.parameters(), online.parameters(), 0.996)")
def ema_update_(targets, sources, momentum, *, stochastic_rounding=False, generator=None, impl="auto"):
    r"""Exponential moving average of many tensors at once, in place.

    :math:`t \leftarrow m\, t + (1 - m)\, s` for every pair (arXiv:2006.07733, eq. 1; arXiv:1911.05722, eq. 2), computed
    as :math:`t + (1 - m)(s - t)` in float32, or in float64 for a float64 target. Where that is not finite (:math:`t`
    or :math:`s` is infinite, or the difference overflows), the sum itself is computed. A source may have a different
    floating dtype than its target. Integer and bool tensors are copied; complex tensors are averaged by
    ``torch.lerp``. No gradients flow; the tensors may require grad.

    A bfloat16 target with :math:`m = 0.999` does not move under round-to-nearest: the step is less than half the
    spacing of bfloat16 numbers. Keep float32 targets, or turn on ``stochastic_rounding``.

    Args:
        targets: tensors, or an ``nn.Module``.
        sources: one tensor per target, with the same shape and on the same device, or an ``nn.Module`` with the same
            parameter and buffer names. Name prefixes added by wrappers are ignored. A tensor with several names (tied
            weights) goes by its first name. Non-persistent buffers that are missing on one side or differ in shape are
            left alone.
        momentum: a number in [0, 1], or a floating tensor of one element. The host does not read, and so does not
            check, a tensor on an accelerator: use one for schedules in captured graphs. Under ``torch.compile`` no
            tensor is read; pass a tensor there too, because every new number triggers a recompilation.
        stochastic_rounding: round bfloat16 and float16 targets up or down at random so that the expectation is exact.
        generator: the random generator for ``stochastic_rounding``; None for the device's default generator.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"cuda"``.

    Tensors without elements and pairs whose source is the target are skipped; an empty list is a no-op. Sources may
    share memory with each other.

    DTensors are updated shard by shard without communication: a target and its source need the same mesh and
    placements. Tensors without plain memory (subclasses that override operators: quantised, float8 or low-rank weights;
    FakeTensors; the meta device) are averaged one by one with their own ``lerp_`` and its rounding; the plain tensors
    in the same lists still go in one call.

    All checks run before any write: a refused update changes nothing. While ``torch.compile`` traces, tensors have no
    addresses, so repeated destinations and overlaps are not checked.

    Raises:
        ValueError: the lists differ in length, shapes or names differ, there is more than one device, a destination
            appears twice, or the momentum is outside [0, 1].
        TypeError: an item is not a tensor, a dtype cannot be averaged, the source of an integer tensor has another
            dtype, or a destination is a view of a DTensor.
        RuntimeError: a destination is expanded or partly overlaps a source or another destination; the memory of a
            tensor has been freed; ``impl`` cannot be used here.

    Example:
        >>> target, online = [torch.zeros(3)], [torch.ones(3)]
        >>> sk.ema_update_(target, online, 0.75)
        >>> target
        [tensor([0.2500, 0.2500, 0.2500])]
    """
    if isinstance(targets, torch.nn.Module) or isinstance(sources, torch.nn.Module):
        targets, sources, names = match_modules(targets, sources)
    else:
        targets, sources = lists.tensor_list("targets", targets), lists.tensor_list("sources", sources)
        names = None
    ema_update_pairs_(targets, sources, names, momentum, stochastic_rounding, generator, impl)


def ema_update_pairs_(
    targets,
    sources,
    names,
    momentum,
    stochastic_rounding=False,
    generator=None,
    impl="auto",
    *,
    as_torch=False,
    own_memory=False,
) -> None:
    """Run :func:`ema_update_` on lists; ``names`` label the tensors in error messages. Call it under ``no_grad``.

    For ``as_torch`` and ``own_memory`` see :func:`selfsup_kernels.ema.checks.check_update`.
    """
    if (
        not torch.compiler.is_compiling()
        and lists.are_plain(targets)
        and lists.are_plain(sources)
        and update_at_once(targets, sources, len(targets), momentum, stochastic_rounding, impl)
    ):
        return
    momentum_tensor, momentum = check.momentum(momentum)
    targets, sources, others = lists.check_update(targets, sources, names, as_torch=as_torch, own_memory=own_memory)
    if targets:
        impl = backends.select(impl, targets[0], "ema_update_", any_dtype=True)
    elif impl != "auto":  # without tensors there is no device, so check the machine only
        backends.require(impl, "ema_update_")
    if not targets and not others:
        return
    device = (targets[0] if targets else others[0][0]).device
    if momentum_tensor is not None and momentum_tensor.device not in (device, torch.device("cpu")):
        raise ValueError(f"momentum: expected the device of targets, {device}, got {momentum_tensor.device}")
    if others:  # first: their own operators may raise, and nothing else has changed yet
        lists.lerp_(others, 1 - (momentum if momentum_tensor is None else momentum_tensor.detach().double()))
    if not targets:
        return
    seed = None
    if stochastic_rounding:
        # On the device, so that each replay of a captured graph draws a new seed. torch.compile cannot trace random_().
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    ops.overload("ema_update_", impl)(targets, sources, momentum_tensor, momentum, seed)
    if impl != "reference" and not torch.compiler.is_compiling():
        _increment_version(targets)


def update_at_once(targets, sources, averaged, momentum, stochastic_rounding, impl) -> bool:
    """Average the first ``averaged`` pairs and copy the others, in one call that checks them too; return True if done.

    False changes nothing: other implementations and options, and lists that an op cannot judge (invalid ones among
    them) are left to :func:`ema_update_pairs_`. The tensors must be of the usual classes. Not for ``torch.compile``.
    """
    if (
        not targets
        or len(targets) != len(sources)
        or stochastic_rounding
        or impl not in ("auto", "cpu")
        or lists.is_recorded()  # a recorded call would have to test its result
        or targets[0].device.type != "cpu"
        or backends.unavailable("cpu") is not None
    ):
        return False
    tensor, momentum = check.momentum(momentum)
    update = ops.overload("ema_update_pairs_", "default")
    if tensor is not None or not update(targets, sources, averaged, momentum):
        return False
    _increment_version(targets)
    return True


def _increment_version(tensors) -> None:
    """Let backward detect that saved tensors have changed. Eager operations do this themselves."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version; incrementing the others twice is harmless
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
