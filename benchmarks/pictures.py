"""The pictures of the documents, from the results: time and memory over the batch size, one pair for each case.

A picture holds the digest of what it was drawn from, and is drawn again only where that has changed: other versions of
matplotlib would make other bytes of the same picture.
"""

import hashlib
import json

import measured as m

FEWEST = 3
"""Batch sizes that make a curve."""
STYLE = 1
"""To be raised where the drawing changes, so that all pictures are drawn again."""


def plan(folder, images):
    """The pictures of a device: ``{(op, case): [(path, rows, "Time" or "Memory", alt text), ...]}``, of the cases with
    enough batch sizes, forward + backward."""
    made = {}
    for op in ("info_nce", "byol"):
        if not (folder / f"{op}.json").exists():
            continue
        for case, rows in m.cases(m.load(folder, op)["rows"]).items():
            both = [row for row in rows if row["part"] == "both"]
            if sum(bool(row["times"]) for row in both) >= FEWEST:
                kinds = ["Time", *(["Memory"] if any(m.peak(row, m.OURS) for row in both) else [])]
                stem = f"{folder.name}-{op}-{case.views}x{case.dim}-{case.dtype}"
                text = f"of forward and backward over the batch size, {case.title()}, on logarithmic axes"
                made[op, case] = [
                    (images / f"{stem}-{kind.lower()}.png", both, kind, f"{kind} {text}") for kind in kinds
                ]
    return made


def update(folder, images, write):
    """Draw what is not current, unless ``write`` is false; return the paths that were not current."""
    stale = []
    for (_, case), pictures in plan(folder, images).items():
        for path, rows, kind, _ in pictures:
            if not is_current(path, rows):
                stale.append(path)
                if write:
                    draw(path, rows, kind, f"{kind}, {case.title()}")
    return stale


def digest(rows):
    keys = ("batch", "views", "dim", "times", "peak_bytes", "unavailable")
    text = json.dumps([STYLE, [{key: row.get(key) for key in keys} for row in rows]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_current(path, rows):
    if not path.exists():
        return False
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Digest") == digest(rows)


def draw(path, rows, kind, title):
    from matplotlib.ticker import NullLocator

    from selfsup_kernels.lab.pages import figures

    made, axes = figures.figure(5.6, 4.0)
    axis, batches = axes.flat[0], sorted({row["batch"] for row in rows})
    if kind == "Time":
        value, unit, guides = m.median, "ms", [(m.OURS, 2, "quadratic")] if rows[0]["op"] == "info_nce" else []
    else:
        value, unit = (lambda row, name: (m.peak(row, name) or 0) / 1e6), "MB above the inputs"
        guides = [("eager", 2, "quadratic"), (m.OURS, 1, "linear")]
    drawn = {}
    for name in m.names(rows):
        points = [(row["batch"], value(row, name)) for row in rows if value(row, name)]
        if points:
            xs, ys = zip(*points, strict=True)
            width = 2.4 if name == m.OURS else 1.5
            axis.loglog(xs, ys, marker="o", ms=4, lw=width, color=figures.color_of(name), label=name)
            drawn[name] = points
    for row in rows:
        for name in row.get("unavailable") or {}:
            if m.why_not(row, name) == "out of memory":
                color, top = figures.color_of(name), axis.get_xaxis_transform()
                axis.plot(row["batch"], 0.97, "x", ms=8, mew=2, color=color, transform=top)
                axis.annotate(
                    "out of memory", (row["batch"], 0.97), xycoords=top, xytext=(-8, -3),
                    textcoords="offset points", ha="right", fontsize=8, color=color,
                )  # fmt: skip
    for name, power, label in guides:
        if name in drawn:
            figures.guide(axis, batches, drawn[name][-1], power, label)
    # Ticks last: every logarithmic line sets the axes' ticks again.
    figures.log_axis(axis.yaxis, [y for points in drawn.values() for _, y in points])
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(y=0.12)
    axis.set_ylabel(unit, fontsize=10)
    axis.legend(fontsize=8.5, frameon=False)
    axis.set_xlabel("samples in the batch", fontsize=10)
    axis.set_title(title, fontsize=11, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No Software entry: it holds matplotlib's version. There is no date in a PNG of matplotlib's.
    made.savefig(path, format="png", dpi=144, metadata={"Software": None, "Digest": digest(rows)})
