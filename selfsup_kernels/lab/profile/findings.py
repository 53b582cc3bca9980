"""What the numbers say, in sentences; the first of them is the answer."""

from selfsup_kernels.lab.profile import parts
from selfsup_kernels.lab.profile.summary import milliseconds, percent, size

KNOWN = ("measured", "out of memory", "does not fit")
"""What says something of eager; a case that was left out for want of time does not."""
MATTERS = 0.05
"""The share of a step from which on a faster loss would be noticed."""
SURE = 1.25
"""How far beyond the largest measured batch the advice needs no remark."""
SAME = 0.02
"""Peaks that differ by less than this share are equal."""


def case_of(results, batch, variant):
    found = (c for c in results["cases"] if c["batch"] == batch and c["variant"] == variant)
    return next(found, None)


def telling(results):
    """The batch that the answer is about: the largest where ours was measured and eager, too, or does not fit there."""
    measured = [c for c in results["cases"] if c["status"] == "measured" and c["summary"]["loss_share"] is not None]
    ours = {c["batch"] for c in measured if c["variant"] == "ours"}
    known = {b for b in ours if (case_of(results, b, "eager") or {"status": ""})["status"] in KNOWN}
    return max(known or ours or {c["batch"] for c in measured}, default=None, key=lambda batch: batch or 0)


def answer(results) -> str:
    batch = telling(results)
    yours = case_of(results, batch, "yours")
    if yours and yours["status"] == "measured" and yours["summary"]["loss_share"] is not None:
        return _alone(yours["summary"])
    ours, eager = case_of(results, batch, "ours"), case_of(results, batch, "eager")
    measured = [c for c in (ours, eager) if c and c["status"] == "measured" and c["summary"]["loss_share"] is not None]
    if not measured:
        return "No step was measured in which the loss was found."
    at = f"At batch {batch:,}"
    if ours not in measured:
        return f"{at} eager's loss takes {percent(eager['summary']['loss_share'])} of the step; ours: {ours['reason']}."
    share = ours["summary"]["loss_share"]
    if eager not in measured:
        why = eager["reason"] if eager and eager["reason"] else "was not measured"
        if eager and eager["status"] == "out of memory":
            why = "is out of memory"
        return f"{at} the loss takes {percent(share)} of the step; eager {why}."
    theirs = eager["summary"]["loss_share"]
    memory = _memory(ours["summary"]["peak_bytes"], eager["summary"]["peak_bytes"])
    if theirs < MATTERS:
        return (
            f"{at} the loss takes {percent(share)} of the step, eager's {percent(theirs)} and {memory}:"
            f" a faster loss gains at most {percent(theirs)}."
        )
    if _loss(ours["summary"]) >= _loss(eager["summary"]):
        return (
            f"{at} the loss takes {percent(share)} of the step; eager takes {percent(theirs)} and {memory}:"
            " ours is no faster."
        )
    return f"{at} the loss takes {percent(share)} of the step; eager would take {percent(theirs)} and {memory}."


def _alone(summary) -> str:
    share = summary["loss_share"]
    spent = f"{milliseconds(_loss(summary))} of {milliseconds(summary['marked_step_seconds'])} ms"
    return f"The loss takes {percent(share)} of the step ({spent}): a faster loss gains at most {percent(share)}."


def _loss(summary) -> float:
    return sum(row["seconds"] for row in summary["parts"] if row["part"] in parts.LOSS)


def _memory(ours, eager) -> str:
    if ours is None or eager is None:
        return "an unknown amount of memory"
    if abs(eager - ours) < SAME * max(ours, eager):
        return "as much memory"
    return f"{size(abs(eager - ours))} {'more' if eager > ours else 'less'}"


def findings(results) -> list[str]:
    lines = [*_step(results), *_slowest(results), *_largest(results)]
    for case in results["cases"]:
        if case["status"] != "measured":
            lines.append(f"{_name(case)} {case['reason']}." if case["status"] in _SENTENCES else _failed(case))
        elif case["summary"]["warnings"]:
            lines += [f"{_name(case)}: {line}" for line in case["summary"]["warnings"]]
    return lines


_SENTENCES = ("skipped", "does not fit")


def _failed(case) -> str:
    return f"{_name(case)}: {case['status']}, {case['reason']}."


def _name(case) -> str:
    return case["variant"].capitalize() + (f" at batch {case['batch']:,}" if case["batch"] else "")


def _step(results):
    batch = telling(results)
    ours, eager = case_of(results, batch, "ours"), case_of(results, batch, "eager")
    if not (ours and eager and ours["status"] == eager["status"] == "measured"):
        return
    a, b = ours["summary"]["step_seconds"], eager["summary"]["step_seconds"]
    slower = b / a
    word = (
        f"{slower:.2g} times as long" if slower > 1.05 else "as long" if slower > 0.95 else f"{a / b:.2g} times shorter"
    )
    both = f"{milliseconds(a)} ms with ours and {milliseconds(b)} ms with eager"
    yield f"A whole step at batch {batch:,} takes {both}, {word}."


def _slowest(results):
    case = case_of(results, telling(results), "ours") or case_of(results, telling(results), "yours")
    if case and case["status"] == "measured":
        rows = sorted((r for r in case["summary"]["parts"] if r["share"]), key=lambda r: -r["share"])[:2]
        yield "Most of the step: " + ", ".join(f"{r['part']} {percent(r['share'])}" for r in rows) + "."


def _largest(results):
    if not results["largest"]:
        return
    limit = size(results["largest"]["limit_bytes"])
    words = []
    for variant, growth in results["largest"]["variants"].items():
        words.append(f"{variant} {batch_words(growth)}")
        if growth["batch"] and not growth["or_more"] and growth["batch"] > SURE * growth["measured_to"]:
            words[-1] += f" (measured up to {growth['measured_to']:,})"
    yield f"The largest batch within {limit}: " + ", ".join(words) + "."


def batch_words(growth) -> str:
    """The largest batch of one variant."""
    if growth["batch"] is None:
        return "not known"
    return f"{growth['batch']:,}{' or more' if growth['or_more'] else ''}" if growth["batch"] else "none"
