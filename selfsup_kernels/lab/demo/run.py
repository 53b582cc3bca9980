"""The demo from beginning to end: train, check, evaluate, measure. Returns plain numbers and a few arrays."""

import dataclasses
import time

from threadpoolctl import threadpool_limits

from selfsup_kernels.core import info
from selfsup_kernels.lab.demo import agreement, data, evaluate, sweep, train
from selfsup_kernels.lab.pages.progress import Progress

CHECK_EVERY = 10
SWEEP_SECONDS = 75
QUICK = {"contrastive": {"steps": 12, "batch": 64}, "byol": {"steps": 16, "batch": 64}}
TITLES = {"contrastive": "Contrastive", "byol": "BYOL"}


def run(seed=0, quick=False) -> dict:
    """``summary``, which ``summary.json`` holds, and the ``losses`` of all steps for the pictures."""
    begin = time.monotonic()
    digits = data.load_digits()
    recipes = {
        name: dataclasses.replace(recipe, **(QUICK[name] if quick else {})) for name, recipe in train.RECIPES.items()
    }
    runs, agreements = {}, {}
    with Progress() as progress:
        for name, recipe in recipes.items():
            for loss in train.LOSSES:
                progress.stage(f"Train {TITLES[name]}, {loss}", recipe.steps)
                runs[name, loss] = train.train(
                    name,
                    loss,
                    digits.train,
                    recipe,
                    seed,
                    check_every=CHECK_EVERY if loss == "ours" else 0,
                    on_step=lambda value: progress.advance(f"loss {value:.4f}"),
                )
            checks = runs[name, "ours"].checks
            agreements[name] = {"checks": checks, "holds": agreement.holds(checks)}
        named = {f"{TITLES[name]}, {loss}": done for (name, loss), done in runs.items()}
        features = {"raw pixels": evaluate.pixels}
        features |= {title: evaluate.frozen(done.method.encoder) for title, done in named.items()}
        progress.stage("Linear probe, nearest neighbours", len(features))
        accuracy = {}
        with threadpool_limits(1):  # scikit-learn's many short parallel loops are slower on a shared machine
            for title, function in features.items():
                accuracy[title] = evaluate.accuracies(digits, function, seed, 2 if quick else evaluate.DRAWS)
                progress.advance(title)
        sizes = sweep.QUICK_SIZES if quick else sweep.SIZES
        progress.stage("Batch-size sweep", len(sizes) * 2)
        rows = sweep.run(sizes, SWEEP_SECONDS, progress.advance)

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
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "agreement": agreements,
        "accuracy": accuracy,
        "step_seconds": {title: done.times for title, done in named.items()},
        "step_peak_bytes": {title: done.peak_bytes for title, done in named.items()},
        "sweep": {"views": sweep.VIEWS, "dim": sweep.DIM, "temperature": sweep.TEMPERATURE, "cases": rows},
    }
    losses = {name: {loss: runs[name, loss].losses for loss in train.LOSSES} for name in recipes}
    return {"summary": summary, "losses": losses}
