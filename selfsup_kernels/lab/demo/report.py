"""The printed summary, the HTML report (one file, pictures inside) and ``summary.json``."""

import json
from pathlib import Path

from selfsup_kernels.core import info
from selfsup_kernels.lab import pages
from selfsup_kernels.lab.demo import agreement, evaluate, plots, story, train
from selfsup_kernels.lab.demo.findings import CASE_TITLES, case_title, findings, mib, small
from selfsup_kernels.lab.pages import figures


def write(results, out, figure=None) -> Path:
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    summary = results["summary"]
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    if figure is not None:
        Path(figure).parent.mkdir(parents=True, exist_ok=True)
        plots.compact(results["losses"], summary["sweep"]["cases"], device(summary)).savefig(figure, dpi=144)

    console = pages.console()
    console.print()
    for table in tables(summary):
        console.print(table)
    for line in findings(summary):
        console.print(f"- {line}", highlight=False, soft_wrap=not console.is_terminal)
    console.print(f"\nReport: {page.resolve()}", soft_wrap=True, highlight=False)
    return page


def tables(summary):
    from rich.table import Table

    accuracy = Table(
        title=f"Accuracy on {summary['data']['test']} held-out digits, %: linear probe / nearest neighbours"
    )
    accuracy.add_column("features")
    for title in CASE_TITLES.values():
        accuracy.add_column(title, justify="right")
    for name, row in accuracy_rows(summary):
        accuracy.add_row(name, *(f"{linear} / {knn}" for linear, knn in row))
    yield accuracy

    steps = Table(title="Milliseconds per training step (median)")
    parts = list(plots.PARTS)
    for title in ("run", *(part.replace("ema", "EMA") for part in parts), "peak MiB"):
        steps.add_column(title, justify="left" if title == "run" else "right")
    for name, row in step_rows(summary):
        steps.add_row(name, *row)
    yield steps

    grid = Table(title=f"The contrastive loss alone, {summary['sweep']['views']} views, D = {summary['sweep']['dim']}")
    for title in ("batch", "eager ms", "ours ms", "speed-up", "eager MiB", "ours MiB"):
        grid.add_column(title, justify="right")
    for row in sweep_rows(summary):
        grid.add_row(*row)
    yield grid


def accuracy_rows(summary):
    for name, cases in summary["accuracy"].items():
        yield (
            name,
            [
                tuple(f"{100 * cases[f'{test}/{n}/{probe}']:.1f}" for probe in ("linear", "knn"))
                for test, n in CASE_TITLES
            ],
        )


def step_rows(summary):
    for name, times in summary["step_seconds"].items():
        peak = summary["step_peak_bytes"][name]
        cells = [f"{1e3 * times[part]:.2f}" if part in times else "-" for part in plots.PARTS]
        yield name, [*cells, mib(peak)]


def sweep_rows(summary):
    for case in summary["sweep"]["cases"]:
        cells = [str(case["batch"])]
        for loss in train.LOSSES:
            left_out = f"left out ({case['left_out'].get(loss)})"
            cells.append(f"{1e3 * case['seconds'][loss]:.1f}" if loss in case["seconds"] else left_out)
        seconds = case["seconds"]
        cells.append(f"{seconds['eager'] / seconds['ours']:.1f}x" if len(seconds) == 2 else "-")
        yield [*cells, *(mib(case["peak_bytes"].get(loss)) for loss in train.LOSSES)]


def device(summary) -> str:
    """What every number was measured on."""
    facts = summary["device"]
    kernels = f", kernels run as {summary['cpu_capability']}" if summary["cpu_capability"] else ""
    return f"{info.describe_cpu(facts['cpu'])}, torch {facts['torch']}{kernels}"


def render(results) -> str:
    summary = results["summary"]
    images, augmented = results["views"]
    names = list(summary["accuracy"])
    pictures = {
        "views": plots.views(images, augmented),
        "few": plots.accuracies(
            {n: summary["accuracy"][n]["clean/few/linear"] for n in names}, names, "Linear probe, 10 labels a class"
        ),
        "moved": plots.accuracies(
            {n: summary["accuracy"][n]["moved/all/knn"] for n in names},
            names,
            "Nearest neighbours, moved digits, all labels",
        ),
        "embedding": plots.embedding(results["points"], results["point_labels"]),
        "steps": plots.step_time(summary["step_seconds"]),
    }
    pictures |= {
        f"curves_{name}": plots.curves(runs, results["control"][name], plots.TITLES[name])
        for name, runs in results["losses"].items()
    }
    pictures |= {f"sweep_{key}": plots.sweep(summary["sweep"]["cases"], key) for key in plots.SWEEPS}
    return pages.render(
        "selfsup_kernels.lab.demo",
        "report.html",
        s=summary,
        device=device(summary),
        findings=findings(summary),
        pictures={name: figures.data_uri(picture) for name, picture in pictures.items()},
        cases=CASE_TITLES,
        case_title=case_title,
        number=small,
        accuracy_rows=list(accuracy_rows(summary)),
        step_rows=list(step_rows(summary)),
        sweep_rows=list(sweep_rows(summary)),
        parts=list(plots.PARTS),
        titles=plots.TITLES,
        limits=agreement,
        evaluate=evaluate,
        story=story,
    )
