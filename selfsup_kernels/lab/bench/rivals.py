"""What others call for the same work, each behind an adaptor: a function of the workload's inputs, or why not.

Losses take the workload's inputs and return the loss. The rivals of ``info_nce`` work on the same M x M problem
(M = V B rows) as ours. What fused linear cross-entropies cannot do is leave a row's similarity with itself out of its
softmax: their losses differ from NT-Xent by that term, not in their work. Averages take targets and sources; those that
average copies of their own (:class:`Average`) say where the copies are.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from selfsup_kernels.core import backends
from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import eager
from selfsup_kernels.lab.bench.workloads import MOMENTUM, TEMPERATURE

OURS = "selfsup_kernels"
OTHER_LOSS = "another objective: its loss keeps each row's similarity with itself"
FILTERED = OTHER_LOSS + "; by default its gradient leaves out blocks in which no probability reaches eps / 32"


class Unsupported(Exception):
    """A rival cannot do the case; the message says why."""


class Rival(NamedTuple):
    make: Callable
    """``make(case, inputs)`` gives a function of the inputs."""
    package: str | None = None
    """What has to be installed, as the package index calls it."""
    note: str | None = None
    other: bool = False
    """Whether it computes something else, so that its error against float64 would mean nothing."""
    compiles: bool = False
    """Whether the first call of each part compiles for this shape."""
    quadratic: bool = False
    """Whether it holds M x M matrices."""
    waits: bool = False
    """Whether it copies from the GPU to the host, which a CUDA graph cannot capture."""


class Average:
    """A rival's update of copies that it holds itself: ``copies`` are those tensors."""

    def __init__(self, update, copies):
        self.update, self.copies = update, copies

    def __call__(self, targets, sources):
        self.update()


# ---------------------------------------------------------------- InfoNCE


def eager_info_nce(views):
    return eager.info_nce_loss(views, TEMPERATURE)


def chunked_info_nce(views, chunk=4096):
    """NT-Xent in eager PyTorch with memory linear in the rows: some rows at a time, recomputed in the backward."""
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    anchors = torch.arange(len(z), device=z.device)
    positives = torch.stack([anchors.roll(shift * batch) for shift in range(1, num_views)], dim=1)

    def some(own, z, start):
        scores = (own / TEMPERATURE) @ z.T
        diagonal = torch.arange(len(own), device=z.device)
        scores[diagonal, start + diagonal] = -torch.inf
        return -F.log_softmax(scores, dim=-1).gather(1, positives[start : start + len(own)]).sum()

    losses = [checkpoint(some, own, z, start * chunk, use_reentrant=False) for start, own in enumerate(z.split(chunk))]
    return torch.stack(losses).sum() / positives.numel()


def _rows_and_partners(views):
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    return z, torch.arange(len(z), device=z.device).roll(batch)


def _two_views(case):
    if case.views != 2:
        raise Unsupported(f"takes two views, not {case.views}")


def _inf_cl(case, inputs):
    _two_views(case)
    from inf_cl import cal_inf_loss

    def loss(views):
        z, partner = _rows_and_partners(views)
        return cal_inf_loss(z / TEMPERATURE, z, labels=partner, head_dim=min(256, z.shape[1]))

    return loss


def _cut_cross_entropy(case, inputs):
    _two_views(case)
    from cut_cross_entropy import linear_cross_entropy

    def loss(views):
        z, partner = _rows_and_partners(views)
        return linear_cross_entropy(z / TEMPERATURE, z, partner)

    return loss


def _liger(case, inputs):
    _two_views(case)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()

    def loss(views):
        z, partner = _rows_and_partners(views)
        return cross_entropy(z, z / TEMPERATURE, partner)

    return loss


def _lightly_info_nce(case, inputs):
    _two_views(case)
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=TEMPERATURE)
    return lambda views: criterion(views[0], views[1])


def _metric_learning(name):
    """Its losses take one list of embeddings with labels: those of one sample share a label."""

    def make(case, inputs):
        if name == "NTXentLoss":
            _two_views(case)  # from three views on it is another objective, per_positive
        from pytorch_metric_learning import losses

        criterion = getattr(losses, name)(temperature=TEMPERATURE)
        labels = torch.arange(case.batch, device=inputs[0].device).repeat(case.views)
        return lambda views: criterion(views.reshape(-1, views.shape[-1]), labels)

    return make


# ---------------------------------------------------------------- BYOL


def eager_byol(predictions, targets):
    if predictions.ndim == 2:
        return (2 - 2 * (F.normalize(predictions, dim=-1) * F.normalize(targets, dim=-1)).sum(-1)).mean()
    return eager.byol_loss(predictions, targets)


def _lightly_byol(case, inputs):
    from lightly.loss import NegativeCosineSimilarity

    criterion = NegativeCosineSimilarity()

    def loss(predictions, targets):
        if predictions.ndim == 2:
            return 2 + 2 * criterion(predictions, targets)
        views = range(len(predictions))
        pairs = [criterion(predictions[u], targets[v]) for u in views for v in views if u != v]
        return 2 + 2 * torch.stack(pairs).mean()

    return loss


# ---------------------------------------------------------------- EMA


def foreach_lerp(targets, sources):
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def loop_of_lerp(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source if source.dtype == target.dtype else source.float(), 1 - MOMENTUM)


def _foreach_lerp(case, inputs):
    if case.dtype != "float32":
        raise Unsupported("refuses mixed dtypes")
    return foreach_lerp


