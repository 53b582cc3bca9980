"""``info_nce_loss``: check the arguments, choose an implementation, apply."""

from typing import NamedTuple

import torch

from selfsup_kernels.core import backends, ops, processes
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained, plain
from selfsup_kernels.core.transforms import active, apply
from selfsup_kernels.info_nce import exchange, few_scores
from selfsup_kernels.info_nce.autograd import InfoNCE
from selfsup_kernels.info_nce.call import Call
from selfsup_kernels.info_nce.exchange import GroupInfoNCE, relative
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES, SYNONYMS, TABLE, Ids
from selfsup_kernels.tiles.layout import Layout, check_size


@explained("info_nce_loss([z0, z1], temperature=0.1, labels=y)")
def info_nce_loss(
    views,
    *,
    temperature=0.1,
    objective="supcon_out",
    labels=None,
    duplicates=None,
    logq=None,
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
    class), its negatives the rows of all other samples (classes). With :math:`N_v` the log-sum-exp over the negatives
    of view :math:`v`, :math:`P_v` the positive of view :math:`v`, and ``mean`` over the positives, the loss of an
    anchor of view :math:`u` is, by ``objective``:

    =================  ======================================  ==============================================
    ``supcon_out``     ``LSE(all N, all P) - mean P``          NT-Xent for V = 2 (arXiv:2002.05709),
                                                               SupCon's L_out (arXiv:2004.11362, eq. 2)
    ``supcon_in``      ``LSE(all N, all P) - LSE(P) + log k``  SupCon's L_in (arXiv:2004.11362, eq. 3)
    ``per_positive``   ``mean[LSE(all N, P_v) - P_v]``         pytorch-metric-learning's NTXentLoss
    ``pairwise``       ``mean[LSE(N_u, N_v, P_v) - P_v]``      mean of the two-view NT-Xent losses
    ``cross_view``     ``mean[LSE(N_v, P_v) - P_v]``           CMC's full graph (arXiv:1906.05849), CLIP for V = 2
    ``decoupled``      ``LSE(all N) - mean P``                 DCL (arXiv:2110.06848)
    =================  ======================================  ==============================================

    With ``labels``, ``cross_view`` is ``mean[LSE(N_v, all P_v) - mean P_v]`` over the views :math:`v`, where
    :math:`P_v` are all rows of the anchor's class in that view: UniCL (arXiv:2204.03610, eq. 2 to 4) for V = 2.

    Args:
        views: a ``(V, B, D)`` tensor or a sequence of V ``(B, D)`` tensors; V >= 2, or V >= 1 with ``labels`` (not for
            ``cross_view``).
        temperature: a positive number, or a tensor of one element that may require grad.
        objective: see above.
        labels: ``(B,)`` integers. Samples that share one are positives of each other in every view (``cross_view``: in
            the other views) and never negatives. An anchor without positives (V = 1, alone in its class) counts as
            zero. Not for ``pairwise``, nor with ``core_view``.
        duplicates: ``(B,)`` integers. Samples that share one (such as the same caption or the same product) are not
            negatives of each other, nor positives. An anchor that is left without negatives counts as zero in
            ``decoupled``. Not with ``labels``. With a ``group`` an integer means the same on every process.
        logq: the logarithms of the probabilities with which the samples were drawn, ``(B,)`` or ``(V, B)``. They are
            subtracted from the scores of the rows as columns, positives too: :math:`S_{ij} - \log q_j`, the correction
            of sampled softmax for two-tower models (Yi et al., RecSys 2019, section 4). Finite; what is common to all,
            such as their normalisation, has no effect. No gradient. Not with a ``queue``.
        queue: ``(K, D)`` more negatives for every anchor, without gradient; normalised like the views.
        core_view: a view, or None. With one, two different views are compared only if one of them is this view (CMC's
            core-view graph, arXiv:1906.05849, section 3.4).
        normalize: divide the rows by their norm. With ``False`` scores are plain inner products.
        eps: the floor of the norm.
        reduction: ``"mean"`` or ``"sum"`` over the anchors, or ``"none"`` for ``(V, B)``.
        group: a ``torch.distributed`` process group, or ``"world"`` for all processes (looked up in each call). The
            batch is then that of all its processes together. Each process passes the views (and labels) of its own
            samples; their numbers may differ. ``"mean"`` and ``"sum"`` are over all anchors and give the same number on
            every process; ``"none"`` gives ``(V, B)`` for the process's own anchors. The gradient is that of the sum of
            the results of all processes, so that after the averaging of DistributedDataParallel the gradient of
            ``"mean"`` equals that of one process with the whole batch. A temperature gets this process's part of its
            gradient; let DistributedDataParallel average it too. All processes must make the same calls, forward and
            backward, in the same order. Each process has its own queue. ``"local"`` or None: the batch of this process
            alone; None warns once where several processes run.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"triton"``. The reference is pure Python. Where the
            scores are few (up to 1 MB; 16 MB with labels or a queue; 64 MB for ``cross_view``) it keeps them all for
            the backward, as a loss written by hand does; not with
            ``duplicates``, ``logq``, or ``labels`` across views.

    Returns:
        The loss in the dtype of the views (float32 under autocast), computed in float32 at least. It is
        differentiable once: with ``backward()``, and, without a group, under ``torch.func`` (``grad``, ``vjp``,
        ``jacrev``; ``vmap`` makes one call for each element of its batch).

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here; a second or a forward-mode derivative was requested; or another
            process of the group refused its arguments (arguments that differ between processes are a ValueError on
            every process).

    Example:
        >>> views = torch.randn(2, 256, 128, requires_grad=True)      # or a list of two (256, 128)
        >>> sk.info_nce_loss(views, temperature=0.1).backward()       # NT-Xent
        >>> sk.info_nce_loss(views, objective="cross_view", reduction="none").shape
        torch.Size([2, 256])
    """
    arguments = (views, temperature, objective, labels, duplicates, logq, queue, core_view)
    arguments += (normalize, eps, reduction, impl)
    group = processes.resolve(group)
    if group is None:
        checked = _check_info_nce(*arguments)
        if queue is None:
            check.samples(checked.call.batch)
        impl, stacked, call, (temperature, ids, logq, *tensors), _ = checked
        if impl == "reference" and logq is None and few_scores.takes(tensors[-1], call):
            loss = few_scores.by_autograd(call, temperature, ids, *tensors)
        else:
            loss = apply(InfoNCE, impl, stacked, call, temperature, ids, relative(logq, tensors[-1].dtype), *tensors)
            loss = loss.view(call.num_views, -1) if loss.dim() else loss
    else:
        if torch.compiler.is_compiling():  # gives the reason, which _disable_dynamo would not
            torch._dynamo.graph_break(msg="selfsup_kernels: a loss over many processes reads their sizes on the host")
        loss, checked = _group_info_nce(group, arguments)
    return _as_given(loss, checked)


@explained("info_nce_value_and_grad([z0, z1], temperature=0.1)")
def info_nce_value_and_grad(
    views,
    *,
    temperature=0.1,
    objective="supcon_out",
    labels=None,
    duplicates=None,
    logq=None,
    queue=None,
    core_view=None,
    normalize=True,
    eps=1e-12,
    reduction="mean",
    group=None,
    impl="auto",
):
    """Return :func:`info_nce_loss` and its gradients, without an autograd graph.

    Args:
        views, temperature, objective, labels, duplicates, logq, queue, core_view, normalize, eps, group, impl: as in
            :func:`info_nce_loss`.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        ``(loss, grad_views, grad_temperature)``: the loss as :func:`info_nce_loss` returns it, the gradient of the
        views in their form, a tensor or a tuple, and dtype, and that of the temperature as a 0-dim tensor in float32
        (float64 for float64 views).

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`info_nce_loss`.

    Example:
        >>> views = torch.randn(2, 256, 128)
        >>> loss, grad_views, grad_temperature = sk.info_nce_value_and_grad(views, temperature=0.1)
        >>> grad_views.shape
        torch.Size([2, 256, 128])
    """
    check.choice("reduction", reduction, ops.REDUCTIONS[1:])
    with torch.no_grad():
        arguments = (views, temperature, objective, labels, duplicates, logq, queue, core_view)
        arguments += (normalize, eps, reduction, impl)
        group = processes.resolve(group)
        if group is None:
            impl, stacked, call, (temperature, ids, logq, queue, *tensors), _ = checked = _check_info_nce(*arguments)
            if queue is None:
                check.samples(call.batch)
            logq = relative(logq, tensors[0].dtype)
            parts = list(tensors[0].unbind(0)) if stacked else tensors
            loss, *saved = ops.run("info_nce_forward", impl, parts, ids, logq, queue, temperature, *call)
            grads = ops.run("info_nce_backward", impl, torch.ones_like(loss), *saved, ids, *call, True, parts[0].dtype)
        else:
            loss, grads, checked = _group_info_nce(group, arguments, value_and_grad=True)
        grad_views, grad_temperature = grads
        dtype = checked.tensors[-1].dtype
        return (
            _as_given(loss, checked),
            grad_views if checked.stacked else grad_views.unbind(0),
            grad_temperature.to(ops.accumulation_dtype(dtype)),
        )


def _as_given(loss, checked):
    dtype = checked.tensors[-1].dtype
    return loss if checked.autocast or loss.dtype == dtype else loss.to(dtype)


def check_objective(value) -> str:
    """Return the name, or raise; the message translates names that the field uses for it."""
    if isinstance(value, str) and value in TABLE:
        return value
    hint = ""
    if isinstance(value, str):
        known = [repr(name) for name in OBJECTIVES if plain(name) == plain(value)] or SYNONYMS.get(plain(value))
        hint = f"; its name here is {' or '.join(known)}" if known else ""
    check.choice("objective", value, OBJECTIVES, hint)
    return value


class _Checked(NamedTuple):
    """The checked arguments of a call."""

    impl: str
    stacked: bool
    """Whether the views are one tensor (V, B, D)."""
    call: Call
    tensors: tuple
    """The temperature as a tensor, labels or duplicates, logq (V, B) in float64, queue (each may be None), then the
    views as given, of one dtype."""
    autocast: bool


def _check_info_nce(
    views, temperature, objective, labels, duplicates, logq, queue, core_view, normalize, eps, reduction, impl
):
    """Check the arguments of :func:`info_nce_loss` and make the record of the call."""
    least = 1 if labels is not None and objective != "cross_view" else 2  # with labels one view has positives
    hint = "; one view needs labels" if labels is None else ""
    tensors, (num_views, batch, dim) = check.views("views", views, least, hint)
    first, device = tensors[0], tensors[0].device
    autocast = check.autocasts(device)
    check.same_dtype_and_device(tensors, "views[{}]".format, not autocast)
    temperature_tensor, temperature = check.number_or_tensor("temperature", temperature, check.positive_number)
    objective = check_objective(objective)
    reduction = check.choice("reduction", reduction, ops.REDUCTIONS)
    eps = check.positive_number("eps", eps)
    stacked = isinstance(views, torch.Tensor)
    if temperature > 2 and normalize:
        check.warn_once(
            "temperature", f"temperature: got {temperature:g}; a logit scale, as CLIP has, is 1 / temperature"
        )
    if stacked and num_views > batch and views.is_contiguous():  # a transposed tensor was turned on purpose
        check.warn_once("views", f"views: (V, B, D), got {num_views} views of {batch} samples; is it (B, V, D)?")
    if labels is not None:
        check.integers("labels", labels, "views", num_views, batch, device)
        if objective not in LABEL_OBJECTIVES:
            raise ValueError(f"labels: expected an objective of {', '.join(LABEL_OBJECTIVES)}, got {objective!r}")
        if core_view is not None:
            raise ValueError("core_view: expected None together with labels")
        if duplicates is not None:
            raise ValueError("duplicates: expected None together with labels, whose classes have no negatives inside")
    if duplicates is not None:
        check.integers("duplicates", duplicates, "views", num_views, batch, device)
    if logq is not None:
        check.logq(logq, num_views, batch, device)
        if queue is not None:
            raise ValueError("logq: expected None together with a queue, whose rows' probabilities are not known")
    if core_view is not None:
        core_view = check.integer("core_view", core_view, 0, num_views)
    if queue is not None:
        check.queue(queue, dim)
        check.same_dtype_and_device([first, queue], ("views[0]", "queue").__getitem__, not autocast)
        queue = queue.detach()
    check.near("temperature", temperature_tensor, "views", device)
    impl = backends.select(impl, first)

    if autocast:
        tensors, queue = check.one_dtype(tensors, queue)
    if logq is not None:
        logq = logq.detach().double().expand(num_views, batch)
    ids = duplicates if labels is None else labels
    columns, inside, numerator = map(int, TABLE[objective])
    call = Call(
        num_views=num_views,
        batch=batch,
        dim=dim,
        queue_rows=0 if queue is None else queue.shape[0],
        first=0,
        count=-1,
        ids=int(Ids.LABELS if labels is not None else Ids.DUPLICATES if duplicates is not None else Ids.NONE),
        core_view=-1 if core_view is None else core_view,
        columns=columns,
        inside=inside,
        numerator=numerator,
        normalize=bool(normalize),
        reduction=reduction,
        eps=eps,
        temperature=0.0 if temperature_tensor is not None else temperature,
    )
    return _Checked(impl, stacked, call, (temperature_tensor, ids, logq, queue, *tensors), autocast)


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo, which takes as long as torch
def _group_info_nce(group, arguments, value_and_grad=False):
    """Return the loss, with ``value_and_grad`` also its gradients, and the checked call of this process's samples. Not
    traced: the host reads the other processes' sizes."""
    if active():
        raise RuntimeError(
            "group: a loss over many processes cannot be transformed by torch.func; use backward(), or group='local'"
        )
    processes.check_group(group)
    checked = exchange.AGREEMENT.announced(group, _check_info_nce, *arguments)
    impl, stacked, call, tensors, _ = checked
    shares, call, longest_queue = exchange.agree(group, impl, call, tensors, value_and_grad)
    if impl == "triton":  # before any exchange of rows: all processes raise together
        check_size(impl, Layout(call._replace(queue_rows=longest_queue)))
    if value_and_grad:
        loss, saved, ids = exchange.forward(shares, impl, stacked, call, *tensors)
        dtype, one = tensors[-1].dtype, torch.ones_like(loss)
        return loss, exchange.backward(shares, impl, call, dtype, True, saved, ids, one), checked
    return GroupInfoNCE.apply(shares, impl, stacked, call, *tensors), checked
