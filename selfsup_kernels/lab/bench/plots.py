"""Draw the pictures of the page. Each function returns a matplotlib figure."""

from selfsup_kernels.lab.bench import rivals, tables
from selfsup_kernels.lab.pages.figures import color_of, figure, log_axis

UNITS = {"time": "forward + backward (ms)", "memory": "peak memory above the inputs (MB)"}


def number(row, name, column):
    """Return the time in ms, or the memory in MB; None also where the system's count of pages is too coarse."""
    if column == "time":
        return row["times"][name]["p50_ms"] if name in row["times"] else None
    value = row["peak_bytes"].get(name) or 0
    return value / 1e6 if value >= 1e5 else None


def rivals_of(rows, column, title):
    """Draw a line over the batch size for each column, or bars where there is one size; None without numbers."""
    names = dict.fromkeys(name for row in rows for name in (*row["times"], *row["peak_bytes"]))
    points = {n: [(row.get("batch", 0), y) for row in rows if (y := number(row, n, column))] for n in names}
    points = {name: sorted(found) for name, found in points.items() if found}
    batches = sorted({row.get("batch", 0) for row in rows})
    if not points:
        return None
    made, axes = figure(4.8, 3.8 if len(batches) > 1 else 0.4 * len(points) + 1.0)
    axis = axes[0, 0]
    axis.set_title(f"{title}\n{UNITS[column] if rows[0]['op'] != 'ema' else 'time (ms)'}", fontsize=10, loc="left")
    if len(batches) == 1:
        values = [found[0][1] for found in points.values()]
        drawn = axis.barh([tables.label(name) for name in points], values, color=[color_of(name) for name in points])
        axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.18 * max(values))
        axis.set_xticks([])
        return made
    for name, found in points.items():
        width = 2.4 if rivals.impl_of(name) else 1.4
        style = {"color": color_of(name), "marker": "o", "linewidth": width, "label": tables.label(name)}
        axis.loglog(*zip(*found, strict=True), **style)
    values = [y for found in points.values() for _, y in found]
    axis.set_xticks(batches, batches)
    axis.set_xlabel("batch size B")
    log_axis(axis.yaxis, values)
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return made
