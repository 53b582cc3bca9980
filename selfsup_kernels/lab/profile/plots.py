"""The pictures of the report."""

import numpy
from matplotlib.patches import Patch

from selfsup_kernels.lab.pages.figures import color_of, figure, log_axis
from selfsup_kernels.lab.profile import largest, parts
from selfsup_kernels.lab.profile.findings import batch_words

COLORS = {
    parts.DATA: "#c3ccd5",
    parts.ENCODER_FORWARD: "#9db8a6",
    parts.LOSS_FORWARD: "#e8833a",
    parts.LOSS_BACKWARD: "#b8481f",
    parts.ENCODER_BACKWARD: "#5f8a70",
    parts.OPTIMIZER: "#7a6ea8",
    parts.EMA: "#c9a227",
    parts.OTHER: "#e9edf0",
    "backward": "#5f8a70",
}
"""The loss in warm colours, the encoder in green."""

WIDTH = 6.0
"""Inches of every picture: at the width of a phone its letters can still be read."""


def times(cases):
    """Stacked bars of a step: a panel for each batch, since they differ by orders of magnitude."""
    batches = list(dict.fromkeys(case["batch"] for case in cases))
    made, axes = figure(
        WIDTH,
        0.9 + sum(_height(cases, b) for b in batches),
        1,
        len(batches),
        height_ratios=[_height(cases, b) for b in batches],
    )
    for axis, batch in zip(axes[:, 0], batches, strict=True):
        rows = [case for case in cases if case["batch"] == batch]
        for y, case in enumerate(rows):
            left = 0.0
            for row in case["summary"]["parts"]:
                width = 1e3 * row["seconds"]
                axis.barh(y, width, left=left, color=COLORS[row["part"]], height=0.66)
                left += width
        axis.set_yticks(range(len(rows)), [case["variant"] for case in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, None)
        axis.locator_params(axis="x", nbins=7)
        if batch is not None:
            axis.set_title(f"batch {batch:,}", fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("milliseconds a step")
    _legend(made, [p for p in parts.PARTS if any(_seconds(c, p) for c in cases)])
    return made


def _height(cases, batch):
    return 0.62 + 0.34 * sum(case["batch"] == batch for case in cases)


def _seconds(case, part):
    return next(row["seconds"] for row in case["summary"]["parts"] if row["part"] == part)


def _legend(made, names):
    handles = [Patch(color=COLORS[name], label=name) for name in names]
    made.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9, columnspacing=1.2)


def peaks(cases):
    """Peak memory while each part ran: bars beside each other, ``cases`` of one batch."""
    names = [p for p in parts.PARTS if any(_peak(c, p) is not None for c in cases)]
    made, axes = figure(WIDTH, 0.36 * len(names) * max(1, 0.62 * len(cases)) + 1.1)
    axis, thick = axes[0, 0], 0.78 / len(cases)
    unit, label = _unit(max(_peak(c, p) or 0 for c in cases for p in names))
    for i, case in enumerate(cases):
        values = [(_peak(case, p) or 0) / unit for p in names]
        places = [y + (i - (len(cases) - 1) / 2) * thick for y in range(len(names))]
        bars = axis.barh(places, values, color=_color(case["variant"]), height=thick * 0.92, label=case["variant"])
        axis.bar_label(bars, [f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel(f"peak memory, {label}")
    if len(cases) > 1:
        made.legend(loc="outside upper center", ncols=len(cases), frameon=False, fontsize=9)
    return made


def _peak(case, part):
    return next(row["peak_bytes"] for row in case["summary"]["parts"] if row["part"] == part)


def _color(variant):
    return color_of("ours" if variant == "yours" else variant)


def _unit(count):
    return (1e9, "GB") if count >= 2e9 else (1e6, "MB")


def timelines(cases):
    """Memory over the time of a step, the parts behind it; ``cases`` of one batch."""
    top = max(max(case["summary"]["timeline"]["bytes"]) for case in cases)
    unit, label = _unit(top)
    made, axes = figure(WIDTH, 0.9 + 2.2 * len(cases), 1, len(cases))
    shown = set()
    for axis, case in zip(axes[:, 0], cases, strict=True):
        line = case["summary"]["timeline"]
        for name, begin, end in line["spans"]:
            axis.axvspan(1e3 * begin, 1e3 * end, color=COLORS[name], alpha=0.45, linewidth=0)
            shown.add(name)
        when, used = 1e3 * numpy.array(line["seconds"]), numpy.array(line["bytes"]) / unit
        axis.step(when, used, where="post", color=_color(case["variant"]), linewidth=1.4)
        axis.fill_between(when, used, step="post", color=_color(case["variant"]), alpha=0.25, linewidth=0)
        axis.set_ylim(min(0.0, used.min()), 1.08 * top / unit or 1)
        axis.set_xlim(0, 1e3 * max(end for _, _, end in line["spans"]))
        axis.set_ylabel(f"tensors, {label}", fontsize=9)
        axis.set_title(case["variant"], fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("milliseconds of the traced step")
    _legend(made, [name for name in COLORS if name in shown])
    return made


def growth(found):
    """Measured peaks over the batch, what was fitted through them, and the limit."""
    made, axes = figure(WIDTH, 4.0)
    axis, limit = axes[0, 0], found["limit_bytes"]
    xs, values = [], [limit / 1e9]
    for variant, facts in found["variants"].items():
        points = [(p["batch"], p["peak_bytes"] / 1e9) for p in facts["points"]]
        if not points:
            continue
        axis.loglog(*zip(*points, strict=True), "o", color=_color(variant), markersize=6, label=variant)
        xs += [batch for batch, _ in points]
        values += [peak for _, peak in points]
        if facts["coefficients"]:
            end = max(facts["batch"] or 0, points[-1][0])
            line = numpy.geomspace(points[0][0], end, 100)
            axis.loglog(line, largest.value(facts["coefficients"], line) / 1e9, color=_color(variant), linewidth=1.2)
            xs.append(end)
        if facts["batch"]:
            axis.axvline(facts["batch"], color=_color(variant), linewidth=1, linestyle=(0, (3, 3)))
            axis.annotate(
                batch_words(facts),
                (facts["batch"], 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="bottom",
                fontsize=9,
                color=_color(variant),
            )
    axis.axhline(limit / 1e9, color="#b3261e", linewidth=1.2, label="limit")
    if xs:
        log_axis(axis.xaxis, xs)
    log_axis(axis.yaxis, values)
    axis.set_xlabel("batch")
    axis.set_ylabel("peak memory of the process, GB")
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.93))
    return made
