"""Write the HTML report (one file, pictures inside) and ``summary.json``, and print the summary."""

import json
from pathlib import Path

from selfsup_kernels.core import info
from selfsup_kernels.lab import pages
from selfsup_kernels.lab.demo import evaluate, train
from selfsup_kernels.lab.demo.run import TITLES
from selfsup_kernels.lab.pages.figures import EAGER, OURS, data_uri, figure, log_axis
from selfsup_kernels.lab.profile.summary import milliseconds, size


def write(results, out, figure_path=None) -> Path:
    out, summary = Path(out), results["summary"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    if figure_path is not None:
        wide = picture(results["losses"], summary["sweep"]["cases"], device(summary), columns=4)
        Path(figure_path).parent.mkdir(parents=True, exist_ok=True)
        wide.savefig(figure_path, dpi=144)
    pages.show(pages.console(), answer(summary), tables(summary), notes=notes(summary), page=page)
    return page


def device(summary) -> str:
    facts, capability = summary["device"], summary["cpu_capability"]
    kernels = f", kernels run as {capability}" if capability else ""
    return f"{info.describe_cpu(facts['cpu'])}, torch {facts['torch']}{kernels}"


def answer(summary) -> str:
    """Tell whether both trainings are the same, and what the loss takes in each."""
    wrong = [TITLES[name] for name, facts in summary["agreement"].items() if not facts["holds"]]
    same = f"does NOT agree with eager to rounding ({', '.join(wrong)})" if wrong else "agrees with eager to rounding"
    ours, eager = (summary["step_seconds"][f"Contrastive, {loss}"]["loss"] for loss in ("ours", "eager"))
    return f"Ours {same}; its contrastive loss takes {milliseconds(ours)} ms of a step, eager {milliseconds(eager)} ms."


def numbers(summary) -> list:
    """Return ``(value, label)`` for the top of the page: accuracy, time of a step, the loss alone."""
    names = [f"Contrastive, {loss}" for loss in ("ours", "eager")]
    accuracy = [f"{100 * summary['accuracy'][name]['all/linear']:.1f} %" for name in names]
    steps = [f"{milliseconds(sum(summary['step_seconds'][name].values()))} ms" for name in names]
    both = [case for case in summary["sweep"]["cases"] if len(case["seconds"]) == 2]
    alone = [f"{milliseconds(both[-1]['seconds'][loss])} ms" for loss in ("ours", "eager")] if both else ["-"]
    return [
        (" / ".join(accuracy), "contrastive, all labels, linear probe, ours / eager"),
        (" / ".join(steps), "a contrastive step, ours / eager"),
        (" / ".join(alone), f"the loss alone at batch {both[-1]['batch'] if both else '-'}, ours / eager"),
    ]


def notes(summary) -> list[str]:
    lines = ["A quick run: its accuracies and times mean nothing."] if summary["quick"] else []
    if summary["auto"] == "reference":
        build = f" To build them: {summary['build']}" if summary["build"] else ""
        lines.append(f"The C++ kernels are not installed here: 'ours' is the package's eager reference.{build}")
    cases = [case for case in summary["sweep"]["cases"] if len(case["seconds"]) == 2]
    slower = [str(case["batch"]) for case in cases if case["seconds"]["ours"] > case["seconds"]["eager"]]
    return lines + ([f"The loss alone is SLOWER than eager at batch {', '.join(slower)}."] if slower else [])


def tables(summary):
    facts, titles = summary["agreement"], ("loss on the same inputs", "its gradient", "moving average")
    differences = [
        [title, *(f"{f['checks'][key]:.1e}" if key in f["checks"] else "-" for f in facts.values())]
        for key, title in zip(train.LIMITS, titles, strict=True)
    ]
    title = "The largest relative difference between ours and eager"
    yield pages.Table(title, ("", *(TITLES[name] for name in facts)), differences)
    rows = [
        [name, *(f"{100 * cases[case]:.1f} %" for case in evaluate.CASES)]
        for name, cases in summary["accuracy"].items()
    ]
    title = f"Accuracy of frozen features on {summary['data']['test']} held-out digits"
    yield pages.Table(title, ("features", *evaluate.CASES.values()), rows)
    rows = [
        [name, *(milliseconds(times.get(part)) for part in train.TIMES), size(summary["step_peak_bytes"][name])]
        for name, times in summary["step_seconds"].items()
    ]
    columns = ("run", *(part.replace("ema", "EMA") for part in train.TIMES), "peak memory")
    yield pages.Table("Milliseconds of a training step", columns, rows)
    title = f"The contrastive loss alone, {summary['sweep']['views']} views, D = {summary['sweep']['dim']}"
    yield pages.Table(title, ("batch", "eager ms", "ours ms", "eager peak", "ours peak"), list(sweep_rows(summary)))


def sweep_rows(summary):
    for case in summary["sweep"]["cases"]:
        why = {name: f"left out ({reason})" for name, reason in case["left_out"].items()}
        times = [why.get(name) or milliseconds(case["seconds"].get(name)) for name in ("eager", "ours")]
        yield [str(case["batch"]), *times, *(size(case["peak_bytes"].get(name)) for name in ("eager", "ours"))]


def render(results) -> str:
    summary = results["summary"]
    drawn = picture(results["losses"], summary["sweep"]["cases"], device(summary))
    return pages.render(
        "selfsup_kernels.lab.demo",
        "report.html",
        s=summary,
        answer=answer(summary),
        numbers=numbers(summary),
        notes=notes(summary),
        tables=list(tables(summary)),
        picture=data_uri(drawn),
        device=device(summary),
    )


def picture(losses, rows, device, columns=2):
    """Draw both loss curves, and time and memory of the contrastive loss alone over the batch size."""
    made, axes = figure(4.0 * columns, 3.6 * 4 / columns, columns, 4 // columns)
    curves, sweep = axes.flat[:2], axes.flat[2:]
    for axis, (name, runs) in zip(curves, losses.items(), strict=True):
        steps = range(1, len(runs["ours"]) + 1)
        axis.plot(steps, runs["ours"], color=OURS, linewidth=3, alpha=0.55, label="ours")
        axis.plot(steps, runs["eager"], color=EAGER, linewidth=1.2, linestyle=(0, (4, 3)), label="eager")
        axis.set(title=f"{TITLES[name]} training on digits", xlabel="step", ylabel="loss")
        axis.legend(frameon=False, fontsize=9)
    for axis, key, unit, title in (
        (sweep[0], "seconds", 1e-3, "Time of the loss alone (ms)"),
        (sweep[1], "peak_bytes", 2**20, "Peak memory of the loss alone (MiB)"),
    ):
        shown = []
        for name, color, marker in (("eager", EAGER, "s"), ("ours", OURS, "o")):
            known = [(row["batch"], row[key][name] / unit) for row in rows if row[key].get(name)]
            if known:
                axis.loglog(*zip(*known, strict=True), color=color, marker=marker, markersize=5, label=name)
                shown += [value for _, value in known]
        if shown:
            axis.set_xticks([row["batch"] for row in rows], [row["batch"] for row in rows])
            log_axis(axis.yaxis, shown)
            axis.legend(frameon=False, fontsize=9)
        axis.set(title=title, xlabel="batch size (4 views)")
    made.supxlabel(device, fontsize=8, color="#52606d")
    return made
