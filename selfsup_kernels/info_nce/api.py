"""``info_nce_loss``: check the arguments, choose an implementation, apply."""

from typing import NamedTuple

import torch

from selfsup_kernels.core import backends, ops, processes
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.transforms import active, apply
from selfsup_kernels.info_nce import exchange, reference
from selfsup_kernels.info_nce.autograd import InfoNCE
from selfsup_kernels.info_nce.call import Call
from selfsup_kernels.info_nce.exchange import GroupInfoNCE
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES, SYNONYMS, TABLE
from selfsup_kernels.tiles.layout import Layout, check_size


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
    group = processes.resolve(group)
    if group is None:
        checked = _check_info_nce(*arguments)
        if queue is None:
            check.samples(checked.call.batch)
        impl, stacked, call, tensors, *_ = checked
        if impl == "reference" and reference.takes(checked.view, call):
            loss = reference.by_autograd(call, *tensors)
        else:
            loss = apply(InfoNCE, impl, stacked, call, *tensors)
    else:
        if torch.compiler.is_compiling():  # says why before _disable_dynamo says that
            torch._dynamo.graph_break(msg="selfsup_kernels: a loss over many processes reads their sizes on the host")
        loss, checked = _group_info_nce(group, arguments)
    return loss if checked.autocast else loss.to(checked.view.dtype)


def check_objective(value) -> str:
    """An objective's name. The message for one that the field calls otherwise says its name here."""
    hint = ""
    if isinstance(value, str):
        plain = "".join(filter(str.isalnum, value.lower()))
        known = [repr(name) for name in OBJECTIVES if name.replace("_", "") == plain] or SYNONYMS.get(plain)
        hint = f"; its name here is {' or '.join(known)}" if known else ""
    check.choice("objective", value, OBJECTIVES, hint)
    return value


class _Checked(NamedTuple):
    """A call whose arguments fit."""

    impl: str
    stacked: bool
    """Whether the views came as one tensor."""
    call: Call
    tensors: tuple
    """The temperature's tensor, labels, queue, then the views as they came."""
    view: torch.Tensor
    autocast: bool


def _check_info_nce(views, temperature, objective, labels, queue, core_view, normalize, eps, reduction, impl):
    """What the user passed, checked."""
    matrices = check.views("views", views, 1 if labels is not None else 2)
    first = matrices[0]
    batch, dim = first.shape
    autocast = check.autocasts(first.device)
    check.same_dtype_and_device({f"views[{i}]": m for i, m in enumerate(matrices)}, not autocast)
    temperature_tensor, temperature = check.temperature(temperature)
    objective = check_objective(objective)
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
        if objective not in LABEL_OBJECTIVES:
            raise ValueError(f"labels: expected an objective of {', '.join(LABEL_OBJECTIVES)}, got {objective!r}")
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
        matrices, queue = check.one_dtype(matrices, queue)
        views = views.to(matrices[0].dtype) if stacked else views
    call = Call(
        num_views=len(matrices),
        batch=batch,
        dim=dim,
        queue_rows=0 if queue is None else queue.shape[0],
        first=0,
        count=-1,
        labelled=labels is not None,
        core_view=-1 if core_view is None else core_view,
        **{name: int(value) for name, value in TABLE[objective]._asdict().items()},
        normalize=bool(normalize),
        reduction=reduction,
        eps=eps,
        temperature=0.0 if temperature_tensor is not None else temperature,
    )
    tensors = (temperature_tensor, labels, queue, *([views] if stacked else matrices))
    return _Checked(impl, stacked, call, tensors, matrices[0], autocast)


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo, which takes as long as torch
def _group_info_nce(group, arguments):
    """(loss, checked call) of this process's share. Not traced: the sizes of the others are read on the host."""
    if active():
        raise RuntimeError(
            "group: a loss over many processes cannot be transformed by torch.func; use backward(), or group='local'"
        )
    processes.check_group(group)
    checked = exchange.announced(group, _check_info_nce, *arguments)
    impl, stacked, call, tensors, view, _ = checked
    shares, call, longest_queue = exchange.agree(group, impl, call, tensors, view)
    if impl == "triton":  # here, where all processes come to the same answer
        check_size(impl, Layout(call._replace(queue_rows=longest_queue)))
    return GroupInfoNCE.apply(shares, impl, stacked, call, *tensors), checked
