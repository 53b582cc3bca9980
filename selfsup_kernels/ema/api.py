"""``ema_update_``: check the tensors, choose an implementation, update."""

import torch

from selfsup_kernels.core import backends
from selfsup_kernels.core import validate as check
from selfsup_kernels.ema import checks as lists
from selfsup_kernels.ema import ops  # noqa: F401  defines the ops
from selfsup_kernels.ema.named_tensors import match_modules


@torch.no_grad()
def ema_update_(targets, sources, momentum, *, stochastic_rounding=False, generator=None, impl="auto"):
    r"""Exponential moving average of many tensors at once, in place.

    :math:`t \leftarrow m\, t + (1 - m)\, s` for every pair (arXiv:2006.07733, eq. 1; arXiv:1911.05722, eq. 2), computed
    as :math:`t + (1 - m)(s - t)` in float32, or float64 for a float64 target, and as the sum itself where that is not
    finite: an end is infinite, or the difference overflows. A source may have another floating dtype than its target.
    Tensors of integers and bools are copied, complex ones averaged by ``torch.lerp``. Gradients do not flow, and the
    tensors may require grad.

    A bfloat16 target with :math:`m = 0.999` does not move under round-to-nearest: the step is below half the spacing
    of its numbers. Keep float32 targets, or turn ``stochastic_rounding`` on.

    Args:
        targets: tensors, or an ``nn.Module``.
        sources: as many tensors of the same shapes on the same device, or an ``nn.Module`` with the same parameters
            and buffers by name, wrappers' parts of the names aside. Of a tensor that has several names (tied weights)
            the first one counts. Buffers that are not saved may be missing or differ in shape: those are left alone.
        momentum: a number in [0, 1], or a floating tensor of one element. A tensor on an accelerator is not read by the
            host, and so not checked: for schedules in captured graphs. Under ``torch.compile`` no tensor is read;
            schedules want one there too, because every new number compiles again.
        stochastic_rounding: round bfloat16 and float16 targets up or down at random so that the expectation is exact.
        generator: where its random numbers come from; None for the default one of the device.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"cuda"``.

    Tensors without elements are skipped, an empty list is a no-op, and so is a source that is its destination.
    Sources may share memory with each other.

    DTensors are updated shard by shard, and nothing is sent: a target and its source need the same mesh and placements.
    Tensors that have no memory of their own (subclasses with operators of their own: quantised, float8 or low-rank
    weights; FakeTensors; the meta device) are averaged one by one by their own ``lerp_``, which rounds as it does; the
    plain tensors of the same lists go as ever.

    Everything is checked before anything is written: a refused update has changed nothing. While ``torch.compile``
    traces, memory has no addresses, so that what concerns it (destinations given twice, overlaps) is not checked.

    Raises:
        ValueError: lists of different length, shapes that differ, more than one device, names that differ, a
            destination that appears twice, or a momentum outside [0, 1].
        TypeError: not tensors, dtypes that are not averaged, an integer tensor with a source of another dtype, or a
            view of a DTensor as a destination.
        RuntimeError: a destination is expanded or partly overlaps a source or another destination; the memory of a
            tensor has been freed; ``impl`` cannot be used here.
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
    """:func:`ema_update_` of lists whose tensors have ``names`` for the messages; call it without grad mode.

    For ``as_torch`` and ``own_memory`` see :func:`selfsup_kernels.ema.checks.check_update`.
    """
    momentum_tensor, momentum = check.momentum(momentum)
    targets, sources, others = lists.check_update(targets, sources, names, as_torch=as_torch, own_memory=own_memory)
    if targets:
        impl = backends.select(impl, targets[0], "ema_update_", any_dtype=True)
    elif impl != "auto":  # no device says whether this machine's kernels would take them
        backends.require(impl, "ema_update_")
    if not targets and not others:
        return
    device = (targets[0] if targets else others[0][0]).device
    if momentum_tensor is not None and momentum_tensor.device not in (device, torch.device("cpu")):
        raise ValueError(f"momentum: expected the device of targets, {device}, got {momentum_tensor.device}")
    if others:  # first: their own operators may refuse, before anything else has changed
        lists.lerp_(others, 1 - (momentum if momentum_tensor is None else momentum_tensor.detach().double()))
    if not targets:
        return
    seed = None
    if stochastic_rounding:
        # On the device, so that a captured graph draws anew. Not random_(): torch.compile cannot trace it.
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    backends.op("ema_update_", impl)(targets, sources, momentum_tensor, momentum, seed)
    if impl != "reference" and not torch.compiler.is_compiling():
        # What autograd saved of a target is outdated now, and backward must notice. Eager operations count themselves.
        try:
            torch.autograd.graph.increment_version(targets)
        except RuntimeError:  # inference tensors have no version; counting the others twice does no harm
            torch.autograd.graph.increment_version([t for t in targets if not t.is_inference()])
