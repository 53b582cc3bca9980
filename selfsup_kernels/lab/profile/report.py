"""``report.html`` (one file, pictures inside), ``profile.json``, and what is printed."""

import json
from pathlib import Path

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.profile import findings, header, parts
from selfsup_kernels.lab.profile.summary import TOLERANCE, milliseconds, percent, size


def write_run(summary, out) -> Path:
    """The report of a user's own loop."""
    absent = pages.missing(("numpy", "matplotlib", "jinja2"))
    if absent:
        raise ModuleNotFoundError(f"report: {', '.join(absent)} missing; run: {pages.install(absent)}")
    trace = "trace.json" if (Path(out) / "trace.json").exists() else None
    case = {"batch": None, "variant": "yours", "status": "measured", "reason": None, "summary": summary, "trace": trace}
    if not any(row["seconds"] is not None for row in summary["parts"]):
        case |= {"status": "skipped", "reason": "the loop was too short", "summary": None}
    results = {
        "format": "selfsup_kernels.profile",
        "version": 1,
        "header": header.collect(summary["device"]),
        "workload": None,
        "cases": [case],
        "largest": None,
        "seconds": None,
    }
    results |= {"answer": findings.answer(results), "findings": findings.findings(results)}
    return write(results, out)


def write(results, out, console=None) -> Path:
    """Write page and data to the folder ``out``; with a console, print the tables too. Returns the page's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    if console is not None:
        console.print()
        console.print(table(results))
        if results["largest"]:
            console.print(largest_table(results["largest"]))
        console.print(f"\n[bold]{results['answer']}[/bold]", highlight=False, soft_wrap=True)
        for line in results["findings"]:
            console.print(f"- {line}", highlight=False, soft_wrap=True)
        console.print(f"\nReport: {page.resolve()}", highlight=False, soft_wrap=True)
    return page


def measured(results):
    return [case for case in results["cases"] if case["status"] == "measured"]


def table(results):
    from rich.table import Table

    made = Table(title="Milliseconds of a step", pad_edge=False, collapse_padding=True)
    made.add_column("batch", justify="right")
    made.add_column("")
    for title in ("step", "loss", "peak", *parts.PARTS):
        made.add_column(title, justify="right")
    for case, cells in rows(results):
        made.add_row(f"{case['batch']:,}" if case["batch"] else "", case["variant"], *cells)
    return made


def rows(results):
    """Case, and its cells: the step, the loss' share, the peak, then each part; or why there are none."""
    for case in results["cases"]:
        summary = case["summary"]
        if case["status"] != "measured":
            yield case, [*[""] * (len(parts.PARTS) + 3)]
            continue
        whole = milliseconds(summary["step_seconds"]), percent(summary["loss_share"]), size(summary["peak_bytes"])
        yield case, [*whole, *(milliseconds(row["seconds"]) for row in summary["parts"])]


def largest_rows(found):
    for variant, facts in found["variants"].items():
        yield [
            variant,
            findings.batch_words(facts),
            size(facts["peak_bytes"]),
            f"{milliseconds(facts['seconds'])} ms" if (facts["seconds"] or 0) < 1 else f"{facts['seconds']:,.1f} s",
            f"{facts['measured_to']:,}" if facts["measured_to"] else "-",
            f"{facts['refused']:,}" if facts["refused"] else "-",
        ]


LARGEST = ("", "largest batch", "its peak", "its step", "measured up to", "did not fit")


def largest_table(found):
    from rich.table import Table

    made = Table(title=f"The largest batch within {size(found['limit_bytes'])}")
    for title in LARGEST:
        made.add_column(title, justify="left" if not title else "right")
    for row in largest_rows(found):
        made.add_row(*row)
    return made


def render(results) -> str:
    from selfsup_kernels.lab.pages import figures
    from selfsup_kernels.lab.profile import plots

    known = measured(results)
    batch = findings.telling(results)
    shown = [case for case in known if case["batch"] == batch] or known[-1:]
    pictures = {}
    if known:
        pictures["times"] = plots.times(known)
    if any(case["summary"]["peak_bytes"] is not None for case in shown):
        pictures["peaks"] = plots.peaks([c for c in shown if c["summary"]["peak_bytes"] is not None])
    if any(case["summary"]["timeline"] for case in shown):
        pictures["timelines"] = plots.timelines([c for c in shown if c["summary"]["timeline"]])
    if results["largest"] and any(facts["points"] for facts in results["largest"]["variants"].values()):
        pictures["growth"] = plots.growth(results["largest"])
    return pages.render(
        "selfsup_kernels.lab.profile",
        "report.html",
        r=results,
        batch=batch,
        known=known,
        cuda=results["header"]["kind"] == "cuda",
        pictures={name: figures.data_uri(picture) for name, picture in pictures.items()},
        parts=parts.PARTS,
        rows=[(case, cells) for case, cells in rows(results)],
        checks=list(_checks(known)),
        largest_titles=LARGEST,
        largest_rows=list(largest_rows(results["largest"])) if results["largest"] else [],
        limit=size(results["largest"]["limit_bytes"]) if results["largest"] else None,
        tolerance=percent(TOLERANCE),
    )


def _checks(cases):
    """For every profile: a step with marks, its named parts, a step without, and how far they are apart."""
    for case in cases:
        s = case["summary"]
        difference = "-" if s["difference"] is None else f"{100 * s['difference']:+.1f} %"
        counts = f"{s['steps']['timed']} / {s['steps']['plain']}"
        cells = [milliseconds(s[key]) for key in ("named_seconds", "marked_step_seconds")]
        alone = milliseconds(s["step_seconds"]) if s["steps"]["plain"] else "-"
        yield case, [*cells, alone, difference, counts]
