"""Every dispatcher op of the package: its schema and its fake kernel.

One op per hot call. An op has one overload per implementation (``info_nce_forward.cpu``,
``info_nce_forward.reference``), all of the same signature, so that the layer above picks one by name and the
tests can drive each of them. Schemas and fakes live here, in Python, so that importing the package never needs a
compiler: the C++ libraries only add implementations to what is defined here.

The ops themselves are not differentiable; ``selfsup_kernels.autograd`` wraps them.
"""

import importlib

import torch

from selfsup_kernels.objectives import OBJECTIVES

NAMESPACE = "selfsup_kernels"
IMPLS = ("reference", "cpu", "triton", "cuda")
SCHEMAS = {
    # loss is () or (V, B) by `reduction`. The other outputs are what the backward needs: z, the (normalised) rows in
    # the accumulation dtype; rnorm, 1/max(|h|, eps) (negative where the floor eps was taken); logw and coef, the
    # coefficient tables of the objective; zq, the rows of the queue; order, the samples sorted by label.
    # With count >= 0 only the tables of samples first .. first + count are filled, and loss is (V, count) or of these
    # anchors alone: one process's part of a batch of many, see `selfsup_kernels.distributed`.
    "info_nce_forward": (
        "(Tensor[] views, Tensor? labels, Tensor? queue, Tensor? temperature_tensor, float temperature,"
        " int objective, int core_view, bool normalize, float eps, int reduction, int first=0, int count=-1)"
        " -> (Tensor loss, Tensor z, Tensor rnorm, Tensor logw, Tensor coef, Tensor zq, Tensor order)"
    ),
    # grad_temperature is a 0-dim float64 tensor; 0 unless need_temperature. With count >= 0, the gradient of samples
    # first .. first + count, (V, count, D), from the tables of all; grad is (V, B), and grad_temperature their share.
    "info_nce_backward": (
        "(Tensor grad, Tensor z, Tensor rnorm, Tensor logw, Tensor coef, Tensor zq, Tensor order, Tensor? labels,"
        " Tensor? temperature_tensor, float temperature, int num_views, int batch, int dim, int objective,"
        " int core_view, bool normalize, int reduction, bool need_temperature, ScalarType dtype, int first=0,"
        " int count=-1) -> (Tensor grad_views, Tensor grad_temperature)"
    ),
    # stats is (3, V, B): 1/max(|p|, eps), 1/max(|t|, eps) (both negative where the floor was taken) and the sum of the
    # anchor's cosines.
    "byol_forward": (
        "(Tensor[] predictions, Tensor[] targets, float eps, int reduction) -> (Tensor loss, Tensor stats)"
    ),
    "byol_backward": ("(Tensor grad, Tensor[] predictions, Tensor[] targets, Tensor stats, int reduction) -> Tensor"),
    # seed: a 0-dim int64 tensor turns stochastic rounding on (for bfloat16 and float16 targets).
    "ema_update_": (
        "(Tensor(a!)[] targets, Tensor[] sources, Tensor? momentum_tensor, float momentum, Tensor? seed) -> ()"
    ),
    # The step of an optimizer, then ema_update_ of targets from params; a target without elements stands for none.
    # momentum_buffers may be an empty list. scales: float64, one for each parameter, of its decayed gradient (LARS).
    "fused_sgd_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] targets, Tensor? lr_tensor,"
        " float lr, Tensor? ema_tensor, float ema, Tensor? seed, Tensor? scales, float weight_decay, float momentum,"
        " float dampening, bool nesterov, bool maximize, bool first) -> ()"
    ),
    "fused_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] targets,"
        " Tensor? lr_tensor, float lr, Tensor? ema_tensor, float ema, Tensor? seed, float step, float beta1,"
        " float beta2, float eps, float weight_decay, bool maximize) -> ()"
    ),
}

REDUCTIONS = ("none", "mean", "sum")
"""The position of a reduction in this tuple is its number in the ops."""


