"""Write the HTML report (one file, pictures inside) and ``summary.json``, and print the summary."""

import json
from pathlib import Path

from selfsup_kernels.core import info
from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench.tables import factor, size
from selfsup_kernels.lab.demo import evaluate, plots, run, train
from selfsup_kernels.lab.pages.figures import html
from selfsup_kernels.lab.profile.summary import milliseconds


def write(results, out, figure_path=None) -> Path:
    out, summary = Path(out), results["summary"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    if figure_path is not None:
        plots.save(figure_path, panels(results), device(summary))
    pages.show(pages.console(), answer(summary), tables(summary), notes=notes(summary), page=page)
    return page


def device(summary) -> str:
    facts, capability = summary["device"], summary["cpu_capability"]
    kernels = f", kernels run as {capability}" if capability else ""
    return f"{info.describe_cpu(facts['cpu'])}, torch {facts['torch']}{kernels}"


def compared(summary) -> list:
    """Return the cases of the sweep that both losses have run."""
    return [case for case in summary["sweep"]["cases"] if len(case["seconds"]) == 2]


def ratios(case):
    """Return eager's time and memory over ours; None where the memory is not known."""
    peaks = case["peak_bytes"]
    return tuple(of["eager"] / of["ours"] if all(of.values()) else None for of in (case["seconds"], peaks))


def answer(summary) -> str:
    """Tell in a sentence whether the losses are the same, and what ours gains."""
    wrong = [run.TITLES[name] for name, facts in summary["agreement"].items() if not facts["holds"]]
    text = f"Ours does NOT agree with eager to rounding ({', '.join(wrong)})" if wrong else ""
    text = text or "Ours gives the same losses as eager, to rounding"
    if not compared(summary) or summary["quick"]:  # whose times mean nothing
        return f"{text}."
    case = compared(summary)[-1]
    speed, memory = ratios(case)
    text += f"; at batch {case['batch']:,} the contrastive loss is {factor(speed)} as fast"
    return text + (f" and takes {share(memory)} of the memory." if memory else ".")


def share(ratio) -> str:
    """Return a share of memory: ``1/79``, or percent where ours takes more than a third."""
    return f"1/{ratio:.0f}" if ratio > 3 else f"{100 / ratio:.0f} %"


def numbers(summary) -> list:
    """Return ``(value, label)`` for the top of the page: the largest difference, the gain in time and in memory."""
    worst = max(value for facts in summary["agreement"].values() for value in facts["checks"].values())
    found = [
        (f"{worst:.1g}", "largest relative difference of losses, gradients and moving averages on the same inputs")
    ]
    for case in compared(summary)[-1:]:
        (speed, memory), alone = ratios(case), f"the contrastive loss alone at batch {case['batch']:,}"
        ours, eager = (milliseconds(case["seconds"][loss]) for loss in ("ours", "eager"))
        found.append((factor(speed), f"as fast: {alone}, {ours} ms instead of {eager} ms"))
        if memory:
            ours, eager = (size(case["peak_bytes"][loss]) for loss in ("ours", "eager"))
            found.append((share(memory), f"of the memory: {ours} instead of {eager}"))
    return found


def notes(summary) -> list[str]:
    lines = ["A quick run: its accuracies and times mean nothing."] if summary["quick"] else []
    if summary["auto"] == "reference":
        build = f" To build them: {summary['build']}" if summary["build"] else ""
        lines.append(f"The C++ kernels are not installed here: 'ours' is the package's eager reference.{build}")
    slower = [str(case["batch"]) for case in compared(summary) if ratios(case)[0] < 1]
    return lines + ([f"The loss alone is SLOWER than eager at batch {', '.join(slower)}."] if slower else [])


def verdict(summary) -> str:
    """Tell in a sentence whether the features of ours and of eager are equally good."""
    found = [case for cases in summary["ours_minus_eager"].values() for case in cases.values()]
    differing = sum(case["significant"] for case in found)
    return f"The accuracy of ours and eager differs significantly in {differing} of {len(found)} comparisons."


def tables(summary) -> list:
    """Return the tables of the sweep, of a step, of the differences, of ours against eager, and of the features."""
    cases, agreement, accuracy = summary["sweep"]["cases"], summary["agreement"], summary["accuracy"]
    title = f"The contrastive loss alone, {summary['sweep']['views']} views, D = {summary['sweep']['dim']}"
    alone = pages.Table(title, ("batch", "eager ms", "ours ms", "eager peak", "ours peak"), list(map(sweep_row, cases)))
    rows = [
        [name, milliseconds(sum(times.values())), *(milliseconds(times.get(part)) for part in train.TIMES)]
        for name, times in summary["step_seconds"].items()
    ]
    columns = ("run", "step", *(part.replace("ema", "EMA") for part in train.TIMES))
    styles = ["ours" if name.endswith(", ours") else "" for name in summary["step_seconds"]]
    steps = pages.Table("Milliseconds of a training step", columns, rows, styles)
    rows = [
        [title, *(f"{f['checks'][key]:.1g}" if key in f["checks"] else "-" for f in agreement.values())]
        for key, title in zip(train.LIMITS, ("loss", "gradient", "moving average"), strict=True)
    ]
    title = "Largest relative difference between ours and eager, on the same inputs"
    same = pages.Table(title, ("", *(run.TITLES[name] for name in agreement)), rows)
    rows, styles = [], []
    for name, found in summary["ours_minus_eager"].items():
        for case, words in evaluate.CASES.items():
            mean, error = 100 * found[case]["difference"], 100 * found[case]["standard_error"]
            percents = (f"{100 * accuracy[f'{name}, {loss}'][case]:.1f}" for loss in ("eager", "ours"))
            rows.append([f"{name}, {words}", *percents, f"{mean:+.1f} ± {error:.1f}"])
            styles.append("wrong" if found[case]["significant"] else "")
    columns = ("features", "eager", "ours", "ours - eager")
    equal = pages.Table("Accuracy in percent, ours against eager", columns, rows, styles, [verdict(summary)])
    names = {"raw pixels": "raw pixels", **{f"{title}, ours": title for title in run.TITLES.values()}}
    rows = [[words, *(f"{100 * accuracy[name][case]:.1f}" for name in names)] for case, words in evaluate.CASES.items()]
    pixels = pages.Table("Accuracy in percent, by the features", ("", *names.values()), rows)
    return [alone, same, steps, equal, pixels]


def sweep_row(case):
    why = {name: f"left out ({reason})" for name, reason in case["left_out"].items()}
    times = [why.get(name) or milliseconds(case["seconds"].get(name)) for name in ("eager", "ours")]
    return [str(case["batch"]), *times, *(size(case["peak_bytes"].get(name)) for name in ("eager", "ours"))]


def panels(results) -> list:
    return [*plots.sweep(results["summary"]["sweep"]["cases"]), *plots.curves(results["losses"])]


def render(results) -> str:
    summary = results["summary"]
    return pages.render(
        "selfsup_kernels.lab.demo",
        "report.html",
        s=summary,
        answer=answer(summary),
        numbers=numbers(summary),
        notes=notes(summary),
        tables=tables(summary),
        pictures=[html(plots.drawn([draw]), text) for text, draw in panels(results)],
        device=device(summary),
    )
