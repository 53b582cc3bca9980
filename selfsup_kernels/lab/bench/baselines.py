"""Adapt what others call for the same work: each baseline becomes a function of the workload's inputs.

The baselines of ``info_nce`` work on the same M x M problem (M = V B rows) as ours. What fused linear cross-entropies
cannot do is leave a row's similarity with itself out of its softmax: their losses differ from NT-Xent by that term, not
in their work.
"""

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from selfsup_kernels.core import backends
from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import eager
from selfsup_kernels.lab.bench.workloads import MOMENTUM, TEMPERATURE

OURS = "selfsup_kernels"
OTHER_LOSS = "another objective: its loss keeps each row's similarity with itself"
FILTERED = OTHER_LOSS + "; by default its gradient leaves out blocks in which no probability reaches eps / 32"


class Unsupported(Exception):
    """A baseline cannot do the case; the message says why."""


class Baseline(NamedTuple):
    make: Callable  # make(case, inputs) returns a function of the inputs
    package: str | None = None  # what has to be installed, as the package index calls it
    note: str | None = None
    other: bool = False  # computes something else, so that its error against float64 means nothing
    compiles: bool = False  # the first call of each part compiles for this shape
    waits: bool = False  # copies from the GPU to the host, which a CUDA graph cannot capture


class Average:
    """A baseline's update of averages that it holds itself: the tensors in ``copies``."""

    def __init__(self, update, copies):
        self.update, self.copies = update, copies

    def __call__(self, targets, sources):
        self.update()


def _two_views(case):
    if case.views != 2:
        raise Unsupported(f"takes two views, not {case.views}")


