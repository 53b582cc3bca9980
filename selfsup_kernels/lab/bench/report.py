"""Write the page of ``--html``: one file, no network."""

from pathlib import Path

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench import baselines, tables
from selfsup_kernels.lab.pages.figures import color_of, figure, html, log_axis

UNITS = {"time": "forward + backward (ms)", "memory": "peak memory above the inputs (MB)"}


def write(path, header, rows):
    sections = [section(op, [row for row in rows if row["op"] == op]) for op in tables.TITLES]
    answer, numbers = tables.answer(rows)
    text = pages.render(
        __package__,
        "report.html",
        answer=answer,
        numbers=numbers,
        warning=tables.EAGER_ONLY if tables.is_eager(header) else None,
        device=tables.device_line(header),
        rates=tables.rates_line(header),
        gpu=header["kind"] == "cuda",
        sections=[made for made in sections if made],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def section(op, rows):
    """Return the title, the pictures and the table of one operation."""
    groups = {}
    for row in rows:
        if row["part"] in ("both", "update"):
            key = ("model", "dtype") if op == "ema" else ("objective", "views", "dim", "dtype")
            groups.setdefault(tables.facts(row, key), []).append(row)
    pictures = [
        html(drawn, f"{tables.TITLES[op]}, {title}: {column}")
        for title, some in groups.items()
        for column in (("time",) if op == "ema" else ("time", "memory"))
        if (drawn := picture(some, column, title))
    ]
    return rows and {"title": tables.TITLES[op], "pictures": pictures, "table": tables.make(op, rows)}


def number(row, name, column):
    """Return the time in ms, or the memory in MB; None also where the system's count of pages is too coarse."""
    if column == "time":
        return row["times"][name]["p50_ms"] if name in row["times"] else None
    value = row["peak_bytes"].get(name) or 0
    return value / 1e6 if value >= 1e5 else None


def picture(rows, column, title):
    """Draw a line over the batch size for each column, or bars where there is one size; None without numbers."""
    names = dict.fromkeys(name for row in rows for name in (*row["times"], *row["peak_bytes"]))
    points = {n: [(row.get("batch", 0), y) for row in rows if (y := number(row, n, column))] for n in names}
    points = {name: sorted(found) for name, found in points.items() if found}
    batches = sorted({row.get("batch", 0) for row in rows})
    if not points:
        return None
    made, axes = figure(4.2, 3.6 + 0.11 * len(points) if len(batches) > 1 else 0.34 * len(points) + 0.7)
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
        width = 2.4 if baselines.impl_of(name) else 1.4
        style = {"color": color_of(name), "marker": "o", "linewidth": width, "label": tables.label(name)}
        axis.loglog(*zip(*found, strict=True), **style)
    values = [y for found in points.values() for _, y in found]
    axis.set_xticks(batches, batches)
    axis.set_xlabel("batch size B")
    log_axis(axis.yaxis, values)
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return made
