"""Draw the picture of the report."""

import numpy

from selfsup_kernels.lab.pages.figures import figure
from selfsup_kernels.lab.profile import parts

COLORS = ("#c3ccd5", "#9db8a6", "#e8833a", "#b8481f", "#5f8a70", "#7a6ea8", "#c9a227", "#e9edf0")
"""Colours of the parts: the loss in warm colours, the encoder in green."""


def times(cases):
    """Draw a step as stacked bars, a panel for each batch, since they differ by orders of magnitude."""
    batches = list(dict.fromkeys(case["batch"] for case in cases))
    panels = [[case for case in cases if case["batch"] == batch] for batch in batches]
    heights = [0.62 + 0.34 * len(rows) for rows in panels]
    # Six inches: at the width of a phone the letters can still be read.
    made, axes = figure(6.0, 0.9 + sum(heights), 1, len(batches), height_ratios=heights)
    for axis, batch, rows in zip(axes[:, 0], batches, panels, strict=True):
        spent = 1e3 * numpy.array([[row["seconds"] for row in case["summary"]["parts"]] for case in rows])
        lefts = numpy.cumsum(spent, axis=1) - spent
        for i, (part, color) in enumerate(zip(parts.PARTS, COLORS, strict=True)):
            axis.barh(range(len(rows)), spent[:, i], left=lefts[:, i], color=color, height=0.66, label=part)
        axis.set_yticks(range(len(rows)), [case["variant"] for case in rows])
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=7)
        if batch is not None:
            axis.set_title(f"batch {batch:,}", fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("milliseconds a step")
    handles = axes[0, 0].get_legend_handles_labels()
    made.legend(*handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return made
