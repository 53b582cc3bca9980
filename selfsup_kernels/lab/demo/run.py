"""The demo from beginning to end: train, check, evaluate, measure. Returns plain numbers and a few arrays."""

import dataclasses
import time

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from selfsup_kernels import info
from selfsup_kernels.lab.demo import agreement, data, evaluate, sweep, train
from selfsup_kernels.lab.pages.progress import Progress

FLOAT64_STEPS = 10
CHECK_EVERY = 10
SWEEP_SECONDS = 75
QUICK = {"contrastive": {"steps": 12, "batch": 64}, "byol": {"steps": 16, "batch": 64}}
TITLES = {"contrastive": "Contrastive", "byol": "BYOL"}
PIXELS, RANDOM = "raw pixels", "random encoder"


def run(seed=0, quick=False) -> dict:
    """``summary``, which ``summary.json`` holds, and loss curves and example views for the pictures."""
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
            agreements[name] = _agreement(name, digits, recipe, runs, seed, 2 if quick else FLOAT64_STEPS)
        named = {f"{TITLES[name]}, {loss}": done for (name, loss), done in runs.items()}
        features = {PIXELS: evaluate.pixels, RANDOM: evaluate.frozen(_random_encoder(digits, seed))}
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
    return {"summary": summary, "losses": losses, "views": _example_views(digits, seed)}


def _agreement(name, digits, recipe, runs, seed, steps) -> dict:
    """The checks of our run, both runs' curves, and their first steps in float64, whose rounding cannot be seen."""
    exact = [
        train.train(name, loss, digits.train, recipe, seed, dtype=torch.float64, stop=steps).losses
        for loss in ("ours", "eager")
    ]
    checks, float64 = runs[name, "ours"].checks, agreement.compare_curves(*exact)
    return {
        "checks": checks,
        "float32_curves": agreement.compare_curves(runs[name, "ours"].losses, runs[name, "eager"].losses),
        "float64_curves": float64,
        "holds": agreement.holds(checks, float64),
    }


def _random_encoder(digits, seed):
    """Untrained weights; BatchNorm has seen the training digits, so that the features are well scaled."""
    torch.manual_seed(seed)
    random = train.encoder()
    with torch.no_grad():
        for _ in range(30):
            random(digits.train[torch.randperm(len(digits.train))[:256]])
    return random


def _example_views(digits, seed):
    rows = [int(np.flatnonzero(digits.train_labels.numpy() == c)[0]) for c in (0, 2, 3, 4, 7, 8)]
    generator = torch.Generator().manual_seed(seed)
    images = digits.train[rows]
    return [images.numpy(), *(data.augment(images, generator).numpy() for _ in range(4))]
