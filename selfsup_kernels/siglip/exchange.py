"""The sigmoid loss over the batch of several processes: their communication and the autograd Function.

The forward exchanges a header (sizes and arguments, which must agree), the rows of y, the duplicates if there are any,
and the sum of the losses. Each process has the pairs of its own x with all y, so that every pair is computed once. Its
part of the gradient of the other processes' y goes back to them, multiplied by its upstream gradient, in one
reduce-scatter of the backward.
"""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import torch

from selfsup_kernels.core import ops
from selfsup_kernels.core.agreement import Agreement, known
from selfsup_kernels.core.once import once
from selfsup_kernels.core.ops import REDUCTIONS
from selfsup_kernels.core.processes import Shares, gather_samples, scatter_sum, sum_over
from selfsup_kernels.siglip.autograd import NONE, as_given
from selfsup_kernels.siglip.call import Call

SUM = REDUCTIONS.index("sum")
OF_OWN_ROWS, RETURNED = 8, 16
"""What a header's field ``gradient`` adds for calls with other exchanges: 1 if a gradient is wanted, 2 that of x and 4
that of y."""


def _shown(field, header):
    """Return the value of a field's argument as the user wrote it, or None for the usual form."""
    if field != "gradient":
        return None
    code = header[field]
    if code & RETURNED:
        return "returned by siglip_value_and_grad"
    wanted = {0: "not wanted", 1: "of the scalars", 3: "of x", 5: "of y", 7: "of x and y"}[code % OF_OWN_ROWS]
    return wanted + (", of each process's own loss" if code & OF_OWN_ROWS else "")


AGREEMENT = Agreement(
    Call,
    own={"rows", "columns", "first"},
    argument={"dim": "features", "gradient": "a gradient"},
    given=("duplicates",),
    shown=_shown,
)


def agree(group, impl, kind, wanted, call, duplicates, scale_tensor, bias_tensor, x, y) -> tuple[Shares, Call]:
    """Check that the calls of all processes agree; return their shares and the call of this process's rows.

    Args:
        kind: 0, ``OF_OWN_ROWS`` or ``RETURNED``.

    Raises:
        RuntimeError: another process refused its arguments.
        ValueError: an argument differs between processes.
    """
    call = call._replace(scale=known(scale_tensor, call.scale), bias=known(bias_tensor, call.bias))
    gradient = kind + (0 if wanted is None else 1 + 2 * wanted[0] + 4 * wanted[1])
    headers = AGREEMENT.headers(group, (duplicates is not None,), x.dtype, gradient, impl, call)
    shares = Shares.of(group, [header["rows"] for header in headers])
    return shares, call._replace(columns=shares.batch, first=shares.first)


def value_and_grad(shares, impl, call, duplicates, scale_tensor, bias_tensor, x, y):
    """Return the loss over all samples and the gradients of the sum of the processes' results, as the op does."""
    loss, *grads = _of_own_rows(shares, impl, call, (True, True), duplicates, scale_tensor, bias_tensor, x, y)
    factor = len(shares.sizes) * _share(call, shares)
    grad_x, grad_y, scalars = (g * factor for g in grads)
    return _over_all(loss, call, shares), (grad_x, scatter_sum(grad_y, shares), scalars)


class GroupSigLIP(torch.autograd.Function):
    """``SigLIP`` for this process's samples. The gradient is that of the sum, over the processes, of the values that
    each computes from its result. Forward and backward both communicate, in the same order everywhere.

    With ``whole`` the reductions are over the samples of all processes, else over this process's rows of x.
    """

    @staticmethod
    def forward(
        ctx,
        shares: Shares,
        impl: str,
        whole: bool,
        wanted: tuple[bool, bool] | None,
        call: Call,
        duplicates: torch.Tensor | None,
        scale_tensor: torch.Tensor | None,
        bias_tensor: torch.Tensor | None,
        x: torch.Tensor,
        y: torch.Tensor,
    ):
        tensors = duplicates, scale_tensor, bias_tensor, x, y
        loss, *saved = _of_own_rows(shares, impl, call, None if call.reduction == NONE else wanted, *tensors)
        ctx.save_for_backward(*saved, *tensors)
        ctx.arguments = shares, impl, whole, wanted, call
        if call.reduction == NONE:
            return loss
        return _over_all(loss, call, shares) if whole else loss * _share(call)

    @staticmethod
    @once
    def backward(ctx, saved, grad):
        shares, impl, whole, wanted, call = ctx.arguments
        *grads, duplicates, scale_tensor, bias_tensor, x, y = saved
        if call.reduction == NONE:
            tensors = duplicates, scale_tensor, bias_tensor, x, y
            _, *grads = _of_own_rows(shares, impl, call, wanted, *tensors, upstream=grad.contiguous())
        else:
            # With `whole` all processes have the same loss over all samples, but each may weight it differently.
            weight = grad.to(torch.float64, copy=True)  # summed in place, and autograd's tensor may have other users
            weight = sum_over(weight, shares) * _share(call, shares) if whole else weight * _share(call)
            grads = [g * weight.to(g.dtype) for g in grads]
        grad_x, grad_y, scalars = grads
        if wanted[1]:
            grad_y = scatter_sum(grad_y, shares)
        needed = ctx.needs_input_grad[6:]
        results = as_given(needed, (grad_x, grad_y, scalars), None, call, scale_tensor, bias_tensor, x, y)
        return *[None] * 6, *results


def _of_own_rows(shares, impl, call, wanted, duplicates, scale_tensor, bias_tensor, x, y, upstream=None):
    """Return what ``siglip_value_and_grad`` does for the pairs of this process's x with all y: the loss () of the sum,
    or (own samples,), and the gradients; without ``wanted`` three empty tensors in their place."""
    every = gather_samples(y[None], shares)[0]
    if duplicates is not None:
        duplicates = gather_samples(duplicates.view(1, -1, 1), shares).view(-1)
    arguments = x, every, duplicates, scale_tensor, bias_tensor
    call = call._replace(reduction=NONE if call.reduction == NONE else SUM)
    if wanted is None:
        return ops.run("siglip_value", impl, *arguments, *call), *(x.new_empty(0) for _ in range(3))
    return ops.run("siglip_value_and_grad", impl, *arguments, upstream, *call, *wanted)


def _share(call, shares=None):
    """Return the weight of a row's loss in the result: of all processes' rows, or of this process's."""
    rows = call.rows if shares is None else shares.batch
    return 1 / rows if REDUCTIONS[call.reduction] == "mean" else 1.0


def _over_all(loss, call, shares):
    return (sum_over(loss.double(), shares) * _share(call, shares)).to(loss.dtype)