def _model(tensors):
    return torch.nn.ParameterList([torch.nn.Parameter(x.detach().clone()) for x in tensors])


def _start(module, targets):
    """Set a rival's own average to where the workload's targets are; returns its tensors."""
    copies = list(module.parameters())
    with torch.no_grad():
        for copy, target in zip(copies, targets, strict=True):
            copy.copy_(target)
    return copies


def _timm(case, inputs):
    from timm.utils import ModelEmaV3

    targets, sources = inputs
    model = _model(sources)
    average = ModelEmaV3(model, decay=MOMENTUM)
    if case.dtype != "float32":
        average.module.to(targets[0].dtype)
    return Average(lambda: average.update(model), _start(average.module, targets))


def _lightly_ema(case, inputs):
    from lightly.models.utils import update_momentum

    target, source = map(_model, inputs)
    return Average(lambda: update_momentum(source, target, MOMENTUM), list(target.parameters()))


def _swa_utils(case, inputs):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    if case.dtype != "float32":
        raise Unsupported("refuses mixed dtypes")
    targets, sources = inputs
    model = _model(sources)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
    average.update_parameters(model)  # the first one copies
    return Average(lambda: average.update_parameters(model), _start(average.module, targets))


# ---------------------------------------------------------------- by name


def _always(function):
    return lambda case, inputs: function


def _compiled(function):
    def make(case, inputs):
        torch._dynamo.reset()  # what other shapes left would count against the limit of recompilations
        return torch.compile(function, dynamic=False)

    return make


PML = "pytorch-metric-learning"
RIVALS = {
    "info_nce": {
        "eager": Rival(_always(eager_info_nce), quadratic=True),
        "compile": Rival(_compiled(eager_info_nce), compiles=True, quadratic=True),
        "chunked": Rival(_always(chunked_info_nce)),
        "lightly": Rival(_lightly_info_nce, "lightly", "NTXentLoss", quadratic=True),
        "pytorch-metric-learning": Rival(_metric_learning("SupConLoss"), PML, "SupConLoss", quadratic=True),
        "pytorch-metric-learning NTXentLoss": Rival(_metric_learning("NTXentLoss"), PML, quadratic=True),
        "Inf-CL": Rival(_inf_cl, "inf-cl", OTHER_LOSS, other=True),
        "cut-cross-entropy": Rival(_cut_cross_entropy, "cut-cross-entropy", FILTERED, other=True),
        "Liger": Rival(_liger, "liger-kernel", OTHER_LOSS, other=True),
    },
    "byol": {
        "eager": Rival(_always(eager_byol)),
        "compile": Rival(_compiled(eager_byol), compiles=True),
        "lightly": Rival(_lightly_byol, "lightly", "NegativeCosineSimilarity, scaled"),
    },
    "ema": {
        "foreach_lerp": Rival(_foreach_lerp),
        "loop": Rival(_always(loop_of_lerp), note="target.lerp_(source.float()), tensor by tensor"),
        "compile": Rival(_compiled(loop_of_lerp), compiles=True, note="of the loop"),
        "lightly": Rival(_lightly_ema, "lightly", "update_momentum"),
        "timm": Rival(_timm, "timm", "ModelEmaV3"),
        "swa_utils": Rival(_swa_utils, note="AveragedModel, get_ema_multi_avg_fn", waits=True),
    },
}
"""Of each operation, by the name that results and ``--vs`` use."""

EAGER_EMA = ("foreach_lerp", "loop")
"""What ``--vs eager`` means for the moving average: both ways to write it."""


def impl_name(impl):
    """The column of one implementation of ours."""
    return OURS if impl == "auto" else f"impl='{impl}'"


def impl_of(name):
    """The implementation of a column of ours, or None for a rival's column."""
    return "auto" if name == OURS else name[6:-1] if name.startswith("impl='") else None


def find(op, name) -> Rival:
    """The rival of a column; a name ``MODULE:CALLABLE`` is a user's own function of the inputs."""
    impl = impl_of(name)
    if impl is not None:
        return Rival(functools.partial(_ours, impl))
    if name in RIVALS[op]:
        return RIVALS[op][name]
    module, _, attribute = name.partition(":")
    return Rival(lambda case, inputs: getattr(importlib.import_module(module), attribute))


def _ours(impl, case, inputs):
    first = inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0]
    kernels = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}.get(impl)
    if kernels and first.device.type != kernels:
        raise Unsupported(f"takes {kernels.upper()} tensors, these are on the {first.device.type.upper()}")
    reason = backends.unavailable(impl) if impl != "auto" else None
    if reason:
        raise Unsupported(str(reason))
    return case.ours(impl)


def load(case, name, inputs):
    """``(function of the inputs, None)``, or ``(None, why there is none)``."""
    rival = find(case.op, name)
    try:
        return rival.make(case, inputs), None
    except ModuleNotFoundError as error:
        advice = f" (pip install {rival.package})" if rival.package else ""
        return None, f"absent: {error}{advice}"
    except ImportError as error:
        return None, f"absent: {error}"
    except Unsupported as error:
        return None, str(error)
    except Exception as error:  # a peer that fails while it is imported shall not hide the others
        return None, reason_of(error)


def reason_of(error) -> str:
    """An exception in one line."""
    if host_memory.refused(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def versions(ops) -> dict:
    """``{package: version}`` of what is installed of the rivals of these operations."""
    found = {}
    for package in sorted({r.package for op in ops for r in RIVALS[op].values() if r.package}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
