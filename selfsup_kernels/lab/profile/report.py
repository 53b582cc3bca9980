"""``report.html`` (one file, pictures inside), ``profile.json``, and what is printed."""

import datetime
import json
from pathlib import Path

import torch

from selfsup_kernels.core import info
from selfsup_kernels.lab import pages
from selfsup_kernels.lab.profile import parts
from selfsup_kernels.lab.profile.summary import milliseconds, percent, size


def results(device, workload, cases, largest, seconds) -> dict:
    """Return the contents of ``profile.json``."""
    facts, device = info.collect(), torch.device(device)
    header = {name: facts[name] for name in ("selfsup_kernels", "torch", "python")}
    header |= {"device": info.describe_cpu(facts["cpu"]), "kind": device.type, "auto": str(facts["auto"])}
    header["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        header |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    made = {"format": "selfsup_kernels.profile", "version": 1, "header": header, "workload": workload}
    made |= {"cases": cases, "largest": largest, "seconds": seconds}
    return made | {"answer": answer(made), "findings": list(notes(made))}


def write_run(summary, out) -> Path:
    """Write the report of a user's own loop."""
    absent = info.missing("profile")
    if absent:
        raise ModuleNotFoundError(f"report: {', '.join(absent)} missing; run: {info.install(absent)}")
    trace = "trace.json" if (Path(out) / "trace.json").exists() else None
    case = {"batch": None, "variant": "yours", "status": "measured", "reason": None, "summary": summary, "trace": trace}
    if not summary["steps"]["timed"]:
        case |= {"status": "skipped", "reason": "the loop was too short", "summary": None}
    return write(results(summary["device"], workload=None, cases=[case], largest=None, seconds=None), out)


def write(results, out, console=None) -> Path:
    """Write page and data to the folder ``out``; with a console, print the tables too. Returns the page's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    if console is not None:
        pages.show(console, tables(results), results["answer"], results["findings"], page)
    return page


def telling(results):
    """The batch that the answer is about: the largest of those at which the most is known."""

    def known(batch):
        found = [case["status"] for case in results["cases"] if case["batch"] == batch]
        return "measured" in found, -sum(status in ("skipped", "failed") for status in found), batch or 0

    return max((case["batch"] for case in results["cases"]), key=known)


def answer(results) -> str:
    """The loss' share of a step, in one sentence."""
    batch, words = telling(results), []
    for case in results["cases"]:
        summary = case["summary"]
        if case["batch"] == batch and summary and summary["loss_share"] is not None:
            step = f"{percent(summary['loss_share'])} of a step of {milliseconds(summary['marked_step_seconds'])} ms"
            words.append(step + (f" ({case['variant']})" if batch else ""))
        elif case["batch"] == batch:
            words.append(f"an unknown share ({case['variant']}: {case['reason'] or 'no loss was found'})")
    return f"{f'At batch {batch:,} the' if batch else 'The'} loss takes {' and '.join(words)}."


def notes(results):
    """Why a case was not measured, and the warnings of those that were."""
    for case in results["cases"]:
        name = case["variant"].capitalize() + (f" at batch {case['batch']:,}" if case["batch"] else "")
        if case["summary"]:
            yield from (f"{name}: {line}" for line in case["summary"]["warnings"])
        else:
            yield f"{name}: {case['status']}, {case['reason']}."


def numbers(results) -> list:
    """``(value, label)`` for the top of the page: the time of a step, its peak memory, the largest batch."""
    cases = {case["variant"]: case["summary"] for case in results["cases"] if case["batch"] == telling(results)}
    steps = [f"{milliseconds(s['step_seconds'])} ms" if s else "-" for s in cases.values()]
    peaks = [size(s["peak_bytes"]) if s else "-" for s in cases.values()]
    which = f", {' / '.join(cases)}" if len(cases) > 1 else ""
    found = [(" / ".join(steps), f"a step{which}"), (" / ".join(peaks), f"peak memory{which}")]
    if results["largest"]:
        batches = [batch_words(facts) for facts in results["largest"]["variants"].values()]
        return [*found, (" / ".join(batches), f"largest batch in {size(results['largest']['limit_bytes'])}{which}")]
    return [*found, *((percent(s["loss_share"]), "of the step is the loss") for s in cases.values() if s)]


def tables(results):
    head = ("batch", "", "step", "loss", "peak")
    times, peaks = [], []
    for case in results["cases"]:
        s, name = case["summary"], [f"{case['batch']:,}" if case["batch"] else "-", case["variant"]]
        if s is None:
            times.append([*name, case["status"]])
            continue
        whole = milliseconds(s["step_seconds"]), percent(s["loss_share"]), size(s["peak_bytes"])
        times.append([*name, *whole, *(milliseconds(row["seconds"]) for row in s["parts"])])
        peaks.append([*name, *(size(row["peak_bytes"]) for row in s["parts"])])
    yield pages.Table("Milliseconds of a step", (*head, *parts.PARTS), times)
    yield pages.Table("Peak memory while each part ran", ("batch", "", *parts.PARTS), peaks)
    if results["largest"]:
        columns = ("", "largest batch", "its peak", "its step", "measured up to", "did not fit")
        rows = []
        for variant, facts in results["largest"]["variants"].items():
            cells = batch_words(facts), size(facts["peak_bytes"]), f"{milliseconds(facts['seconds'])} ms"
            rows.append([variant, *cells, facts["measured_to"] or "-", facts["refused"] or "-"])
        yield pages.Table(f"The largest batch within {size(results['largest']['limit_bytes'])}", columns, rows)


def batch_words(facts) -> str:
    """The largest batch of one variant."""
    if facts["batch"] is None:
        return "not known"
    return f"{facts['batch']:,}{' or more' if facts['or_more'] else ''}" if facts["batch"] else "none"


def render(results) -> str:
    from selfsup_kernels.lab.pages import figures
    from selfsup_kernels.lab.profile import plots

    measured = [case for case in results["cases"] if case["status"] == "measured"]
    lines = [case for case in measured if case["batch"] == telling(results) and case["summary"]["timeline"]]
    pictures = {}
    if measured:
        pictures["Where the time of a step goes"] = plots.times(measured)
    if lines:
        pictures["Memory of tensors over the time of one step under torch.profiler"] = plots.timelines(lines)
    if results["largest"] and any(facts["points"] for facts in results["largest"]["variants"].values()):
        pictures["Peak memory over the batch, and the limit"] = plots.growth(results["largest"])
    return pages.render(
        "selfsup_kernels.lab.profile",
        "report.html",
        r=results,
        answer=results["answer"],
        numbers=numbers(results),
        tables=list(tables(results)),
        pictures={title: figures.data_uri(picture) for title, picture in pictures.items()},
        traces=[case["trace"] for case in measured if case["trace"]],
    )
