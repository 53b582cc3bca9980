"""The pictures of the documents, from the results: time and memory over the batch size, one pair for each case.

A picture holds the digest of what it was drawn from, and is drawn anew only where that has changed: other versions of
matplotlib would make other bytes of the same picture.
"""

import hashlib
import json
from pathlib import Path

import measured as m

FEWEST = 3
"""Batch sizes that make a curve."""


def wanted(folder):
    """``{(op, case): rows}`` of forward + backward, of the cases with enough batch sizes."""
    found = {}
    for op in ("info_nce", "byol"):
        if not (folder / f"{op}.json").exists():
            continue
        for case, rows in m.cases(m.load(folder, op)["rows"]).items():
            both = [row for row in rows if row["part"] == "both"]
            if sum(bool(row["times"]) for row in both) >= FEWEST:
                found[op, case] = both
    return found


def plan(folder, images):
    """``{(op, case): [(path, rows, draw, alt text), ...]}``."""
    made = {}
    for (op, case), rows in wanted(folder).items():
        stem = f"{folder.name}-{op}-{case.views}x{case.dim}-{case.dtype}"
        pictures = [(images / f"{stem}-time.png", rows, _time, _alt("Time", case))]
        if any((row.get("peak_bytes") or {}).get(m.OURS) for row in rows):
            pictures.append((images / f"{stem}-memory.png", rows, _memory, _alt("Memory", case)))
        made[op, case] = pictures
    return made


def _alt(what, case):
    return f"{what} of forward and backward over the batch size, {case.title()}, on logarithmic axes"


def digest(rows):
    """Of the data and of the code that draws them."""
    shown = [
        {key: row.get(key) for key in ("batch", "views", "dim", "times", "peak_bytes", "unavailable")} for row in rows
    ]
    text = json.dumps(shown, sort_keys=True) + Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def is_current(path, rows):
    if not path.exists():
        return False
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Digest") == digest(rows)


def draw(path, rows, drawing, title):
    from selfsup_kernels.lab.pages import figures

    made, axes = figures.figure(5.6, 4.0)
    drawing(axes.flat[0], rows)
    axes.flat[0].set_xlabel("samples in the batch", fontsize=10)
    axes.flat[0].set_title(title, fontsize=11, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No Software entry: it holds matplotlib's version. There is no date in a PNG of matplotlib's.
    made.savefig(path, format="png", dpi=144, metadata={"Software": None, "Digest": digest(rows)})


def _curves(axis, rows, value):
    """A curve for each rival with at least one point: ``{name: points}``, and the batch sizes."""
    from selfsup_kernels.lab.pages import figures

    drawn = {}
    batches = sorted({row["batch"] for row in rows})
    for name in m.names(rows):
        points = [(row["batch"], value(row, name)) for row in rows if value(row, name)]
        if points:
            width = 2.4 if name == m.OURS else 1.5
            axis.loglog(
                *zip(*points, strict=True), marker="o", ms=4, lw=width, color=figures.color_of(name), label=name
            )
            drawn[name] = points
    return drawn, batches


def _finish(axis, drawn, batches, unit):
    """Ticks and words; last, since every logarithmic line sets the axes' ticks anew."""
    from matplotlib.ticker import NullLocator

    from selfsup_kernels.lab.pages import figures

    figures.log_axis(axis.yaxis, [y for points in drawn.values() for _, y in points])
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(y=0.12)
    axis.set_ylabel(unit, fontsize=10)
    axis.legend(fontsize=8.5, frameon=False)


def _out_of_memory(axis, rows):
    from selfsup_kernels.lab.pages import figures

    for row in rows:
        for name in row.get("unavailable") or {}:
            if m.why_not(row, name) == "out of memory":
                where = axis.get_xaxis_transform()
                axis.plot(row["batch"], 0.97, "x", ms=8, mew=2, color=figures.color_of(name), transform=where)
                axis.annotate(
                    "out of memory", (row["batch"], 0.97), xycoords=where, xytext=(-8, -3),
                    textcoords="offset points", ha="right", fontsize=8, color=figures.color_of(name),
                )  # fmt: skip


def _time(axis, rows):
    from selfsup_kernels.lab.pages import figures

    drawn, batches = _curves(axis, rows, m.median)
    _out_of_memory(axis, rows)
    if m.OURS in drawn and rows[0]["op"] == "info_nce":
        figures.guide(axis, batches, drawn[m.OURS][-1], 2, "quadratic")
    _finish(axis, drawn, batches, "ms")


def _memory(axis, rows):
    from selfsup_kernels.lab.pages import figures

    drawn, batches = _curves(axis, rows, lambda row, name: (m.peak(row, name) or 0) / 1e6)
    _out_of_memory(axis, rows)
    for name, power, label in (("eager", 2, "quadratic"), (m.OURS, 1, "linear")):
        if name in drawn:
            figures.guide(axis, batches, drawn[name][-1], power, label)
    _finish(axis, drawn, batches, "MB above the inputs")


def update(folder, images, write):
    """Draws what is not current, unless ``write`` is false; returns the paths that were not current."""
    stale = []
    for (_, case), pictures in plan(folder, images).items():
        for path, rows, drawing, text in pictures:
            if not is_current(path, rows):
                stale.append(path)
                if write:
                    draw(path, rows, drawing, f"{text.split()[0]}, {case.title()}")
    return stale
