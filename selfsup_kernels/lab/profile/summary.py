"""Summarize the measured steps: means of the faster half, shares, peaks, and warnings."""

from statistics import fmean

from selfsup_kernels.lab.profile import parts

TOLERANCE = 0.05
"""The relative difference of the named parts from a step without marks above which the summary warns."""


NEVER = "run(loader) was never iterated"


def faster(values, key=None) -> list:
    """Return the faster half: what disturbs a step makes it longer, never shorter, and means still add up."""
    return sorted(values, key=key)[: -(-len(values) // 2)]


def summarize(*, device, counts, timed, plain, peaks, warnings, loss_known) -> dict:
    """Return the fields that ``docs/profile.md`` describes.

    Args:
        timed: part -> seconds, of every step with marks.
        plain: seconds of every step without.
        peaks: part -> bytes at its peak, above the beginning of the step; None if not known.
        warnings: what is wrong so far.
    """
    kept = faster(timed, key=lambda step: sum(step.values()))
    seconds = {part: fmean(step[part] for step in kept) if kept else None for part in parts.PARTS}
    step = sum(seconds.values()) if kept else None
    alone = fmean(faster(plain)) if plain else None
    named = sum(seconds[part] for part in parts.NAMED) if kept else None
    loss = sum(seconds[part] for part in parts.LOSS) if kept else None
    difference = named / alone - 1 if kept and alone else None
    peaks, warnings = peaks or {}, list(warnings)
    if not kept or not plain:
        warnings.append(
            "The loop was too short: expected the warm-up, a step with marks and a step without marks."
            if any(counts.values())
            else f"{NEVER}: write `for batch in run(loader):`."
        )
    if not loss_known:
        warnings.append(
            "No loss was found, or it is compiled together with the encoder: its time counts there. "
            "Name it by loss=, run.loss(...) or run.part('loss'), and compile the encoder alone."
        )
    elif kept and not loss:
        warnings.append("The loss was never called in a step that was measured.")
    if difference is not None and abs(difference) > TOLERANCE:
        warnings.append(f"The named parts make up {100 * (1 + difference):.0f} % of a step without marks.")
    rows = [
        {"part": p, "seconds": s, "share": s / step if step else None, "peak_bytes": peaks.get(p)}
        for p, s in seconds.items()
    ]
    return {
        "device": device,
        "steps": {**counts, "memory": 0},
        "step_seconds": alone if alone is not None else step,
        "marked_step_seconds": step,
        "named_seconds": named,
        "difference": difference,
        "parts": rows,
        "loss_share": loss / step if step and loss_known else None,
        "peak_bytes": max(peaks.values(), default=None),
        "level_bytes": None,  # this and the timeline: of files of earlier versions
        "timeline": None,
        "warnings": warnings,
    }


def own_case(summary) -> dict:
    """Return a user's own loop as one of the cases of ``profile.json``."""
    case = {"batch": None, "variant": "yours", "status": "measured", "reason": None, "summary": summary, "trace": None}
    if not summary["steps"]["timed"]:
        reason = "the loop was too short" if any(summary["steps"].values()) else NEVER
        case |= {"status": "skipped", "reason": reason, "summary": None}
    return case


def milliseconds(seconds) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def percent(share) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def size(count) -> str:
    """Return bytes in units of a thousand: ``12.3 GB``."""
    if count is None:
        return "-"
    unit, factor = next(((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= 0.9995 * f), ("B", 1))
    return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:,.0f} {unit}"


def text(summary) -> str:
    """Return the times, the peaks and the warnings as lines of text."""
    warnings = [f"warning: {line}" for line in summary["warnings"]]
    if summary["marked_step_seconds"] is None:
        return "\n".join(warnings)
    step, marked = milliseconds(summary["step_seconds"]), milliseconds(summary["marked_step_seconds"])
    lines = [
        f"A step on {summary['device']}: {step} ms; the steps with marks, whose parts are below: {marked} ms.",
        f"{'part':<18}{'ms':>10}{'share':>10}{'peak memory':>14}",
    ]
    for row in summary["parts"]:
        cells = milliseconds(row["seconds"]), percent(row["share"]), size(row["peak_bytes"])
        lines.append(f"{row['part']:<18}{cells[0]:>10}{cells[1]:>10}{cells[2]:>14}")
    return "\n".join([*lines, *warnings])
