"""The ops ``siglip_value`` and ``siglip_value_and_grad``: the tensors of a call, then the fields of its record.

``duplicates`` is (M,) int64: pairs of two samples that share an element do not count. ``scale_tensor`` and
``bias_tensor`` have one element each.

``siglip_value`` returns the loss, () or (N,) by ``reduction``, in float32 (float64 for float64 rows).
``siglip_value_and_grad`` returns it too, and the gradients of ``sum_i upstream_i loss_i``: those of x (N, D) and y
(M, D) in the dtype of the loss, with no rows unless ``need_x`` or ``need_y``, and (2,) float64, those of scale and
bias. ``upstream`` (N,) has the dtype of the loss and goes with the reduction "none"; with None it is 1, for the
reduction "mean" 1 / N.
"""

import importlib

import torch

from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype, define
from selfsup_kernels.core.record import schema
from selfsup_kernels.siglip import reference
from selfsup_kernels.siglip.call import Call


def value_fake(x, y, duplicates, scale_tensor, bias_tensor, *call):
    call = Call(*call)
    shape = (call.rows,) if REDUCTIONS[call.reduction] == "none" else ()
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def value_and_grad_fake(x, y, duplicates, scale_tensor, bias_tensor, upstream, *rest):
    *call, need_x, need_y = rest
    loss, call = value_fake(x, y, duplicates, scale_tensor, bias_tensor, *call), Call(*call)
    grad_x = loss.new_empty((call.rows if need_x else 0, call.dim))
    grad_y = loss.new_empty((call.columns if need_y else 0, call.dim))
    return loss, grad_x, grad_y, loss.new_empty((2,), dtype=torch.float64)


def _triton(name):
    """Return a launcher, which imports its module in the first call."""

    def call(*arguments):
        return getattr(importlib.import_module("selfsup_kernels.tiles.siglip"), name)(*arguments)

    return call


_TENSORS = "Tensor x, Tensor y, Tensor? duplicates, Tensor? scale_tensor, Tensor? bias_tensor"

define(
    "siglip_value",
    f"({_TENSORS}, {schema(Call)}) -> Tensor loss",
    gpu="triton",
    reference=reference.value,
    fake=value_fake,
    launcher=_triton("value"),
    batched=True,
)
define(
    "siglip_value_and_grad",
    f"({_TENSORS}, Tensor? upstream, {schema(Call)}, bool need_x, bool need_y)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_scalars)",
    gpu="triton",
    reference=reference.value_and_grad,
    fake=value_and_grad_fake,
    launcher=_triton("value_and_grad"),
    batched=True,
)
