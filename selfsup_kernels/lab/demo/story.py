"""The demo from beginning to end: train, check, evaluate, measure. Returns plain numbers and a few arrays."""

import dataclasses
import time

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from selfsup_kernels.core import info
from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.demo import agreement, data, evaluate, networks, sweep, train
from selfsup_kernels.lab.pages.progress import Progress

BEGINNING = 10
"""Steps over which the float32 curves are also compared by themselves, and for which both run in float64."""
CHECK_EVERY = 10
SWEEP_SECONDS = 75
QUICK = {"contrastive": {"steps": 12, "batch": 64}, "byol": {"steps": 16, "batch": 64}}

NAMES = {
    ("contrastive", "eager"): "Contrastive, eager",
    ("contrastive", "ours"): "Contrastive, ours",
    ("byol", "eager"): "BYOL, eager",
    ("byol", "ours"): "BYOL, ours",
}
PIXELS, MOVED_PIXELS, RANDOM = "raw pixels", "raw pixels + moved copies", "random encoder"


def run(seed=0, quick=False) -> dict:
    begin = time.monotonic()
    digits = data.load_digits()
    recipes = {
        name: dataclasses.replace(recipe, **(QUICK[name] if quick else {})) for name, recipe in train.RECIPES.items()
    }
    with Progress() as progress:
        runs = _train(digits, recipes, seed, progress)
        control = _control(digits, recipes, seed, progress)
        float64 = _float64(digits, recipes, seed, 2 if quick else BEGINNING, progress)
        with threadpool_limits(1):  # scikit-learn's many short parallel loops are slower on a shared machine
            evaluation, points = _evaluate(digits, runs, seed, quick, progress)
        peaks = _step_memory(recipes, progress)
        sizes = sweep.QUICK_SIZES if quick else sweep.SIZES
        progress.stage("Batch-size sweep", len(sizes) * 3)
        rows = sweep.run(sizes, SWEEP_SECONDS, progress.advance)

    facts = info.collect()
    losses = {name: {loss: runs[name, loss].losses for loss in train.LOSSES} for name in recipes}
    return {
        "summary": {
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
            "agreement": _agreement(recipes, runs, control, losses, float64),
            "accuracy": {
                name: {"/".join(case): value for case, value in evaluation.accuracy(name).items()}
                for name in evaluation.correct
            },
            "verdicts": {
                name: {
                    other: {"/".join(case): evaluation.verdict(name, other, case) for case in evaluate.CASES}
                    for other in (PIXELS, MOVED_PIXELS, RANDOM)
                }
                for name in (NAMES["contrastive", "ours"], NAMES["byol", "ours"])
            },
            "step_seconds": {NAMES[key]: done.times for key, done in runs.items()},
            "step_peak_bytes": {NAMES[key]: peak for key, peak in peaks.items()},
            "sweep": {
                "views": sweep.VIEWS,
                "dim": sweep.DIM,
                "temperature": sweep.TEMPERATURE,
                "cases": rows,
            },
        },
        "losses": losses,
        "control": control,
        "views": _example_views(digits, seed),
        "points": points,
        "point_labels": digits.test_labels.numpy(),
    }


def _train(digits, recipes, seed, progress):
    runs = {}
    for name, recipe in recipes.items():
        for loss in train.LOSSES:
            progress.stage(f"Train {NAMES[name, loss]}", recipe.steps)
            runs[name, loss] = train.train(
                name,
                loss,
                digits.train,
                recipe,
                seed,
                check_every=CHECK_EVERY if loss == "ours" else 0,
                on_step=lambda value: progress.advance(f"loss {value:.4f}"),
            )
    return runs


def _control(digits, recipes, seed, progress):
    """Eager once more, from initial weights that differ in their last bit: how far rounding alone moves a run."""
    curves = {}
    for name, recipe in recipes.items():
        progress.stage(f"Control: {NAMES[name, 'eager']}, last bit changed", recipe.steps)
        curves[name] = train.train(
            name,
            "eager",
            digits.train,
            recipe,
            seed,
            nudge=True,
            on_step=lambda value: progress.advance(f"loss {value:.4f}"),
        ).losses
    return curves


def _float64(digits, recipes, seed, steps, progress):
    """The first steps of both runs once more, in an arithmetic whose rounding cannot be seen."""
    progress.stage("First steps in float64", len(recipes) * len(train.LOSSES) * steps)
    curves = {}
    for name, recipe in recipes.items():
        both = {
            loss: train.train(
                name,
                loss,
                digits.train,
                recipe,
                seed,
                dtype=torch.float64,
                stop=steps,
                on_step=lambda _: progress.advance(),
            ).losses
            for loss in train.LOSSES
        }
        curves[name] = agreement.compare_curves(both["ours"], both["eager"], steps)
    return curves


def _agreement(recipes, runs, control, losses, float64):
    found = {}
    for name in recipes:
        checks = runs[name, "ours"].checks
        found[name] = {
            "checks": checks,
            "float32_curves": agreement.compare_curves(losses[name]["ours"], losses[name]["eager"], BEGINNING),
            "control_curves": agreement.compare_curves(control[name], losses[name]["eager"], BEGINNING),
            "float64_curves": float64[name],
            "holds": agreement.holds(checks, float64[name]),
        }
    return found


def _evaluate(digits, runs, seed, quick, progress):
    random = _random_encoder(digits, seed)
    features = {PIXELS: evaluate.pixels, MOVED_PIXELS: evaluate.pixels, RANDOM: evaluate.frozen(random)}
    features |= {NAMES[key]: evaluate.frozen(done.method.encoder) for key, done in runs.items()}
    progress.stage("Linear probe, nearest neighbours", len(features))
    judged = evaluate.Evaluation(digits, seed, draws=2 if quick else evaluate.DRAWS)
    for name, function in features.items():
        judged.add(name, function, copies=evaluate.COPIES if name == MOVED_PIXELS else 0)
        progress.advance(name)

    shown = (PIXELS, RANDOM, NAMES["contrastive", "ours"], NAMES["byol", "ours"])
    progress.stage("Pictures of the features", len(shown))
    points = {}
    for name in shown:
        points[name] = _plane(features[name](judged.moved), quick)
        progress.advance(name)
    return judged, points


def _random_encoder(digits, seed):
    """Untrained weights; its BatchNorm has seen the training digits, so that its features are well scaled."""
    torch.manual_seed(seed)
    random = networks.encoder()
    with torch.no_grad():
        for _ in range(30):
            random(digits.train[torch.randperm(len(digits.train))[:256]])
    return random


def _plane(features, quick):
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    flat = PCA(2 if quick else 30, random_state=0).fit_transform(features)
    return flat if quick else TSNE(2, init="pca", metric="cosine", random_state=0).fit_transform(flat)


def _step_memory(recipes, progress):
    keys = [(name, loss) for name in recipes for loss in train.LOSSES]
    progress.stage("Memory of a training step", len(keys))
    peaks = {}
    for name, loss in keys:
        peaks[name, loss] = fresh.call("selfsup_kernels.lab.demo.train:peak_bytes", name, loss, recipes[name].batch)
        progress.advance(NAMES[name, loss])
    return peaks


def _example_views(digits, seed):
    rows = [int(np.flatnonzero(digits.train_labels.numpy() == c)[0]) for c in (0, 2, 3, 4, 7, 8)]
    images = digits.train[rows]
    generator = torch.Generator().manual_seed(seed)
    return images.numpy(), [data.augment(images, generator).numpy() for _ in range(4)]