def _linear_cross_entropy(load, case, inputs):
    """Adapt a fused linear cross-entropy: ``load()`` returns a function of scaled rows, all rows and targets."""
    _two_views(case)
    cross_entropy = load()

    def loss(views):
        z = F.normalize(views.reshape(-1, views.shape[-1]), dim=-1)
        return cross_entropy(z / TEMPERATURE, z, torch.arange(len(z), device=z.device).roll(len(z) // 2))

    return loss


def _inf_cl():
    from inf_cl import cal_inf_loss

    return lambda scaled, z, target: cal_inf_loss(scaled, z, labels=target, head_dim=min(256, z.shape[1]))


def _cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return lambda scaled, z, target: criterion(z, scaled, target)


def _lightly_info_nce(name, case, inputs):
    _two_views(case)
    criterion = getattr(importlib.import_module("lightly.loss"), name)(temperature=TEMPERATURE)
    return lambda views: criterion(views[0], views[1])


def _metric_learning(name, case, inputs):
    """Give all embeddings in one list with labels: those of one sample share a label."""
    if name == "NTXentLoss" and case.objective != "per_positive":
        _two_views(case)  # with more views its objective is per_positive
    from pytorch_metric_learning import losses

    criterion = getattr(losses, name)(temperature=TEMPERATURE)
    labels = torch.arange(case.batch, device=inputs[0].device).repeat(case.views)
    return lambda views: criterion(views.reshape(-1, views.shape[-1]), labels)


def _lightly_byol(case, inputs):
    from lightly.loss import NegativeCosineSimilarity

    criterion, pairs = NegativeCosineSimilarity(), list(itertools.permutations(range(case.views), 2))
    if case.views == 1:
        return lambda predictions, targets: 2 + 2 * criterion(predictions, targets)
    return lambda p, t: 2 + 2 * torch.stack([criterion(p[u], t[v]) for u, v in pairs]).mean()


def _open_clip_clip(case, inputs):
    _two_views(case)
    from open_clip.loss import ClipLoss

    criterion = ClipLoss()
    return lambda views: criterion(*F.normalize(views, dim=-1), 1 / TEMPERATURE)


def _open_clip_siglip(case, inputs):
    from open_clip.loss import SigLipLoss

    criterion = SigLipLoss()
    return lambda x, y, scale, bias: criterion(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, bias)


def loop_of_lerp(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source if source.dtype == target.dtype else source.float(), 1 - MOMENTUM)


def _foreach_lerp(case, inputs):
    if case.dtype != "float32":
        raise Unsupported("refuses mixed dtypes")
    return lambda targets, sources: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def _average(make, case, inputs):
    """Set a baseline's own average to the workload's targets; ``make(model)`` returns its update and the average."""
    targets, sources = inputs
    model = torch.nn.ParameterList([torch.nn.Parameter(x.detach().clone()) for x in sources])
    update, module = make(model)
    copies = list(module.to(targets[0].dtype).parameters())
    with torch.no_grad():
        torch._foreach_copy_(copies, targets)
    return Average(update, copies)


def _timm(model):
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(model, decay=MOMENTUM)
    return lambda: average.update(model), average.module


def _lightly_ema(model):
    from lightly.models.utils import update_momentum

    average = copy.deepcopy(model)
    return lambda: update_momentum(model, average, MOMENTUM), average


def _swa_utils(model):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    if any(x.dtype != torch.float32 for x in model):
        raise Unsupported("refuses mixed dtypes")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
    average.update_parameters(model)  # the first one copies
    return lambda: average.update_parameters(model), average.module


def _compile(function):
    torch._dynamo.reset()  # what other shapes left would count against the limit of recompilations
    return torch.compile(function, dynamic=False)


def _plain(function, note=None):
    return Baseline(lambda case, inputs: function, note=note)


def _compiled(function, note=None):
    return Baseline(lambda case, inputs: _compile(function), note=note, compiles=True)


def _linear(load, package, note=OTHER_LOSS):
    return Baseline(functools.partial(_linear_cross_entropy, load), package, note, other=True)


def _averaged(make, package, note):
    return Baseline(functools.partial(_average, make), package, note)


def _eager(objective, note=None):
    """Return the two baselines that every objective has."""

    def loss(views):
        return eager.OBJECTIVES[objective](views, TEMPERATURE)

    return {"eager": _plain(loss, note), "compile": _compiled(loss)}


PML = "pytorch-metric-learning"
LIGHTLY_NTXENT, LIGHTLY_DCL = (
    Baseline(functools.partial(_lightly_info_nce, name), "lightly", name) for name in ("NTXentLoss", "DCLLoss")
)
BASELINES = {
    "info_nce": {
        **_eager("supcon_out"),
        "chunked": _plain(lambda views: eager.chunked_loss(views, TEMPERATURE)),
        "lightly": LIGHTLY_NTXENT,
        PML: Baseline(functools.partial(_metric_learning, "SupConLoss"), PML, "SupConLoss"),
        f"{PML} NTXentLoss": Baseline(functools.partial(_metric_learning, "NTXentLoss"), PML),
        "Inf-CL": _linear(_inf_cl, "inf-cl"),
        "cut-cross-entropy": _linear(_cut_cross_entropy, "cut-cross-entropy", FILTERED),
        "Liger": _linear(_liger, "liger-kernel"),
    },
    "siglip": {
        "eager": _plain(eager.siglip_loss, "as open_clip writes it"),
        "compile": _compiled(eager.siglip_loss),
        "softplus": _plain(eager.softplus_loss, "in the fewest passes; inexact for small losses of positives"),
        "open_clip": Baseline(_open_clip_siglip, "open_clip_torch", "SigLipLoss"),
    },
    "byol": {
        "eager": _plain(eager.byol_loss),
        "compile": _compiled(eager.byol_loss),
        "lightly": Baseline(_lightly_byol, "lightly", "NegativeCosineSimilarity, scaled"),
    },
    "ema": {
        "foreach_lerp": Baseline(_foreach_lerp),
        "loop": _plain(loop_of_lerp, note="target.lerp_(source.float()), tensor by tensor"),
        "compile": _compiled(loop_of_lerp, note="of the loop"),
        "lightly": _averaged(_lightly_ema, "lightly", "update_momentum"),
        "timm": _averaged(_timm, "timm", "ModelEmaV3"),
        "swa_utils": _averaged(_swa_utils, None, "AveragedModel, get_ema_multi_avg_fn")._replace(waits=True),
    },
}
"""The baselines of each operation, by the name that results and ``--vs`` use; of InfoNCE those of ``supcon_out``."""

OTHER_OBJECTIVES = {
    "supcon_in": _eager("supcon_in"),
    "per_positive": {
        **_eager("per_positive"),
        PML: Baseline(functools.partial(_metric_learning, "NTXentLoss"), PML, "NTXentLoss"),
    },
    "pairwise": _eager("pairwise", "NT-Xent of each pair of views"),
    "cross_view": {
        **_eager("cross_view", "two cross-entropies over one matrix of logits"),
        "open_clip": Baseline(_open_clip_clip, "open_clip_torch", "ClipLoss"),
    },
    "decoupled": {**_eager("decoupled"), "lightly": LIGHTLY_DCL},
}
"""The baselines of InfoNCE's other objectives."""

EAGER_EMA = ("foreach_lerp", "loop")
"""The two ways to write the moving average that ``--vs eager`` means."""


def of(case) -> dict:
    """Return the baselines of a workload."""
    return OTHER_OBJECTIVES.get(getattr(case, "objective", None), BASELINES[case.op])


def named(case, word):
    """Return the baselines that a word of ``--vs`` means: one, several of one package, or "all"."""
    if case.op == "ema" and word == "eager":
        return list(EAGER_EMA)
    return [name for name in of(case) if word == "all" or f"{name.lower()} ".startswith(f"{word} ")]


def impl_name(impl):
    """Return the column of one implementation of ours."""
    return OURS if impl == "auto" else f"impl='{impl}'"


def impl_of(name):
    """Return the implementation of a column of ours, or None for a baseline's column."""
    return "auto" if name == OURS else name[6:-1] if name.startswith("impl='") else None


def find(case, name) -> Baseline:
    """Return the baseline of a column; a name ``MODULE:CALLABLE`` is a user's own function of the inputs."""
    if impl_of(name):
        return Baseline(functools.partial(_ours, impl_of(name)))
    if name in of(case):
        return of(case)[name]
    module, _, attribute = name.partition(":")
    return Baseline(lambda case, inputs: getattr(importlib.import_module(module), attribute))


def _ours(impl, case, inputs):
    first = inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0]
    kernels = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}.get(impl)
    if kernels and first.device.type != kernels:
        raise Unsupported(f"takes {kernels.upper()} tensors, these are on the {first.device.type.upper()}")
    if impl != "auto" and backends.unavailable(impl):
        raise Unsupported(str(backends.unavailable(impl)))
    return case.ours(impl)


def load(case, name, inputs):
    """Return ``(function of the inputs, None)``, or ``(None, why there is none)``."""
    baseline = find(case, name)
    try:
        return baseline.make(case, inputs), None
    except ImportError as error:
        advice = (
            f" (pip install {baseline.package})" if isinstance(error, ModuleNotFoundError) and baseline.package else ""
        )
        return None, f"absent: {error}{advice}"
    except Exception as error:  # a baseline that fails while it is imported does not hide the others
        return None, reason_of(error)


def reason_of(error) -> str:
    """Return an exception in one line."""
    if host_memory.refused(error):
        return "out of memory"
    if isinstance(error, Unsupported):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def version(package):
    """Return the version of a package, None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
