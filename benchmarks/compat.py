"""Measure every drop-in against its original: forward and backward, float32, both in turn in one process; medians.

    python benchmarks/compat.py [--json FILE] [--rounds N] [--only TEXT] [--memory]

Needs the environment of ``make interop``, which has the originals. Of the originals that no package index has
(SupContrast, SimCSE) the formula is written out here as eagerly as they write it; such rows say so. A row whose two
values differ by more than 2e-5 is an error, and not measured. ``--memory`` adds the highest resident memory that one
forward and backward adds to its inputs.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import runpy
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tables
import torch
import torch.nn.functional as F
from torch import nn

from selfsup_kernels import compat
from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import results, timing

BATCH, DIM = 2048, 128
FORMULA = "formula"


def embeddings(count=2, batch=BATCH, normalize=False):
    """Make views of the same samples, leaves."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, DIM, generator=generator)
    views = [base + 0.8 * torch.randn(batch, DIM, generator=generator) for _ in range(count)]
    return [(F.normalize(x, dim=-1) if normalize else x).requires_grad_() for x in views]


def one_sided(batch=BATCH):
    """Make a view with a gradient, and one without."""
    first, second = embeddings(batch=batch)
    return [first, second.detach()]


def labels(batch, classes):
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(1))


def lightly(name, *args, inputs=embeddings, **kwargs):
    made = []
    for module in (compat.lightly, import_module("lightly.loss")):
        torch.manual_seed(0)  # of a memory bank
        made.append(getattr(module, name)(*args, **kwargs))
    return inputs(), *made


def lightly_update_momentum():
    from torchvision.models import resnet50

    model, target, other = resnet50(), resnet50(), resnet50()
    other.load_state_dict(target.state_dict())
    original = import_module("lightly.models.utils").update_momentum
    return [], partial(compat.lightly.update_momentum, model, target, 0.99), partial(original, model, other, 0.99)


def metric_learning(name, batch, classes):
    modules = compat.pytorch_metric_learning, import_module("pytorch_metric_learning.losses")
    return [*embeddings(1, batch), labels(batch, classes)], *(getattr(module, name)(0.1) for module in modules)


def open_clip():
    modules = compat.open_clip, import_module("open_clip.loss")
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    return [*embeddings(normalize=True), scale], *(module.ClipLoss() for module in modules)


def open_clip_siglip():
    modules = compat.open_clip, import_module("open_clip.loss")
    scalars = (torch.tensor(value, requires_grad=True) for value in (10.0, -10.0))
    return [*embeddings(normalize=True), *scalars], *(module.SigLipLoss() for module in modules)


def solo(name, inputs):
    """Load one file of the package, whose own __init__ imports pl_bolts, which new versions of Lightning break."""
    path = Path(importlib.util.find_spec("solo").origin).parent / "losses" / f"{name}.py"
    function = f"{name}_loss_func"
    return inputs(), getattr(compat.solo, function), runpy.run_path(str(path))[function]


def solo_mocov3():
    def formula(query, key):
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return 2 * 0.2 * F.cross_entropy(query @ key.T / 0.2, torch.arange(len(query)))

    return one_sided(), compat.solo.mocov3_loss_func, formula


def sentence_transformers(count):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Original

    def call(kind):
        criterion = kind(nn.Identity())  # in the place of a sentence encoder
        # compute_loss_from_embeddings is what the original's forward calls once the encoder has run
        direct = getattr(criterion, "compute_loss_from_embeddings", None)
        if direct is not None:
            return lambda *columns: direct(list(columns), None)
        return lambda *columns: criterion([{"sentence_embedding": x} for x in columns], None)

    return embeddings(count), call(compat.sentence_transformers.MultipleNegativesRankingLoss), call(Original)


def simcse():
    def formula(z1, z2):
        scores = F.cosine_similarity(z1[:, None], z2[None], dim=-1) / 0.05
        return F.cross_entropy(scores, torch.arange(len(z1)))

    return embeddings(batch=512), compat.simcse.unsupervised_loss, formula


