"""The public functions: check the arguments, choose an implementation, apply."""

import math
from typing import NamedTuple

import torch

from selfsup_kernels import _tensor_lists as lists
from selfsup_kernels import _validate as check
from selfsup_kernels import backends, distributed, ops
from selfsup_kernels._named_tensors import match_modules
from selfsup_kernels._rows import Layout, check_size
from selfsup_kernels.autograd._transforms import active, apply
from selfsup_kernels.autograd.byol import BYOL
from selfsup_kernels.autograd.info_nce import InfoNCE
from selfsup_kernels.autograd.info_nce_group import GroupInfoNCE
from selfsup_kernels.objectives import LABEL_OBJECTIVES, OBJECTIVES
from selfsup_kernels.reference import eager
from selfsup_kernels.stats import ContrastiveStats, contrastive_stats

__all__ = ["ContrastiveStats", "byol_loss", "contrastive_stats", "ema_update_", "info_nce_loss"]


def info_nce_loss(
    views,
    *others,
    temperature=0.1,
    objective="supcon_out",
    labels=None,
    queue=None,
    core_view=None,
    normalize=True,
    eps=1e-12,
    reduction="mean",
    group=None,
    impl="auto",
):
    r"""N-view InfoNCE loss, in memory linear in the rows.

    With rows :math:`z = h / \max(|h|, \epsilon)` and :math:`S_{ij} = \langle z_i, z_j \rangle / \tau`, every row is an
    anchor once. Its positives are the same sample's rows in the other views (with ``labels``: every other row of its
    class), its negatives the rows of all other samples. With :math:`N_v` the log-sum-exp over the negatives of view
    :math:`v`, :math:`P_v` the positive of view :math:`v`, and ``mean`` over the positives, the loss of an anchor of
    view :math:`u` is, by ``objective``:

    =================  ======================================  ==============================================
    ``supcon_out``     ``LSE(all N, all P) - mean P``          NT-Xent for V = 2 (arXiv:2002.05709),
                                                               SupCon's L_out (arXiv:2004.11362, eq. 2)
    ``supcon_in``      ``LSE(all N, all P) - LSE(P) + log k``  SupCon's L_in (arXiv:2004.11362, eq. 3)
    ``per_positive``   ``mean[LSE(all N, P_v) - P_v]``         pytorch-metric-learning's NTXentLoss
    ``pairwise``       ``mean[LSE(N_u, N_v, P_v) - P_v]``      mean of the two-view NT-Xent losses
    ``cross_view``     ``mean[LSE(N_v, P_v) - P_v]``           CMC's full graph (arXiv:1906.05849), CLIP for V = 2
    ``decoupled``      ``LSE(all N) - mean P``                 DCL (arXiv:2110.06848)
    =================  ======================================  ==============================================

    Args:
        views: a ``(V, B, D)`` tensor or a sequence of V ``(B, D)`` tensors; V >= 2, or V >= 1 with ``labels``.
        temperature: a positive number, or a tensor of one element that may require grad.
        objective: see above.
        labels: ``(B,)`` integers. Samples that share one are positives of each other in every view and never
            negatives. An anchor without positives (V = 1, alone in its class) counts as zero. Not for ``pairwise``
            and ``cross_view``, nor with ``core_view``.
        queue: ``(K, D)`` further negatives of every anchor, without gradient; normalised like the views.
        core_view: two different views then meet, as positives and as negatives, only if one of them is this one.
        normalize: divide the rows by their norm. With ``False`` scores are plain inner products.
        eps: the floor of the norm.
        reduction: ``"mean"`` or ``"sum"`` over the anchors, or ``"none"`` for ``(V, B)``.
        group: a ``torch.distributed`` process group, or ``"world"`` for all processes, looked up in the call (where
            there is one process, that one): the batch is then that of all its processes together, each of
            which passes the views (and labels) of its own samples, as many as it has. ``"mean"`` and ``"sum"`` are over
            all anchors, the same number on every process; ``"none"`` gives ``(V, B)`` for its own. The gradient is
            that of the sum over the processes of what each makes of its result, so that after
            DistributedDataParallel's averaging the gradient of ``"mean"`` is the one of a single process with the
            whole batch. A temperature gets this process's part of its gradient: let DistributedDataParallel average
            it too. Every process has to make the same calls, forward and backward, in the same order. A queue is
            each process's own. ``"local"``, or None: the batch is this process's; None warns, once, where several
            processes run.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"triton"``. The reference is pure Python; it keeps
            all scores for the backward, as a loss written by hand does, where they are few: up to 1 MB, with labels or
            a queue 16 MB, and for ``cross_view`` 64 MB.

    Returns:
        The loss in the dtype of the views (float32 under autocast), computed in float32 at least. It is
        differentiable once: with ``backward()``, and, without a group, under ``torch.func`` (``grad``, ``vjp``,
        ``jacrev``; ``vmap`` makes one call for each element of its batch).

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here, a second or a forward-mode derivative is asked for, or another
            process of the group refused its arguments (arguments that differ between processes are a ValueError on all
            of them).
    """
    if others:
        raise TypeError(
            f"views: expected all views in one argument, [z0, z1] or (V, B, D), and the other arguments by name,"
            f" got {1 + len(others)} positional arguments"
        )
    arguments = (views, temperature, objective, labels, queue, core_view, normalize, eps, reduction, impl)
    group = distributed.resolve(group)
    if group is None:
        call = _check_info_nce(*arguments)
        if queue is None:
            check.samples(call.matrices[0].shape[0])
        loss = _info_nce(call)
    else:
        if torch.compiler.is_compiling():  # says why before _disable_dynamo says that
            torch._dynamo.graph_break(msg="selfsup_kernels: a loss over many processes reads their sizes on the host")
        loss, call = _group_info_nce(group, arguments)
    return loss if call.autocast else loss.to(call.matrices[0].dtype)


