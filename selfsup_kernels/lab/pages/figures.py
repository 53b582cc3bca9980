"""Matplotlib figures for the reports, without global state."""

import base64
import hashlib
import io

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from selfsup_kernels.lab.pages import THEMES

EAGER, OURS = "#c26a14", "#3574d4"
COLORS = {
    **{"eager": EAGER, "ours": OURS, "selfsup_kernels": OURS, "compile": "#9a6fd0", "chunked": "#748a2c"},
    **{"lightly": "#2f9465", "pytorch-metric-learning": "#bb5490", "pytorch-metric-learning NTXentLoss": "#cc5540"},
    **{"Inf-CL": "#6f7f89", "cut-cross-entropy": "#a3831c", "Liger": "#2b8ba1"},
    **{"foreach_lerp": EAGER, "loop": "#748a2c", "timm": "#cc5540", "swa_utils": "#bb5490"},
}
"""Readable on light and on dark pages."""
OTHERS = ("#2f9465", "#cc5540", "#a3831c", "#2b8ba1", "#bb5490", "#6f7f89", "#96705a", "#5a8a3a")


def color_of(name) -> str:
    """Return the same colour for a baseline in every picture, whatever else is in it."""
    return COLORS.get(name) or OTHERS[hashlib.sha256(name.encode()).digest()[0] % len(OTHERS)]


def figure(width, height, columns=1, rows=1, **options):
    """Make a figure and its axes; a panel of 4 inches has readable text on a phone."""
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return made, axes


def html(made, text) -> Markup:
    """Return a figure as SVG for light and for dark pages; ``text`` describes it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": text}):
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    light, dark = THEMES["light"], THEMES["dark"]
    # Text and axes are black: strokes by name, the rest because nothing else is set.
    drawn = buffer.getvalue().replace("#000000", light["ink"]).replace("<svg ", f'<svg fill="{light["ink"]}" ', 1)
    other = drawn
    for name in ("ink", "line"):
        other = other.replace(light[name], dark[name])
    source, night = ("data:image/svg+xml;base64," + base64.b64encode(x.encode()).decode() for x in (drawn, other))
    return Markup(
        '<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{}"><img src="{}" alt="{}"></picture>'
        "</figure>"
    ).format(night, source, text)


def log_axis(axis, values):
    """Put readable numbers on a logarithmic ``axis`` (``axes.xaxis`` or ``axes.yaxis``) that shows ``values``."""
    # Powers of ten alone would leave an axis of less than two decades almost without numbers.
    steps = (1.0, 2.0, 5.0) if max(values) < 100 * min(values) else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.axes.minorticks_off()
    axis.grid(color=THEMES["light"]["line"], linewidth=0.8)
