"""The steps that were measured, as numbers: means of the faster half, shares, peaks, and what is wrong with them."""

from selfsup_kernels.lab.profile import parts

TOLERANCE = 0.05
"""How far the named parts may be from a step without marks before the summary warns."""


def faster(values, key=lambda value: value) -> list:
    """The faster half, by ``key``: what disturbs a step makes it longer, never shorter, and means still add up."""
    return sorted(values, key=key)[: -(-len(values) // 2)]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def summarize(
    *, device, counts, timed, plain, peaks, level, timeline, problems, loss_known, hidden, with_memory
) -> dict:
    """See ``docs/profile.md`` for the fields.

    Args:
        timed: part -> seconds, of every step with marks.
        plain: seconds of every step without.
        peaks: part -> bytes in use at its peak; None if not known.
        level: bytes in use before the first step.
    """
    kept = faster(timed, key=lambda step: sum(step.values()))
    seconds = {part: mean(step[part] for step in kept) for part in parts.PARTS} if kept else None
    step = sum(seconds.values()) if seconds else None
    alone = mean(faster(plain)) if plain else None
    named = sum(seconds[part] for part in parts.NAMED) if seconds else None
    difference = named / alone - 1 if named is not None and alone else None
    above = {part: max(0, peaks[part] - level) for part in parts.PARTS if part in peaks} if peaks else {}
    return {
        "device": device,
        "steps": dict(counts),
        "step_seconds": alone if alone is not None else step,
        "marked_step_seconds": step,
        "named_seconds": named,
        "difference": difference,
        "parts": [
            {
                "part": part,
                "seconds": seconds[part] if seconds else None,
                "share": seconds[part] / step if seconds and step else None,
                "peak_bytes": above.get(part),
            }
            for part in parts.PARTS
        ],
        "loss_share": sum(seconds[part] for part in parts.LOSS) / step if seconds and step and loss_known else None,
        "peak_bytes": max(above.values()) if above else None,
        "level_bytes": level,
        "timeline": timeline,
        "warnings": list(
            _warnings(timed, plain, difference, seconds, step, peaks, problems, loss_known, hidden, with_memory)
        ),
    }


def _warnings(timed, plain, difference, seconds, step, peaks, problems, loss_known, hidden, with_memory):
    if not timed:
        yield "No step was measured: the loop was shorter than its warm-up and one step."
    elif not plain:
        yield "No step without marks was measured: the loop was too short to say what the marks cost."
    if hidden:
        names = ", ".join(hidden)
        yield f"{names}: compiled together with the encoder, so its time counts there. Compile the encoder alone."
    elif not loss_known:
        yield "No loss was found: its time counts elsewhere. Name it by loss=, run.loss(...) or run.part('loss')."
    elif seconds and not any(seconds[part] for part in parts.LOSS):
        yield "The loss was never called in a step that was measured."
    if difference is not None and abs(difference) > TOLERANCE:
        yield (
            f"The named parts make up {100 * (1 + difference):.0f} % of a step without marks"
            f" ({percent(seconds[parts.OTHER] / step)} of a step with marks is in none of them);"
            f" steps without marks took {milliseconds(min(plain))} to {milliseconds(max(plain))} ms."
        )
    if with_memory and peaks is None and timed:
        yield "Peak memory is not known: the loop was too short, or this system does not tell it."
    yield from problems


def milliseconds(seconds) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def percent(share) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def size(count) -> str:
    """Bytes for reading, in units of a thousand: ``12.3 GB``."""
    if count is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * factor:
            return f"{count / factor:.3g} {unit}" if abs(count) < 999.5 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count:.0f} B"


def text(summary) -> str:
    """The summary as lines of text."""
    counts = summary["steps"]
    lines = [
        f"{milliseconds(summary['step_seconds'])} ms a step on {summary['device']}"
        f" ({counts['timed']} steps with marks, {counts['plain']} without, {counts['warmup']} to warm up)"
    ]
    lines.append(f"{'part':<18}{'ms':>10}{'share':>10}{'peak memory':>14}")
    for row in summary["parts"]:
        cells = milliseconds(row["seconds"]), percent(row["share"]), size(row["peak_bytes"])
        lines.append(f"{row['part']:<18}{cells[0]:>10}{cells[1]:>10}{cells[2]:>14}")
    if summary["difference"] is not None:
        lines.append(f"named parts against a step without marks: {100 * summary['difference']:+.1f} %")
    return "\n".join([*lines, *(f"warning: {line}" for line in summary["warnings"])])
