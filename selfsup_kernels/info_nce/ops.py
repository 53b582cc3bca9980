"""The ops ``info_nce_forward`` and ``info_nce_backward``."""

import importlib

import torch

from selfsup_kernels.core.ops import REDUCTIONS, accumulation_dtype, define
from selfsup_kernels.info_nce import reference
from selfsup_kernels.tiles.layout import Layout

# loss is () or (V, B) by `reduction`. The other outputs are what the backward needs: z, the (normalised) rows in
# the accumulation dtype; rnorm, 1/max(|h|, eps) (negative where the floor eps was taken); logw and coef, the
# coefficient tables of the objective; zq, the rows of the queue; order, the samples sorted by label.
# With count >= 0 only the tables of samples first .. first + count are filled, and loss is (V, count) or of these
# anchors alone: one process's part of a batch of many, see `selfsup_kernels.core.processes`.
FORWARD = (
    "(Tensor[] views, Tensor? labels, Tensor? queue, Tensor? temperature_tensor, float temperature,"
    " int objective, int core_view, bool normalize, float eps, int reduction, int first=0, int count=-1)"
    " -> (Tensor loss, Tensor z, Tensor rnorm, Tensor logw, Tensor coef, Tensor zq, Tensor order)"
)
# grad_temperature is a 0-dim float64 tensor; 0 unless need_temperature. With count >= 0, the gradient of samples
# first .. first + count, (V, count, D), from the tables of all; grad is (V, B), and grad_temperature their share.
BACKWARD = (
    "(Tensor grad, Tensor z, Tensor rnorm, Tensor logw, Tensor coef, Tensor zq, Tensor order, Tensor? labels,"
    " Tensor? temperature_tensor, float temperature, int num_views, int batch, int dim, int objective,"
    " int core_view, bool normalize, int reduction, bool need_temperature, ScalarType dtype, int first=0,"
    " int count=-1) -> (Tensor grad_views, Tensor grad_temperature)"
)


def forward_fake(
    views,
    labels,
    queue,
    temperature_tensor,
    temperature,
    objective,
    core_view,
    normalize,
    eps,
    reduction,
    first=0,
    count=-1,
):
    num_views, batch, dim = len(views), views[0].shape[0], views[0].shape[1]
    rows = num_views * batch
    acc = accumulation_dtype(views[0].dtype)
    new = views[0].new_empty
    # With labels views no longer matter, so one column of negatives; the queue is one more.
    columns = (1 if labels is not None else num_views) + (queue is not None)
    return (
        new((num_views, batch if count < 0 else count) if REDUCTIONS[reduction] == "none" else (), dtype=acc),
        new((rows, dim), dtype=acc),
        new((rows,), dtype=acc),
        new((rows, columns), dtype=torch.float64),
        new((rows, 4 if labels is not None else num_views), dtype=torch.float64),
        new((0 if queue is None else queue.shape[0], dim), dtype=acc),
        new((0 if labels is None else batch,), dtype=torch.int64),
    )


def backward_fake(
    grad,
    z,
    rnorm,
    logw,
    coef,
    zq,
    order,
    labels,
    temperature_tensor,
    temperature,
    num_views,
    batch,
    dim,
    objective,
    core_view,
    normalize,
    reduction,
    need_temperature,
    dtype,
    first=0,
    count=-1,
):
    return (
        z.new_empty((num_views, batch if count < 0 else count, dim), dtype=dtype),
        z.new_empty((), dtype=torch.float64),
    )


def forward_fake_gpu(
    views,
    labels,
    queue,
    temperature_tensor,
    temperature,
    objective,
    core_view,
    normalize,
    eps,
    reduction,
    first=0,
    count=-1,
):
    layout = Layout(len(views), *views[0].shape, 0 if queue is None else queue.shape[0], labels is not None)
    new = views[0].new_empty
    return (
        new(
            (layout.user_views, layout.samples if count < 0 else count) if REDUCTIONS[reduction] == "none" else (),
            dtype=torch.float32,
        ),
        new((layout.stored_rows, layout.stride)),
        new((layout.rows + layout.queue,), dtype=torch.float32),
        new((2, layout.columns, layout.rows), dtype=torch.float32),
        new((3 if layout.labels else layout.views, layout.rows), dtype=torch.float32),
        new((4,), dtype=torch.float32),
        new((layout.samples + 2 * layout.batch if layout.labels else 0,), dtype=torch.int64),
    )


def _triton(way):
    def call(*args):
        return getattr(importlib.import_module("selfsup_kernels.tiles.info_nce"), way)(*args)

    return call


define(
    "info_nce_forward",
    FORWARD,
    gpu="triton",
    reference=reference.forward,
    fake=forward_fake,
    gpu_fake=forward_fake_gpu,
    launcher=_triton("forward"),  # imported, with Triton, by the first call
    batched=True,
)
define(
    "info_nce_backward",
    BACKWARD,
    gpu="triton",
    reference=reference.backward,
    fake=backward_fake,
    launcher=_triton("backward"),
    batched=True,
)