def impls_of(name: str) -> tuple[str, ...]:
    """The implementations that an op has: on GPUs, InfoNCE is written in Triton and the others in CUDA C++."""
    return ("reference", "cpu", "triton" if name.startswith("info_nce") else "cuda")


_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    for _impl in impls_of(_name):
        _library.define(f"{_name}.{_impl}{_schema}")


def get(name: str, impl: str):
    """The op ``name`` as implemented by ``impl``."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), impl)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _info_nce_forward_fake(
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


def _info_nce_backward_fake(
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


def _byol_forward_fake(predictions, targets, eps, reduction):
    num_views, batch = len(predictions), predictions[0].shape[0]
    acc = accumulation_dtype(predictions[0].dtype)
    new = predictions[0].new_empty
    return (
        new((num_views, batch) if REDUCTIONS[reduction] == "none" else (), dtype=acc),
        new((3, num_views, batch), dtype=acc),
    )


def _byol_backward_fake(grad, predictions, targets, stats, reduction):
    return predictions[0].new_empty((len(predictions), *predictions[0].shape))


def _in_place_fake(*args):
    return None


def _info_nce_forward_fake_gpu(
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
    from selfsup_kernels._rows import Layout

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


_FAKES = {
    "info_nce_forward": _info_nce_forward_fake,
    "info_nce_backward": _info_nce_backward_fake,
    "byol_forward": _byol_forward_fake,
    "byol_backward": _byol_backward_fake,
    "ema_update_": _in_place_fake,
    "fused_sgd_": _in_place_fake,
    "fused_adamw_": _in_place_fake,
}
for _name, _fake in _FAKES.items():
    for _impl in impls_of(_name):
        fake = _info_nce_forward_fake_gpu if (_name, _impl) == ("info_nce_forward", "triton") else _fake
        torch.library.register_fake(f"{NAMESPACE}::{_name}.{_impl}", fake, lib=_library)


def _take(argument, dims, i):
    """Element ``i`` of the batch of an op's argument: a tensor, a list of them, or what vmap does not see."""
    if isinstance(argument, list):
        return [_take(item, dim, i) for item, dim in zip(argument, dims, strict=True)]
    return argument if dims is None else argument.select(dims, i)


def _loop(op):
    """The rule of ``op`` under ``torch.vmap``: a call for each element. A batch of batches has no larger product to
    gain from; each call uses all threads, or the whole GPU, already."""

    def rule(info, in_dims, *arguments):
        if info.batch_size == 0:
            raise ValueError("torch.vmap: expected at least one element of the batch, got 0")
        calls = [
            op(*(_take(argument, dims, i) for argument, dims in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


for _name in ("info_nce_forward", "info_nce_backward", "byol_forward", "byol_backward"):
    for _impl in impls_of(_name):
        torch.library.register_vmap(f"{NAMESPACE}::{_name}.{_impl}", _loop(get(_name, _impl)), lib=_library)


def register_reference() -> None:
    """Register the eager implementations, for every device."""
    from selfsup_kernels.reference import byol, ema, info_nce, optim

    for name, function in {
        "info_nce_forward": info_nce.forward,
        "info_nce_backward": info_nce.backward,
        "byol_forward": byol.forward,
        "byol_backward": byol.backward,
        "ema_update_": ema.update_,
        "fused_sgd_": optim.sgd_,
        "fused_adamw_": optim.adamw_,
    }.items():
        _library.impl(f"{name}.reference", function, "CompositeExplicitAutograd")


def register_triton() -> None:
    """Register the launchers of the Triton kernels. The first call of each imports its module, and Triton. (The C++
    libraries register their implementations themselves.)"""

    def launcher(function):
        def call(*args):
            return getattr(importlib.import_module("selfsup_kernels.triton.info_nce"), function)(*args)

        return call

    for way in ("forward", "backward"):
        # For CPU tensors too: those of Triton's interpreter in the tests. `backends.select` lets no others through.
        _library.impl(f"info_nce_{way}.triton", launcher(way), "CompositeExplicitAutograd")


register_reference()
register_triton()

assert len(OBJECTIVES) == 6  # the numbers of the objectives are part of the ops' contract with the C++ sources
