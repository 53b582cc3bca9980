"""``siglip_loss`` and ``siglip_value_and_grad``: check the arguments, choose an implementation, apply."""

from typing import NamedTuple

import torch

from selfsup_kernels.core import backends, ops, processes
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.core.transforms import active, apply
from selfsup_kernels.siglip import exchange
from selfsup_kernels.siglip.autograd import SigLIP, narrow
from selfsup_kernels.siglip.call import Call


@explained("siglip_loss(image, text)")
def siglip_loss(
    x,
    y,
    *,
    scale=10.0,
    bias=-10.0,
    duplicates=None,
    normalize=True,
    eps=1e-12,
    reduction="mean",
    group=None,
    impl="auto",
):
    r"""SigLIP's pairwise sigmoid loss (arXiv:2303.15343, section 3.2), in memory linear in the rows.

    With rows :math:`x_i = h_i / \max(|h_i|, \epsilon)`, :math:`y_j` likewise, and :math:`p_{ij} = 1` for the pairs
    :math:`i = j`, else -1, the loss of row :math:`i` is

    .. math:: L_i = -\sum_j \log \sigma\big(p_{ij} (s \langle x_i, y_j \rangle + b)\big)

    Nothing of it needs a sum over a row of scores, so one pass over the pairs makes the loss and all gradients.

    Args:
        x, y: ``(B, D)`` each, such as image and text embeddings; row i of both is one sample. One sample is enough: it
            has no negatives, and its positive pair counts.
        scale: s, a number > 0, or a tensor of one element that may require grad, on the device of the rows or the CPU.
            SigLIP learns its logarithm. Under ``torch.compile`` a value that changes has to be a tensor: each number is
            compiled into a graph of its own.
        bias: b, likewise a number or a tensor. SigLIP starts with s = 10 and b = -10, so that the many negatives do not
            dominate the first steps.
        duplicates: ``(B,)`` integers. Two samples that share one (such as the same caption) are no negatives of each
            other: their pairs do not count. With a ``group`` an integer means the same on every process.
        normalize: divide the rows by their norm. With ``False`` scores are plain inner products.
        eps: the floor of the norm.
        reduction: ``"mean"`` or ``"sum"`` over the rows of x, or ``"none"`` for ``(B,)``, whose backward makes the
            pairs a second time.
        group: a ``torch.distributed`` process group, or ``"world"`` for all processes (looked up in each call). The
            batch is then that of all its processes together. Each passes its own samples, whose numbers may differ.
            ``"mean"`` and ``"sum"`` are over the whole batch and give the same number on every process; ``"none"``
            gives the rows of the process's own x. The gradient is that of the sum of the results of all processes, so
            that after the averaging of DistributedDataParallel the gradient of ``"mean"`` equals that of one process
            with the whole batch. Scale and bias get this process's part of their gradients; let
            DistributedDataParallel average these too. All processes must make the same calls, forward and backward, in
            the same order. ``"local"`` or None: the batch of this process alone; None warns once where several
            processes run.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or, for GPUs, ``"triton"``.

    Returns:
        The loss in the dtype of the rows (float32 under autocast), computed in float32 at least. It is differentiable
        once: with ``backward()``, and, without a group, under ``torch.func``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: ``impl`` cannot be used here; a second or a forward-mode derivative was requested; or another
            process of the group refused its arguments (arguments that differ between processes are a ValueError on
            every process).

    Example:
        >>> images, texts = torch.randn(2, 256, 128)
        >>> loss = sk.siglip_loss(images, texts, scale=10.0, bias=-10.0)
        >>> sk.siglip_loss(images, texts, reduction="none").shape
        torch.Size([256])
    """
    arguments = x, y, scale, bias, duplicates, normalize, eps, reduction, impl
    group = processes.resolve(group)
    if group is None:
        checked = _check(*arguments)
        loss = apply(SigLIP, checked.impl, checked.wanted, checked.call, *checked.tensors)
    else:
        if torch.compiler.is_compiling():  # gives the reason, which _disable_dynamo would not
            torch._dynamo.graph_break(msg="selfsup_kernels: a loss over many processes reads their sizes on the host")
        loss, checked = _in_group(group, arguments)
    return _as_given(loss, checked)