def _info_nce(call):
    impl, _, objective, *_ = call.constants
    if impl == "reference":
        _, labels, queue, *_ = call.tensors
        sizes = len(call.matrices), 0 if queue is None else len(queue)
        if eager.takes_info_nce(call.matrices[0], *sizes, labels is not None, OBJECTIVES[objective]):
            return eager.info_nce_loss(*call.constants[1:], *call.tensors)
    return apply(InfoNCE, *call.constants, *call.tensors)


class _InfoNCECall(NamedTuple):
    matrices: list
    autocast: bool
    constants: tuple
    tensors: tuple


def _check_info_nce(views, temperature, objective, labels, queue, core_view, normalize, eps, reduction, impl):
    """The arguments of ``InfoNCE``, of what the user passed."""
    matrices = check.views("views", views, 1 if labels is not None else 2)
    first = matrices[0]
    batch, dim = first.shape
    autocast = check.autocasts(first.device)
    check.same_dtype_and_device({f"views[{i}]": m for i, m in enumerate(matrices)}, not autocast)
    temperature_tensor, temperature = check.temperature(temperature)
    objective = check.objective(objective)
    reduction = check.choice("reduction", reduction, ops.REDUCTIONS)
    eps = check.positive_number("eps", eps)
    stacked = isinstance(views, torch.Tensor)
    if temperature > 2 and normalize:
        check.warn_once(
            "temperature", f"temperature: got {temperature:g}; a logit scale, as CLIP has, is 1 / temperature"
        )
    if stacked and len(matrices) > batch and views.is_contiguous():  # a transposed tensor was turned on purpose
        check.warn_once("views", f"views: (V, B, D), got {len(matrices)} views of {batch} samples; is it (B, V, D)?")
    if labels is not None:
        check.labels(labels, matrices)
        if OBJECTIVES[objective] not in LABEL_OBJECTIVES:
            raise ValueError(
                f"labels: expected an objective of {', '.join(LABEL_OBJECTIVES)}, got {OBJECTIVES[objective]!r}"
            )
        if core_view is not None:
            raise ValueError("core_view: expected None together with labels")
    if core_view is not None:
        core_view = check.integer("core_view", core_view, 0, len(matrices))
    if queue is not None:
        check.queue(queue, dim)
        check.same_dtype_and_device({"views[0]": first, "queue": queue}, not autocast)
        queue = queue.detach()
    if temperature_tensor is not None and temperature_tensor.device not in (first.device, torch.device("cpu")):
        raise ValueError(f"temperature: expected the device of views, {first.device}, got {temperature_tensor.device}")
    impl = backends.select(impl, first)

    if autocast:
        matrices, queue = _one_dtype(matrices, queue)
        views = views.to(matrices[0].dtype) if stacked else views
    core_view = -1 if core_view is None else core_view
    temperature = 0.0 if temperature_tensor is not None else temperature
    constants = (impl, temperature, objective, core_view, bool(normalize), eps, reduction, stacked)
    return _InfoNCECall(
        matrices, autocast, constants, (temperature_tensor, labels, queue, *([views] if stacked else matrices))
    )


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo, which takes as long as torch
def _group_info_nce(group, arguments):
    """(loss, checked call) of this process's share. Not traced: the sizes of the others are read on the host."""
    if active():
        raise RuntimeError(
            "group: a loss over many processes cannot be transformed by torch.func; use backward(), or group='local'"
        )
    distributed.check_group(group)
    call = distributed.announced(group, _check_info_nce, *arguments)
    impl, temperature, objective, core_view, normalize, eps, reduction, _ = call.constants
    temperature_tensor, labels, queue, *_ = call.tensors
    if temperature_tensor is not None:
        temperature = temperature_tensor.item() if temperature_tensor.device.type == "cpu" else math.nan
    samples, features = call.matrices[0].shape
    shares, longest_queue = distributed.agree(
        group,
        distributed.Header(
            refused=0,
            samples=samples,
            views=len(call.matrices),
            features=features,
            dtype=check.FLOATING.index(call.matrices[0].dtype),
            objective=objective,
            core_view=core_view,
            normalize=normalize,
            eps=eps,
            reduction=reduction,
            labels=labels is not None,
            queue=queue is not None,
            temperature=temperature,
            gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors),
            impl=ops.IMPLS.index(impl),
            queue_rows=0 if queue is None else len(queue),
        ),
    )
    if impl == "triton":  # here, where all processes come to the same answer
        layout = Layout(len(call.matrices), shares.batch, features, longest_queue, labels is not None)
        check_size(impl, layout)
    return GroupInfoNCE.apply(shares, *call.constants, *call.tensors), call


