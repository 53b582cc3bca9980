"""The pictures of the report."""

import numpy
from matplotlib.patches import Patch

from selfsup_kernels.lab.pages.figures import color_of, figure, log_axis
from selfsup_kernels.lab.profile import largest, parts
from selfsup_kernels.lab.profile.report import batch_words

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
    panels = [[case for case in cases if case["batch"] == batch] for batch in batches]
    heights = [0.62 + 0.34 * len(rows) for rows in panels]
    made, axes = figure(WIDTH, 0.9 + sum(heights), 1, len(batches), height_ratios=heights)
    for axis, batch, rows in zip(axes[:, 0], batches, panels, strict=True):
        for y, case in enumerate(rows):
            spent = [1e3 * row["seconds"] for row in case["summary"]["parts"]]
            lefts, colors = numpy.cumsum([0.0, *spent[:-1]]), [COLORS[part] for part in parts.PARTS]
            axis.barh([y] * len(spent), spent, left=lefts, color=colors, height=0.66)
        axis.set_yticks(range(len(rows)), [case["variant"] for case in rows])
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=7)
        if batch is not None:
            axis.set_title(f"batch {batch:,}", fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("milliseconds a step")
    _legend(made, parts.PARTS)
    return made


def _legend(made, names):
    handles = [Patch(color=COLORS[name], label=name) for name in names]
    made.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9, columnspacing=1.2)


def _color(variant):
    return color_of("ours" if variant == "yours" else variant)


def timelines(cases):
    """Memory over the time of a step, the parts behind it; ``cases`` of one batch."""
    top = max(max(case["summary"]["timeline"]["bytes"]) for case in cases)
    unit, label = (1e9, "GB") if top >= 2e9 else (1e6, "MB")
    made, axes = figure(WIDTH, 0.9 + 2.2 * len(cases), 1, len(cases))
    shown = set()
    for axis, case in zip(axes[:, 0], cases, strict=True):
        line = case["summary"]["timeline"]
        for name, begin, end in line["spans"]:
            axis.axvspan(1e3 * begin, 1e3 * end, color=COLORS[name], alpha=0.45, linewidth=0)
            shown.add(name)
        when, used = 1e3 * numpy.array(line["seconds"]), numpy.array(line["bytes"]) / unit
        axis.fill_between(when, used, step="post", color=_color(case["variant"]), alpha=0.6)
        axis.set_ylim(min(0.0, used.min()), 1.08 * top / unit or 1)
        axis.margins(x=0)
        axis.set_ylabel(f"tensors, {label}", fontsize=9)
        axis.set_title(case["variant"], fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("milliseconds of the traced step")
    _legend(made, [name for name in COLORS if name in shown])
    return made


def growth(found):
    """Measured peaks over the batch, what was fitted through them, and the limit."""
    made, axes = figure(WIDTH, 4.0)
    axis, xs, ys = axes[0, 0], [], [found["limit_bytes"] / 1e9]
    for variant, facts in found["variants"].items():
        if not facts["points"]:
            continue
        batches = [point["batch"] for point in facts["points"]]
        peaks = [point["peak_bytes"] / 1e9 for point in facts["points"]]
        label = f"{variant}: {batch_words(facts)}"
        axis.loglog(batches, peaks, "o", color=_color(variant), markersize=6, label=label)
        xs, ys = xs + batches, ys + peaks
        if facts["coefficients"]:
            line = numpy.geomspace(batches[0], max(facts["batch"] or 0, batches[-1]), 100)
            axis.loglog(line, largest.value(facts["coefficients"], line) / 1e9, color=_color(variant), linewidth=1.2)
            xs.append(line[-1])
    axis.axhline(found["limit_bytes"] / 1e9, color="#b3261e", linewidth=1.2, label="limit")
    log_axis(axis.xaxis, xs)
    log_axis(axis.yaxis, ys)
    axis.set_xlabel("batch")
    axis.set_ylabel("peak memory of the process, GB")
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.93))
    return made
