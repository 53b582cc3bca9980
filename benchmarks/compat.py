"""Every drop-in against its original: forward and backward, float32, both in turn in one process; medians.

    python benchmarks/compat.py [--json FILE] [--rounds N] [--only TEXT] [--memory]

Needs the environment of ``make interop``, which has the originals. Of the originals that no package index has
(SupContrast, SimCSE) the formula is written out here as eagerly as they write it; such rows say so. A row whose two
values differ by more than 2e-5 is an error, and not measured. ``--memory`` adds the highest resident memory that one
forward and backward adds to its inputs.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from selfsup_kernels import compat
from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import results, timing

BATCH, DIM = 2048, 128
FORMULA = "formula"


class Case(NamedTuple):
    """``make()`` gives (inputs, ours, original); the inputs that require a gradient get one."""

    name: str
    package: str
    make: callable
    batch: int = BATCH
    target: float = 3.0


def embeddings(count=2, batch=BATCH, normalize=False):
    """Views of the same samples, leaves."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, DIM, generator=generator)
    views = [base + 0.8 * torch.randn(batch, DIM, generator=generator) for _ in range(count)]
    return [(F.normalize(x, dim=-1) if normalize else x).requires_grad_() for x in views]


def labels(batch, classes):
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- what is compared


def lightly(name, *args):
    def make():
        originals = importlib.import_module("lightly.loss")
        return embeddings(), getattr(compat.lightly, name)(*args), getattr(originals, name)(*args)

    return make


def lightly_memory_bank():
    from lightly.loss import NTXentLoss

    made = []
    for module in (compat.lightly.NTXentLoss, NTXentLoss):
        torch.manual_seed(0)
        made.append(module(0.1, memory_bank_size=(16384, DIM)))
    query, key = embeddings()
    return [query, key.detach()], *made


def lightly_negative_cosine(batch):
    def make():
        from lightly.loss import NegativeCosineSimilarity

        prediction, target = embeddings(batch=batch)
        return [prediction, target.detach()], compat.lightly.NegativeCosineSimilarity(), NegativeCosineSimilarity()

    return make


def lightly_update_momentum():
    from lightly.models.utils import update_momentum
    from torchvision.models import resnet50

    model, target, target_ = resnet50(), resnet50(), resnet50()
    target_.load_state_dict(target.state_dict())
    return (
        [],
        lambda: compat.lightly.update_momentum(model, target, 0.99),
        lambda: update_momentum(model, target_, 0.99),
    )


def metric_learning(name, batch, classes):
    def make():
        losses = importlib.import_module("pytorch_metric_learning.losses")
        inputs = [embeddings(1, batch)[0], labels(batch, classes)]
        return inputs, getattr(compat.pytorch_metric_learning, name)(0.1), getattr(losses, name)(0.1)

    return make


def open_clip():
    from open_clip.loss import ClipLoss

    scale = torch.tensor(1 / 0.07, requires_grad=True)
    return [*embeddings(normalize=True), scale], compat.open_clip.ClipLoss(), ClipLoss()


