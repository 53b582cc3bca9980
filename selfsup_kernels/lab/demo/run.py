"""Run the demo from beginning to end: measure, train, check, evaluate."""

import subprocess
import time

from threadpoolctl import threadpool_limits
from torch import nn

from selfsup_kernels.core import info
from selfsup_kernels.lab import fresh, host_memory
from selfsup_kernels.lab.bench import baselines, workloads
from selfsup_kernels.lab.demo import data, evaluate, train
from selfsup_kernels.lab.pages.progress import Progress

CHECK_EVERY = 10
VIEWS, DIM = 4, 128
SIZES, QUICK_SIZES = (256, 512, 1024, 2048, 4096), (64, 128)
COLUMNS = {"eager": "eager", "ours": baselines.OURS}
PATIENCE = 120
"""Seconds that one loss may take at one size of the sweep."""
QUICK = {"contrastive": {"steps": 12, "batch": 64}, "byol": {"steps": 16, "batch": 64}}
TITLES = {"contrastive": "Contrastive", "byol": "BYOL"}
SECONDS = {"sweep": (75, 25), "contrastive": (40, 5), "byol": (50, 5), "evaluate": (5, 2)}
"""Seconds of each stage on two cores (AMD EPYC, AVX2), and in a quick run."""


def seconds(quick) -> int:
    """Return about how long the demo takes on two cores."""
    sweep, contrastive, byol, evaluate = (of[quick] for of in SECONDS.values())
    return sweep + 2 * contrastive + 2 * byol + evaluate


def run(seed=0, quick=False, on_sweep=lambda rows: None) -> dict:
    """Return ``summary``, which ``summary.json`` holds, and the ``losses`` of all steps for the pictures.

    ``on_sweep`` is called with the rows of the sweep that there are, and returns a line to print or None.
    """
    begin = time.monotonic()
    digits = data.load_digits()
    recipes = {name: r._replace(**(QUICK[name] if quick else {})) for name, r in train.RECIPES.items()}
    runs, agreements = {}, {}
    with Progress(stages=6) as progress:
        sizes = QUICK_SIZES if quick else SIZES
        progress.stage("The loss alone, by batch size", len(sizes) * 2, SECONDS["sweep"][quick])
        rows = []
        for batch in sizes:
            rows.append(measure(batch, progress.advance))
            if line := on_sweep(rows):
                progress.say(line)
        for name, recipe in recipes.items():
            for loss in train.LOSSES:
                progress.stage(f"Train {TITLES[name]}, {loss}", recipe.steps, SECONDS[name][quick])
                check_every = CHECK_EVERY if loss == "ours" else 0
                runs[name, loss] = train.train(
                    name, loss, digits.train, recipe, seed, check_every=check_every, on_step=progress.advance
                )
            checks = runs[name, "ours"].checks
            agreements[name] = {"checks": checks, "holds": train.agrees(checks)}
        named = {f"{TITLES[name]}, {loss}": done for (name, loss), done in runs.items()}
        encoders = {"raw pixels": nn.Flatten(), **{title: done.method.encoder for title, done in named.items()}}
        progress.stage("Evaluate the features", len(encoders), SECONDS["evaluate"][quick])
        recognized = {}
        with threadpool_limits(1):  # scikit-learn's many short parallel loops are slower on a shared machine
            for title, encoder in encoders.items():
                recognized[title] = evaluate.recognized(digits, encoder, seed, 2 if quick else evaluate.DRAWS)
                progress.advance(title)
    comparisons = len(recipes) * len(evaluate.CASES)
    differences = {
        title: evaluate.differences(recognized[f"{title}, ours"], recognized[f"{title}, eager"], comparisons)
        for title in TITLES.values()
    }

    facts = info.collect()
    summary = {
        "quick": quick,
        "seed": seed,
        "seconds": time.monotonic() - begin,
        "device": {"cpu": facts["cpu"], "torch": facts["torch"], "python": facts["python"]},
        "version": facts["selfsup_kernels"],
        "auto": facts["auto"],
        "build": facts["implementations"]["cpu"].get("command"),
        "cpu_capability": facts["extension"].get("cpu_capability"),
        "data": {"train": len(digits.train), "test": len(digits.test)},
        "recipes": {name: recipe._asdict() for name, recipe in recipes.items()},
        "agreement": agreements,
        "accuracy": {title: {k: float(v.mean()) for k, v in of.items()} for title, of in recognized.items()},
        "ours_minus_eager": differences,
        "step_seconds": {title: done.times for title, done in named.items()},
        "sweep": {"views": VIEWS, "dim": DIM, "temperature": workloads.TEMPERATURE, "cases": rows},
    }
    losses = {name: {loss: runs[name, loss].losses for loss in train.LOSSES} for name in recipes}
    return {"summary": summary, "losses": losses}


def measure(batch, advance=lambda text: None) -> dict:
    """Measure the contrastive loss alone, as ``bench`` probes it: each loss in a fresh process.

    Returns:
        A row of the sweep: seconds, peak bytes, and why a loss was left out.
    """
    row = {"batch": batch, "rows": batch * VIEWS, "seconds": {}, "peak_bytes": {}, "left_out": {}}
    parameters = workloads.case("info_nce", views=VIEWS, batch=batch, dim=DIM).facts
    for loss, column in COLUMNS.items():
        options = {"memory_limit": host_memory.available(), "timeout": PATIENCE}
        try:
            found = fresh.call("selfsup_kernels.lab.bench.suite:probe", parameters, column, **options)
            if "reason" in found:
                row["left_out"][loss] = found["reason"]
            else:
                row["peak_bytes"][loss], row["seconds"][loss] = found["peak_bytes"], found["seconds"]
        except fresh.OutOfMemory:
            row["left_out"][loss] = "memory"
        except subprocess.TimeoutExpired:
            row["left_out"][loss] = "time"
        advance(f"batch {batch}: {loss}")
    return row
