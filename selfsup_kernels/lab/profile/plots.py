"""Draw the picture of the report."""

import numpy

from selfsup_kernels.lab.pages.figures import figure
from selfsup_kernels.lab.profile import parts

COLORS = ("#6f8fb0", "#5f9f78", "#d9742a", "#c2512a", "#3f805e", "#8577bd", "#a98a22", "#858d95")
"""Colours of the parts: the loss in warm colours, the encoder in green."""


def times(cases):
    """Draw a step as stacked bars, a panel for each batch, since they differ by orders of magnitude."""
    batches = list(dict.fromkeys(case["batch"] for case in cases))
    panels = [[case for case in cases if case["batch"] == batch] for batch in batches]
    heights = [0.62 + 0.34 * len(rows) for rows in panels]
    made, axes = figure(4.2, 1.3 + sum(heights), 1, len(batches), height_ratios=heights)
    for axis, batch, rows in zip(axes[:, 0], batches, panels, strict=True):
        spent = 1e3 * numpy.array([[row["seconds"] for row in case["summary"]["parts"]] for case in rows])
        lefts = numpy.cumsum(spent, axis=1) - spent
        for i, (part, color) in enumerate(zip(parts.PARTS, COLORS, strict=True)):
            axis.barh(range(len(rows)), spent[:, i], left=lefts[:, i], color=color, height=0.66, label=part)
        axis.set_yticks(range(len(rows)), [case["variant"] for case in rows])
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=5)
        if batch is not None:
            axis.set_title(f"batch {batch:,}", fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("milliseconds a step")
    handles = axes[0, 0].get_legend_handles_labels()
    made.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return made
