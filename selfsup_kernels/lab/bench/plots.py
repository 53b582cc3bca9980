"""The pictures of the page. Each function returns a matplotlib figure."""

from selfsup_kernels.lab.bench import results, rivals, tables
from selfsup_kernels.lab.bench.workloads import case_of
from selfsup_kernels.lab.pages.figures import color_of, figure, guide, log_axis

MARKERS = "oshD^vP*X<>d"
CEILING = "#52606d"
COLUMNS = {
    "time": ("Time of forward + backward (ms)", lambda row, name: median_of(row, name)),
    "memory": ("Peak memory above the inputs (MB)", lambda row, name: megabytes(row, name)),
}


def median_of(row, name):
    return row["times"][name]["p50_ms"] if name in row["times"] else None


def megabytes(row, name):
    """None also where the system's count of pages is too coarse to mean much."""
    value = row["peak_bytes"].get(name)
    return value / 1e6 if value and value >= 1e5 else None


def columns_of(rows):
    return list(dict.fromkeys(name for row in rows for name in (*row["times"], *row["peak_bytes"])))


def marker(names, name):
    return MARKERS[names.index(name) % len(MARKERS)]


def over_batch(rows, column):
    """Lines over the batch size, with guides of slope 1 and 2; bars where there is one size. None without numbers."""
    title, value = COLUMNS[column]
    names = columns_of(rows)
    points = {n: [(row["batch"], value(row, n)) for row in rows if value(row, n) is not None] for n in names}
    points = {name: sorted(found) for name, found in points.items() if found}
    if not points:
        return None
    if len({row["batch"] for row in rows}) == 1:
        return bars({name: found[0][1] for name, found in points.items()}, title)
    made, axes = figure(4.8, 3.8)
    axis = axes[0, 0]
    for name, found in points.items():
        own = rivals.impl_of(name) is not None
        axis.loglog(
            *zip(*found, strict=True),
            color=color_of(name),
            marker=marker(names, name),
            markersize=5,
            linewidth=2.4 if own else 1.4,
            zorder=3 if own else 2,
            label=tables.label(name),
        )
    values = [v for found in points.values() for _, v in found]
    batches = sorted({row["batch"] for row in rows})
    limits = min(values) / 1.6, max(values) * 1.6
    # Through the largest case: of ours for the linear one, of the slowest rival for the quadratic one.
    lines = [found for found in points.values() if len(found) > 1] or list(points.values())
    lowest = min(lines, key=lambda found: found[-1][1])[-1]
    highest = max(lines, key=lambda found: found[-1][1])[-1]
    guide(axis, batches, lowest, 1, "linear")
    if rows[0]["op"] == "info_nce":
        guide(axis, batches, highest, 2, "quadratic")
        axis.lines[-1].set_linestyle("--")
    axis.set_ylim(limits)
    axis.set_xticks(batches, batches)
    axis.set_xlabel("batch size B")
    axis.set_title(title, fontsize=11, loc="left")
    log_axis(axis.yaxis, values)
    made.legend(loc="outside lower center", ncols=legend_columns(points), frameon=False, fontsize=8.5)
    return made


def legend_columns(names):
    return 2 if any(len(tables.label(name)) > 24 for name in names) else 3


def bars(values, title):
    """``values``: name -> number, on a linear axis that begins at 0."""
    made, axes = figure(4.8, 0.4 * len(values) + 0.8)
    axis = axes[0, 0]
    drawn = axis.barh(range(len(values)), list(values.values()), color=[color_of(n) for n in values], height=0.64)
    axis.bar_label(drawn, [f"{v:.3g}" for v in values.values()], padding=3, fontsize=9)
    axis.set_yticks(range(len(values)), [tables.label(name) for name in values])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(values.values()))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_title(title, fontsize=11, loc="left")
    return made


def updates(rows):
    """Bars of the moving average's time, one picture for each model and dtype."""
    for row in rows:
        if row["times"]:
            title = f"{row['model']}, float32 from {row['source']}: time (ms)"
            yield row, bars({name: median_of(row, name) for name in row["times"]}, title)


def roofline(header, rows):
    """Rate over arithmetic intensity, under the ceilings of the same run; None where ours has no time."""
    rows = [row for row in rows if results.ours(row)]
    if not rows:
        return None
    scheme = "gpu" if header["kind"] == "cuda" else "cpu"
    copy = tables.bandwidth(header) * 1e9
    ceilings = {name: 1e12 * value for name, value in header["matrix_product_tflops"].items()}
    points = {}
    for row in rows:
        made, part = case_of(row), row["part"]
        operations, moved = made.operations(part, scheme), made.bytes(part)
        for name, times in row["times"].items():
            points.setdefault(name, []).append((row["op"], operations / moved, 1e3 * operations / times["p50_ms"]))
    scale = 1e12 if max(ceilings.values()) >= 5e12 else 1e9
    every = [point for found in points.values() for point in found]
    xs = [x for _, x, _ in every]
    left, right = min(*xs, 0.2) / 1.6, max(*xs, 2 * max(ceilings.values()) / copy) * 1.6
    made, axes = figure(6.6, 4.9)
    axis = axes[0, 0]
    for name, ceiling in ceilings.items():
        ridge = ceiling / copy
        roof = [left * copy / scale, ceiling / scale, ceiling / scale]
        axis.loglog([left, ridge, right], roof, color=CEILING, linewidth=1.4)
        text = f"matrix product, {name}"
        axis.annotate(text, (1.2 * ridge, ceiling / scale), ha="left", va="bottom", fontsize=8.5, color=CEILING)
    slope = (left * max(ceilings.values()) / copy) ** 0.5
    axis.annotate(
        "memory",
        (slope, slope * copy / scale),
        xytext=(-5, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=CEILING,
    )
    names = list(points)
    order = sorted(names, key=lambda name: rivals.impl_of(name) is not None)  # ours on top
    for name in order:
        own = rivals.impl_of(name) is not None
        axis.scatter(
            [x for _, x, _ in points[name]],
            [y / scale for _, _, y in points[name]],
            s=34 if own else 20,
            color=color_of(name) if own else "none",
            edgecolors=color_of(name),
            marker=marker(names, name),
            linewidths=1.2,
            zorder=3,
            label=tables.label(name),
        )
    heights = {"info_nce": 9, "byol": 9, "ema": 22}  # the last two lie side by side
    for op in dict.fromkeys(kind for kind, _, _ in every):
        x, y = max(((x, y) for kind, x, y in every if kind == op), key=lambda point: point[1])
        offset = (0, heights[op])
        axis.annotate(
            tables.TITLES[op], (x, y / scale), xytext=offset, textcoords="offset points", ha="center", fontsize=9
        )
    axis.set_xlim(left, right)
    axis.set_xlabel("operations for each byte that has to move")
    axis.set_ylabel("TFLOP/s" if scale == 1e12 else "GFLOP/s")
    log_axis(axis.xaxis, [left, right])
    log_axis(axis.yaxis, [min(y for _, _, y in every) / scale, max(ceilings.values()) / scale])
    made.legend(loc="outside lower center", ncols=legend_columns(points), frameon=False, fontsize=8.5)
    return made