def _solo(name):
    """One file of the package, whose own __init__ imports pl_bolts, which new versions of Lightning have broken."""
    folder = Path(importlib.util.find_spec("solo").origin).parent
    spec = importlib.util.spec_from_file_location(f"solo_{name}", folder / "losses" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solo_simclr():
    return embeddings(), compat.solo.simclr_loss_func, _solo("simclr").simclr_loss_func


def solo_byol():
    prediction, target = embeddings()
    return [prediction, target.detach()], compat.solo.byol_loss_func, _solo("byol").byol_loss_func


def solo_mocov3():
    def formula(query, key):
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return 2 * 0.2 * F.cross_entropy(query @ key.T / 0.2, torch.arange(len(query)))

    query, key = embeddings()
    return [query, key.detach()], compat.solo.mocov3_loss_func, formula


class Embedding(nn.Module):
    """In the place of a sentence encoder: hands on what it is given."""

    def forward(self, features):
        return features


def sentence_transformers(count):
    def make():
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Original

        def call(criterion):
            # compute_loss_from_embeddings is what the original's forward calls once the encoder has run
            direct = getattr(criterion, "compute_loss_from_embeddings", None)
            if direct is not None:
                return lambda *columns: direct(list(columns), None)
            return lambda *columns: criterion([{"sentence_embedding": x} for x in columns], None)

        ours = compat.sentence_transformers.MultipleNegativesRankingLoss(Embedding())
        return embeddings(count), call(ours), call(Original(Embedding()))

    return make


def simcse():
    def formula(z1, z2):
        scores = F.cosine_similarity(z1[:, None], z2[None], dim=-1) / 0.05
        return F.cross_entropy(scores, torch.arange(len(z1)))

    return embeddings(batch=512), compat.simcse.unsupervised_loss, formula


def supcontrast(classes):
    criterion = compat.supcontrast.SupConLoss()

    def formula(features, labels=None):
        """The steps of the repository's losses.py: masks of V B x V B numbers, a softmax, means over the positives."""
        rows, count = torch.cat(features.unbind(1)), features.shape[1]
        same = torch.eye(len(features)) if labels is None else (labels[:, None] == labels[None]).float()
        others = 1 - torch.eye(len(rows))
        positive = same.repeat(count, count) * others
        scores = rows @ rows.T / 0.07
        scores = scores - scores.max(1, keepdim=True).values.detach()
        log_prob = scores - (scores.exp() * others).sum(1, keepdim=True).log()
        return -((positive * log_prob).sum(1) / positive.sum(1)).mean()

    def make():
        features = torch.stack([x.detach() for x in embeddings(normalize=True)], 1).requires_grad_()
        return [features, *([labels(BATCH, classes)] if classes else [])], criterion, formula

    return make


CASES = [
    Case("lightly NTXentLoss", "lightly", lightly("NTXentLoss", 0.1)),
    Case("lightly NTXentLoss, bank of 16384", "lightly", lightly_memory_bank),
    Case("lightly DCLLoss", "lightly", lightly("DCLLoss", 0.1)),
    Case("lightly DCLWLoss", "lightly", lightly("DCLWLoss", 0.1)),
    Case("lightly NegativeCosineSimilarity", "lightly", lightly_negative_cosine(BATCH)),
    Case("lightly NegativeCosineSimilarity", "lightly", lightly_negative_cosine(16 * BATCH), 16 * BATCH),
    Case("lightly update_momentum, ResNet-50", "lightly", lightly_update_momentum, 0),
    Case(
        "pytorch-metric-learning NTXentLoss, pairs",
        "pytorch-metric-learning",
        metric_learning("NTXentLoss", 512, 256),
        512,
        100.0,
    ),
    Case(
        "pytorch-metric-learning SupConLoss, 100 classes",
        "pytorch-metric-learning",
        metric_learning("SupConLoss", BATCH, 100),
    ),
    Case("open_clip ClipLoss", "open_clip_torch", open_clip),
    Case("SupContrast SupConLoss", FORMULA, supcontrast(None)),
    Case("SupContrast SupConLoss, 100 classes", FORMULA, supcontrast(100)),
    Case("solo-learn simclr_loss_func", "solo-learn", solo_simclr),
    Case("solo-learn byol_loss_func", "solo-learn", solo_byol),
    Case("solo-learn mocov3_loss_func", FORMULA, solo_mocov3),
    Case("sentence-transformers MNRL", "sentence-transformers", sentence_transformers(2)),
    Case("sentence-transformers MNRL, hard negatives", "sentence-transformers", sentence_transformers(3)),
    Case("SimCSE, unsupervised", FORMULA, simcse, 512),
]


# ---------------------------------------------------------------- measuring


def step(function, inputs):
    for x in inputs:
        x.grad = None
    loss = function(*inputs)
    if loss is not None:
        loss.backward()
    return loss


def measure(case, rounds, with_memory):
    inputs, ours, original = case.make()
    calls = {"selfsup_kernels": lambda: step(ours, inputs), "original": lambda: step(original, inputs)}
    values = {name: call() for name, call in calls.items()}
    if inputs:
        got, want = (float(v.detach()) for v in values.values())
        if not abs(got - want) <= 2e-5 * max(abs(want), 1):
            sys.exit(f"{case.name}: {got} is not the original's {want}")
    values.clear()
    times = timing.interleave(calls, rounds(timing.interleave(calls, 1)))
    version = FORMULA if case.package == FORMULA else importlib.metadata.version(case.package)
    row = {"name": case.name, "package": case.package, "version": version, "batch": case.batch, "dim": DIM}
    row |= {"target": case.target, "times": times}
    if with_memory:
        row["peak_bytes"] = {name: peak_bytes(call) for name, call in calls.items()}
    return row


def peak_bytes(call):
    """The highest resident memory that ``call`` adds; None where that is not known."""
    host_memory.trim()  # freed memory that the allocator keeps would hide what is taken anew
    return host_memory.peak_growth(call)


def megabytes(size):
    return "-" if size is None else f"{size / 1e6:.0f} MB"


def ratio(row):
    return row["times"]["original"]["p50_ms"] / row["times"]["selfsup_kernels"]["p50_ms"]


def show(rows):
    table = Table(title=f"Drop-ins, forward + backward, float32, D = {DIM}; medians")
    for name in ("drop-in", "version", "B", "ours", "original", "factor", "target", "memory: ours", "original"):
        table.add_column(name, justify="left" if name == "drop-in" else "right")
    for row in rows:
        ours, original = (row["times"][n]["p50_ms"] for n in ("selfsup_kernels", "original"))
        factor = f"{ratio(row):.1f}x"
        good = ratio(row) >= row["target"]
        table.add_row(
            row["name"],
            row["version"],
            str(row["batch"] or "-"),
            f"{ours:.2f} ms",
            f"{original:.2f} ms",
            factor if good else f"[bold red]{factor}",
            f"{row['target']:g}x",
            *[megabytes(row.get("peak_bytes", {}).get(name)) for name in ("selfsup_kernels", "original")],
        )
    Console(width=150).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--rounds", type=int, help="default: what fits into 3 s a case, 5 to 200")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    def rounds(once):
        total = sum(times["p50_ms"] for times in once.values())
        return args.rounds or int(min(200, max(5, 3000 / total)))

    rows = []
    for case in CASES:
        if args.only.lower() in case.name.lower():
            rows.append(measure(case, rounds, args.memory))
            print(f"{case.name}: {ratio(rows[-1]):.1f}x", file=sys.stderr, flush=True)
    show(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"header": results.header(timing.Clock("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