def supcontrast(classes=None):
    def formula(features, labels=None):
        """Take the steps of the repository's losses.py: masks of V B x V B numbers, a softmax, means over positives."""
        rows, count = torch.cat(features.unbind(1)), features.shape[1]
        same = torch.eye(len(features)) if labels is None else (labels[:, None] == labels[None]).float()
        others = 1 - torch.eye(len(rows))
        positive = same.repeat(count, count) * others
        scores = rows @ rows.T / 0.07
        scores = scores - scores.max(1, keepdim=True).values.detach()
        log_prob = scores - (scores.exp() * others).sum(1, keepdim=True).log()
        return -((positive * log_prob).sum(1) / positive.sum(1)).mean()

    features = torch.stack([x.detach() for x in embeddings(normalize=True)], 1).requires_grad_()
    return [features, *([labels(BATCH, classes)] if classes else [])], compat.supcontrast.SupConLoss(), formula


class Case(NamedTuple):
    """``make()`` gives (inputs, ours, original); the inputs that require a gradient get one."""

    name: str
    package: str
    make: callable
    batch: int = BATCH


COSINE, LARGE = "NegativeCosineSimilarity", 16 * BATCH
PML, SBERT = "pytorch-metric-learning", "sentence-transformers"
BANK = {"inputs": one_sided, "memory_bank_size": (16384, DIM)}
CASES = [
    Case("lightly NTXentLoss", "lightly", partial(lightly, "NTXentLoss", 0.1)),
    Case("lightly NTXentLoss, bank of 16384", "lightly", partial(lightly, "NTXentLoss", 0.1, **BANK)),
    Case("lightly DCLLoss", "lightly", partial(lightly, "DCLLoss", 0.1)),
    Case("lightly DCLWLoss", "lightly", partial(lightly, "DCLWLoss", 0.1)),
    Case(f"lightly {COSINE}", "lightly", partial(lightly, COSINE, inputs=one_sided)),
    Case(f"lightly {COSINE}", "lightly", partial(lightly, COSINE, inputs=partial(one_sided, LARGE)), LARGE),
    Case("lightly update_momentum, ResNet-50", "lightly", lightly_update_momentum, 0),
    Case(f"{PML} NTXentLoss, pairs", PML, partial(metric_learning, "NTXentLoss", 512, 256), 512),
    Case(f"{PML} SupConLoss, 100 classes", PML, partial(metric_learning, "SupConLoss", BATCH, 100)),
    Case("open_clip ClipLoss", "open_clip_torch", open_clip),
    Case("open_clip SigLipLoss", "open_clip_torch", open_clip_siglip),
    Case("SupContrast SupConLoss", FORMULA, supcontrast),
    Case("SupContrast SupConLoss, 100 classes", FORMULA, partial(supcontrast, 100)),
    Case("solo-learn simclr_loss_func", "solo-learn", partial(solo, "simclr", embeddings)),
    Case("solo-learn byol_loss_func", "solo-learn", partial(solo, "byol", one_sided)),
    Case("solo-learn mocov3_loss_func", FORMULA, solo_mocov3),
    Case(f"{SBERT} MNRL", SBERT, partial(sentence_transformers, 2)),
    Case(f"{SBERT} MNRL, hard negatives", SBERT, partial(sentence_transformers, 3)),
    Case("SimCSE, unsupervised", FORMULA, simcse, 512),
]


def step(function, inputs):
    for x in inputs:
        x.grad = None
    loss = function(*inputs)
    if loss is not None:
        loss.backward()
    return loss


def measure(case, rounds, with_memory):
    inputs, ours, original = case.make()
    calls = {"selfsup_kernels": partial(step, ours, inputs), "original": partial(step, original, inputs)}
    got, want = (call() for call in calls.values())
    if inputs and not abs(got - want) <= 2e-5 * max(abs(want), 1):
        sys.exit(f"{case.name}: {got.item()} is not the original's {want.item()}")
    del got, want
    row = {"name": case.name, "package": case.package, "batch": case.batch, "dim": DIM}
    row["version"] = FORMULA if case.package == FORMULA else importlib.metadata.version(case.package)
    turns = {name: (lambda: None, lambda _, call=call: call()) for name, call in calls.items()}
    row["times"] = timing.in_turns(turns, seconds=3.0, rounds=rounds)
    if with_memory:
        row["peak_bytes"] = {}
        for name, call in calls.items():
            host_memory.trim()  # freed memory that the allocator keeps would hide what is taken
            row["peak_bytes"][name] = host_memory.peak_growth(call)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--rounds", type=int, help="default: what fits into 3 s a case")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [case for case in CASES if args.only.lower() in case.name.lower()]
    rows = [measure(case, args.rounds, args.memory) for case in chosen]
    print(*tables.compat(rows), sep="\n")
    if args.json:
        results.write_json(args.json, results.header(timing.Clock("cpu")), rows)


if __name__ == "__main__":
    main()