def byol_loss(predictions, targets, *, eps=1e-12, reduction="mean", impl="auto"):
    r"""BYOL's regression loss over V views (arXiv:2006.07733, eq. 2), in one pass each way.

    Pairs ``(B, D)``: :math:`2 - 2 \cos(p_a, t_a)` per row. V views: an anchor :math:`(u, a)` has the mean of
    :math:`2 - 2 \cos(p_{u,a}, t_{v,a})` over the other views :math:`v \ne u`; for V = 2 this is half of BYOL's
    symmetrised loss, that is the mean of its two terms.

    Args:
        predictions: ``(B, D)``, ``(V, B, D)`` with V >= 2, or a sequence of V ``(B, D)`` tensors.
        targets: the same shape; never receives a gradient.
        eps: the floor of each norm (``1e-12`` as in ``F.normalize``; ``cosine_similarity`` has ``1e-8``).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``(B,)`` or ``(V, B)``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"cuda"``.

    Returns:
        The loss in the dtype of the predictions (float32 under autocast). It is differentiable once.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here, or a second derivative is asked for.
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
            both, _ = _one_dtype([*p, *t], None)
            p, t = both[: len(p)], both[len(p) :]
        tensors = [*p, *map(_constant, t)]
    constants = (eps, reduction, stacked, 1 if stacked else len(p))
    if impl == "reference" and eager.takes_byol(p[0]):
        loss = eager.byol_loss(*constants, *tensors)
    else:
        loss = apply(BYOL, impl, *constants, *tensors)
    if pairs and loss.dim():
        loss = loss.squeeze(0)
    return loss if autocast else loss.to(dtype)


def _constant(target):
    """The target without gradient; a copy where it was made under ``inference_mode``, which autograd cannot save."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not target.is_inference():
        return target.detach()
    return target.clone()


def _one_dtype(matrices, queue):
    """Under autocast, operands of different dtypes meet in float32 (in float64 if one is), as PyTorch's losses do."""
    dtypes = {m.dtype for m in matrices} | ({queue.dtype} if queue is not None else set())
    if len(dtypes) == 1:
        return matrices, queue
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return [m.to(wide) for m in matrices], None if queue is None else queue.to(wide)


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

    For ``as_torch`` and ``own_memory`` see :func:`selfsup_kernels._tensor_lists.check_update`.
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
