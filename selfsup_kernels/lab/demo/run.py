"""Run the demo from beginning to end: train, check, evaluate, measure."""

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
PATIENCE = 60
"""Seconds that one size of the sweep may take."""
QUICK = {"contrastive": {"steps": 12, "batch": 64}, "byol": {"steps": 16, "batch": 64}}
TITLES = {"contrastive": "Contrastive", "byol": "BYOL"}


def run(seed=0, quick=False) -> dict:
    """Return ``summary``, which ``summary.json`` holds, and the ``losses`` of all steps for the pictures."""
    begin = time.monotonic()
    digits = data.load_digits()
    recipes = {name: r._replace(**(QUICK[name] if quick else {})) for name, r in train.RECIPES.items()}
    runs, agreements = {}, {}
    with Progress() as progress:
        for name, recipe in recipes.items():
            for loss in train.LOSSES:
                progress.stage(f"Train {TITLES[name]}, {loss}", recipe.steps)
                check_every = CHECK_EVERY if loss == "ours" else 0
                runs[name, loss] = train.train(
                    name, loss, digits.train, recipe, seed, check_every=check_every, on_step=progress.advance
                )
            checks = runs[name, "ours"].checks
            agreements[name] = {"checks": checks, "holds": train.agrees(checks)}
        named = {f"{TITLES[name]}, {loss}": done for (name, loss), done in runs.items()}
        encoders = {"raw pixels": nn.Flatten(), **{title: done.method.encoder for title, done in named.items()}}
        progress.stage("Linear probe, nearest neighbours", len(encoders))
        accuracy = {}
        with threadpool_limits(1):  # scikit-learn's many short parallel loops are slower on a shared machine
            for title, encoder in encoders.items():
                accuracy[title] = evaluate.accuracies(digits, encoder, seed, 2 if quick else evaluate.DRAWS)
                progress.advance(title)
        sizes = QUICK_SIZES if quick else SIZES
        progress.stage("Batch-size sweep", len(sizes) * 2)
        rows = sweep(sizes, progress.advance)

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
        "accuracy": accuracy,
        "step_seconds": {title: done.times for title, done in named.items()},
        "step_peak_bytes": {title: done.peak_bytes for title, done in named.items()},
        "sweep": {"views": VIEWS, "dim": DIM, "temperature": workloads.TEMPERATURE, "cases": rows},
    }
    losses = {name: {loss: runs[name, loss].losses for loss in train.LOSSES} for name in recipes}
    return {"summary": summary, "losses": losses}


def sweep(sizes, advance=lambda text: None) -> list[dict]:
    """Measure the contrastive loss alone, as ``bench`` probes it: each size and loss in a fresh process.

    Returns:
        A row per batch size: seconds, peak bytes, and why a loss was left out.
    """
    rows = []
    for batch in sizes:
        row = {"batch": batch, "rows": batch * VIEWS, "seconds": {}, "peak_bytes": {}, "left_out": {}}
        parameters = workloads.case("info_nce", views=VIEWS, batch=batch, dim=DIM).facts
        for loss, column in COLUMNS.items():
            advance(f"batch {batch}: {loss}")
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
        rows.append(row)
    return rows