@explained("siglip_value_and_grad(image, text)")
def siglip_value_and_grad(
    x,
    y,
    *,
    scale=10.0,
    bias=-10.0,
    duplicates=None,
    normalize=True,
    eps=1e-12,
    reduction="mean",
    group=None,
    impl="auto",
):
    """Return :func:`siglip_loss` and its gradients, without an autograd graph.

    Args:
        x, y, scale, bias, duplicates, normalize, eps, group, impl: as in :func:`siglip_loss`.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        ``(loss, grad_x, grad_y, grad_scale, grad_bias)``: the loss as :func:`siglip_loss` returns it, the gradients of
        the rows in their dtype, those of scale and bias as 0-dim tensors in float32 (float64 for float64 rows).

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`siglip_loss`.

    Example:
        >>> images, texts = torch.randn(2, 256, 128)
        >>> loss, grad_images, grad_texts, grad_scale, grad_bias = sk.siglip_value_and_grad(images, texts)
        >>> grad_images.shape
        torch.Size([256, 128])
    """
    check.choice("reduction", reduction, ops.REDUCTIONS[1:])
    with torch.no_grad():
        x, y, scale, bias = (t.detach() if isinstance(t, torch.Tensor) else t for t in (x, y, scale, bias))
        arguments = x, y, scale, bias, duplicates, normalize, eps, reduction, impl
        group = processes.resolve(group)
        if group is None:
            checked = _check(*arguments)
            duplicates, scale, bias, x, y = checked.tensors
            loss, *grads = ops.run(
                "siglip_value_and_grad", checked.impl, x, y, duplicates, scale, bias, None, *checked.call, True, True
            )
        else:
            loss, grads, checked = _in_group(group, arguments, value_and_grad=True)
        grad_x, grad_y, (grad_scale, grad_bias) = grads
        dtype = ops.accumulation_dtype(checked.tensors[-1].dtype)
        return (
            _as_given(loss, checked),
            *(narrow(g, rows, checked.call) for g, rows in zip((grad_x, grad_y), checked.tensors[-2:], strict=True)),
            grad_scale.to(dtype),
            grad_bias.to(dtype),
        )


def own_rows_loss(x, y, *, scale, bias, normalize, group):
    """Return the mean of the losses of this process's rows of x against the y of all processes of ``group``.

    The gradient is that of the sum of the processes' results, as with :func:`siglip_loss`. ``reduction="none"`` gives
    these losses too, but makes the pairs twice.
    """
    arguments = x, y, scale, bias, None, normalize, 1e-12, "mean", "auto"
    return _as_given(*_in_group(group, arguments, whole=False))


class _Checked(NamedTuple):
    """The checked arguments of a call."""

    impl: str
    wanted: tuple[bool, bool] | None
    """Whether x and y need a gradient; None if nothing does."""
    call: Call
    tensors: tuple
    """duplicates, scale and bias (each may be None), x and y, of one dtype."""
    autocast: bool


def _check(x, y, scale, bias, duplicates, normalize, eps, reduction, impl):
    """Check the arguments of :func:`siglip_loss` and make the record of the call."""
    check.pair("x", x, "y", y)
    check.rows("x", x)
    check.rows("y", y)
    (batch, dim), device = x.shape, x.device
    autocast = check.autocasts(device)
    check.same_dtype_and_device([x, y], "xy".__getitem__, not autocast)
    scale_tensor, scale = check.number_or_tensor("scale", scale, check.positive_number)
    bias_tensor, bias = check.number_or_tensor("bias", bias, check.finite_number)
    check.near("scale", scale_tensor, "x", device)
    check.near("bias", bias_tensor, "x", device)
    if duplicates is not None:
        check.integers("duplicates", duplicates, "x", 1, batch, device)
        duplicates = duplicates.to(torch.int64)
    reduction = check.choice("reduction", reduction, ops.REDUCTIONS)
    eps = check.positive_number("eps", eps)
    impl = backends.select(impl, x, "siglip_value")
    if autocast:
        (x, y), _ = check.one_dtype([x, y], None)
    tensors = duplicates, scale_tensor, bias_tensor, x, y
    wanted = None
    if active() or torch.jit.is_tracing():  # another level, or a later call of the trace, may want them
        wanted = (True, True)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        wanted = (x.requires_grad, y.requires_grad)
    call = Call(batch, batch, dim, 0, bool(normalize), reduction, eps, scale, bias)
    return _Checked(impl, wanted, call, tensors, autocast)


def _as_given(loss, checked):
    dtype = checked.tensors[-1].dtype
    return loss if checked.autocast or loss.dtype == dtype else loss.to(dtype)


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo, which takes as long as torch
def _in_group(group, arguments, whole=True, value_and_grad=False):
    """Return the loss, with ``value_and_grad`` also its gradients, and the checked arguments. Not traced: the host
    reads the other processes' sizes. Without ``whole`` the reduction is over this process's rows of x."""
    if active():
        raise RuntimeError(
            "group: a loss over many processes cannot be transformed by torch.func; use backward(), or group='local'"
        )
    processes.check_group(group)
    impl, wanted, call, tensors, _ = checked = exchange.AGREEMENT.announced(group, _check, *arguments)
    kind = exchange.RETURNED if value_and_grad else 0 if whole else exchange.OF_OWN_ROWS
    shares, call = exchange.agree(group, impl, kind, wanted, call, *tensors)
    if value_and_grad:
        return *exchange.value_and_grad(shares, impl, call, *tensors), checked
    return exchange.GroupSigLIP.apply(shares, impl, whole, wanted, call, *tensors), checked
