"""Matplotlib figures for the reports, without global state."""

import base64
import hashlib
import io

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

EAGER, OURS = "#d9822b", "#1f5fbf"
COLORS = {
    **{"eager": EAGER, "ours": OURS, "selfsup_kernels": OURS, "compile": "#8a5fbf", "chunked": "#7a8a3a"},
    **{"lightly": "#3a9d6e", "pytorch-metric-learning": "#a8447a", "pytorch-metric-learning NTXentLoss": "#b3462e"},
    **{"Inf-CL": "#5b6770", "cut-cross-entropy": "#c9a227", "Liger": "#2e8fa8"},
    **{"foreach_lerp": EAGER, "loop": "#7a8a3a", "timm": "#b3462e", "swa_utils": "#a8447a"},
}
OTHERS = ("#3a9d6e", "#b3462e", "#c9a227", "#2e8fa8", "#a8447a", "#5b6770", "#7d5a3c", "#4a7a2c")


def color_of(name) -> str:
    """Return the same colour for a baseline in every picture, whatever else is in it."""
    return COLORS.get(name) or OTHERS[hashlib.sha256(name.encode()).digest()[0] % len(OTHERS)]


def figure(width, height, columns=1, rows=1, **options):
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return made, axes


def png(made, dpi=144) -> bytes:
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def data_uri(made) -> str:
    return "data:image/png;base64," + base64.b64encode(png(made)).decode()


def log_axis(axis, values):
    """Put readable numbers on a logarithmic ``axis`` (``axes.xaxis`` or ``axes.yaxis``) that shows ``values``."""
    # Powers of ten alone would leave an axis of less than two decades almost without numbers.
    steps = (1.0, 2.0, 5.0) if max(values) < 100 * min(values) else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.axes.minorticks_off()
    axis.grid(color="#e4e7eb", linewidth=0.8)
