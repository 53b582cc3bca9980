"""Write ``report.html`` (one file, its picture inside) and ``profile.json``, and print the tables."""

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


def write(results, out, console=None) -> Path:
    """Write page and data to the folder ``out``; with a console, print the tables too. Returns the page's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = out / "report.html"
    page.write_text(render(results), encoding="utf-8")
    if console is not None:
        pages.show(console, results["answer"], tables(results), notes=results["findings"], page=page)
    return page


def largest_measured(results) -> list:
    """Return the cases of the largest batch at which a step was measured."""
    batch = max((case["summary"] is not None, case["batch"] or 0) for case in results["cases"])[1]
    return [case for case in results["cases"] if (case["batch"] or 0) == batch]


def answer(results) -> str:
    """Return the loss' share of a step, in one sentence."""
    words, cases = [], largest_measured(results)
    batch = cases[0]["batch"]
    for case in cases:
        summary = case["summary"]
        if summary and summary["loss_share"] is not None:
            step = f"{percent(summary['loss_share'])} of a step of {milliseconds(summary['step_seconds'])} ms"
            words.append(step + (f" ({case['variant']})" if batch else ""))
        else:
            why = case["reason"] or "no loss was found"
            words.append(f"an unknown share ({case['variant'] + ': ' if batch else ''}{why})")
    return f"{f'At batch {batch:,} the' if batch else 'The'} loss takes {' and '.join(words)}."


def notes(results):
    """Yield why a case was not measured, the warnings of those that were, and where the search did not end."""
    for case in results["cases"]:
        name = f"Batch {case['batch']:,}, {case['variant']}: " if case["batch"] else ""
        if case["summary"]:
            yield from (f"{name}{line}" for line in case["summary"]["warnings"])
        elif name:  # the answer says why a loop of one's own was not measured
            yield f"{name}{case['status']}, {case['reason']}."
    if results["largest"] and any(facts["or_more"] for facts in results["largest"]["variants"].values()):
        yield '"≥": the time ended before memory was refused; a longer --seconds searches on.'


def numbers(results) -> list:
    """Return ``(value, label)`` for the top of the page: time of a step, its peak memory, the largest batch."""
    cases = {case["variant"]: case["summary"] or {} for case in largest_measured(results)}
    which = f", {' / '.join(cases)}" if len(cases) > 1 else ""
    columns = [("step_seconds", milliseconds, "ms of a step"), ("peak_bytes", size, "peak memory")]
    found = [(" / ".join(f(s.get(key)) for s in cases.values()), label + which) for key, f, label in columns]
    if results["largest"]:
        batches = [batch_words(facts) for facts in results["largest"]["variants"].values()]
        return [*found, (" / ".join(batches), f"batch that fits {size(results['largest']['limit_bytes'])}{which}")]
    return [*found, *((percent(s.get("loss_share")), "of the step is the loss") for s in cases.values())]


def tables(results):
    steps, measured = [], {}
    for case in results["cases"]:
        s, name = case["summary"], [f"{case['batch']:,}" if case["batch"] else "-", case["variant"]]
        if s is None:
            steps.append([*name, case["status"], "", ""])
            continue
        steps.append([*name, milliseconds(s["step_seconds"]), percent(s["loss_share"]), size(s["peak_bytes"])])
        measured[" ".join(name if case["batch"] else name[1:])] = {row["part"]: row for row in s["parts"]}
    yield pages.Table("A step", ("batch", "", "ms", "loss share", "peak memory"), steps)
    for title, key, words in (
        ("Milliseconds of each part", "seconds", milliseconds),
        (
            "Peak memory while each part ran (MB)",
            "peak_bytes",
            lambda count: "-" if count is None else f"{count / 1e6:.3g}",
        ),
    ):
        rows = [[part, *(words(case[part][key]) for case in measured.values())] for part in parts.PARTS]
        if measured:
            yield pages.Table(title, ("part", *measured), rows)
    if results["largest"]:
        rows = [
            [name, batch_words(s), size(s["peak_bytes"]), milliseconds(s["seconds"]), s["refused"] or "-"]
            for name, s in results["largest"]["variants"].items()
        ]
        columns = ("", "largest batch", "its peak", "ms of its step", "did not fit")
        yield pages.Table(f"The largest batch within {size(results['largest']['limit_bytes'])}", columns, rows)


def batch_words(facts) -> str:
    """Return the largest batch of one variant in words."""
    if not facts["batch"]:
        return "none" if facts["batch"] == 0 else "not known"
    return f"{'≥ ' if facts['or_more'] else ''}{facts['batch']:,}"


def render(results) -> str:
    from selfsup_kernels.lab.pages import figures
    from selfsup_kernels.lab.profile import plots

    measured = [case for case in results["cases"] if case["status"] == "measured"]
    return pages.render(
        __package__,
        "report.html",
        r=results,
        answer=results["answer"],
        numbers=numbers(results),
        tables=list(tables(results)),
        picture=figures.html(plots.times(measured), "The parts of a step as bars") if measured else None,
        traces=[case["trace"] for case in measured if case["trace"]],
    )
