"""The ops ``info_nce_forward`` and ``info_nce_backward``: the tensors of a call, then the fields of its record.

``sample_ids`` is (B,), integers of any dtype, with the meaning of ``Call.ids``. ``logq`` is (V, B), contiguous, float32
(float64 for float64 views), at least 0: it is subtracted from the scores of the rows as columns.

The forward returns the loss, () or (V, own samples) by ``reduction``, and the fields of ``Saved``. The backward takes
the gradient of the loss (of a call of one process among many: (V, B), of all samples), ``Saved``, the ids and the
record; it returns the gradient of the own samples, (V, own samples, D) in ``dtype``, and that of the temperature, a
0-dim float64 tensor, 0 unless ``need_temperature``.
"""

import importlib

import torch

from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype, define
from selfsup_kernels.core.record import schema
from selfsup_kernels.info_nce import reference
from selfsup_kernels.info_nce.call import Call, Saved, unpack_backward
from selfsup_kernels.tiles.layout import Layout

_SAVED = ", ".join(f"Tensor {name}" for name in Saved._fields)


def _loss(view, call, dtype):
    shape = (call.num_views, call.own) if REDUCTIONS[call.reduction] == "none" else ()
    return view.new_empty(shape, dtype=dtype)


def forward_fake(views, ids, logq, queue, temperature_tensor, *call):
    call, view = Call(*call), views[0]
    rows, acc = call.num_views * call.batch, accumulation_dtype(view.dtype)
    new = view.new_empty
    return _loss(view, call, acc), *Saved(
        rows=new((rows + call.queue_rows, call.dim), dtype=acc),
        inverse_norms=new((rows + call.queue_rows,), dtype=acc),
        log_weights=new((call.columns_of_tables, rows), dtype=torch.float64),
        weights=new((0, rows), dtype=torch.float64),
        positives=new((call.positives_of_tables, rows), dtype=torch.float64),
        scalars=new((4,), dtype=torch.float64),
        order=new((0,), dtype=torch.int64),
        classes=new((2, 0), dtype=torch.int32),
        logq=new((0 if logq is None else rows,), dtype=acc),
    )


def forward_fake_cpu(views, ids, logq, queue, temperature_tensor, *call):
    loss, *saved = forward_fake(views, ids, logq, queue, temperature_tensor, *call)
    call, saved = Call(*call), Saved(*saved)
    order = saved.order.new_empty((call.batch if call.labelled else 0,))
    return loss, *saved._replace(order=order)


def forward_fake_triton(views, ids, logq, queue, temperature_tensor, *call):
    call, view = Call(*call), views[0]
    layout, new = Layout(call), view.new_empty
    float32 = {"dtype": torch.float32}
    return _loss(view, call, torch.float32), *Saved(
        rows=new((layout.stored_rows, layout.stride)),
        inverse_norms=new((layout.rows + call.queue_rows,), **float32),
        log_weights=new((call.columns_of_tables, layout.rows), **float32),
        weights=new((call.columns_of_tables, layout.rows), **float32),
        positives=new((call.positives_of_tables, layout.rows), **float32),
        scalars=new((4,), **float32),
        order=new((call.batch if call.labelled else 0,), dtype=torch.int64),
        classes=new((2, layout.rows if call.labelled else 0), dtype=torch.int32),
        logq=new((0 if logq is None else layout.rows,), **float32),
    )


def backward_fake(grad, *arguments):
    saved, _, call, (_, dtype) = unpack_backward(arguments)
    new = saved.rows.new_empty
    return new((call.num_views, call.own, call.dim), dtype=dtype), new((), dtype=torch.float64)


def _triton(way):
    """Return the launcher of the forward or the backward, which imports Triton in its first call."""

    def call(*arguments):
        info_nce, tape = (importlib.import_module(f"selfsup_kernels.tiles.{name}") for name in ("info_nce", "tape"))
        return tape.run(getattr(info_nce, way), arguments)

    return call


define(
    "info_nce_forward",
    f"(Tensor[] views, Tensor? sample_ids, Tensor? logq, Tensor? queue, Tensor? temperature_tensor, {schema(Call)})"
    f" -> (Tensor loss, {_SAVED})",
    gpu="triton",
    reference=reference.forward,
    fake={"reference": forward_fake, "cpu": forward_fake_cpu, "triton": forward_fake_triton},
    launcher=_triton("forward"),
    batched=True,
)
define(
    "info_nce_backward",
    f"(Tensor grad, {_SAVED}, Tensor? sample_ids, {schema(Call)}, bool need_temperature, ScalarType dtype)"
    " -> (Tensor grad_views, Tensor grad_temperature)",
    gpu="triton",
    reference=reference.backward,
    fake=backward_fake,
    launcher=_triton("backward"),
    batched=True,
)
