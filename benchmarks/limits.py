"""What limits an op on a GPU at a batch size: the host, the memory or the matrix products. ``tables.py`` writes the
table and draws the picture from the results.

A call takes what the host needs to launch its kernels, or what the GPU needs to run them, whichever is longer. The
GPU's part is the time of a replayed CUDA graph (``graph_ms``), in which the host launches nothing.
"""

from cells import LABELS, milliseconds, times

from selfsup_kernels.lab.bench.baselines import OURS
from selfsup_kernels.lab.bench.results import ratio
from selfsup_kernels.lab.pages.figures import EAGER, figure, log_axis
from selfsup_kernels.lab.pages.figures import OURS as OURS_COLOR

HOST, MEMORY, MATRIX = LIMITS = ("host", "memory", "matrix products")
OF_OP = {"info_nce": MATRIX, "siglip": MATRIX, "byol": MEMORY, "ema": MEMORY}
BUSY = 2 / 3
"""A call whose GPU works for a smaller part of its time is limited by the host."""


def called(row, name=OURS):
    return row["times"][name]["p50_ms"] if name in row["times"] else None


def on_gpu(row, name=OURS):
    return (row.get("graph_ms") or {}).get(name)


def limit(row) -> str:
    """Return what limits ours. Large cases have no graph: their times are far above what the host needs."""
    gpu = on_gpu(row)
    return HOST if gpu is not None and gpu < BUSY * called(row) else OF_OP[row["op"]]


def groups(rows):
    """Return ``{(dtype or model, D): rows by batch}`` of whole calls."""
    found = {}
    for row in sorted(rows, key=lambda row: (row.get("dtype", ""), row.get("dim") or 0)):
        if row["part"] in ("both", "update") and OURS in row["times"]:
            key = (
                (row["model"], row["source"])
                if row["op"] == "ema"
                else (f"D = {row['dim']}", row["dtype"], row.get("objective"))
            )
            found.setdefault(key, []).append(row)
    return {key: sorted(some, key=lambda row: row.get("batch") or 0) for key, some in found.items()}


def lines(op, rows):
    """Return the lines of the table: the cases of each limit, with the time of ours and eager's over it."""

    def cell(row):
        baseline = "foreach_lerp" if op == "ema" else "eager"
        factor = ratio(row, baseline)
        size = "" if op == "ema" else f"{row['batch']}: "
        share = "" if row.get("fraction") is None else f", {row['fraction']:.0%}"
        gpu = f", GPU {milliseconds(on_gpu(row))}" if limit(row) == HOST else share
        return f"{size}{milliseconds(called(row))}{gpu}" + (f" ({times(factor)})" if factor else "")

    made = []
    for key, some in groups(rows).items():
        cells = ["<br>".join(cell(row) for row in some if limit(row) == kind) for kind in LIMITS]
        made.append([f"{LABELS[op]}, {', '.join(filter(None, key))}", *cells])
    return made


def shown(rows):
    """Return the rows of the picture: two views in bfloat16, D = 256."""
    kinds = {"op": "info_nce", "views": 2, "dim": 256, "dtype": "bfloat16", "part": "both"}
    plain = [row for row in rows if row.get("objective") in (None, "supcon_out") and OURS in row["times"]]
    found = [row for row in plain if all(row[key] == value for key, value in kinds.items())]
    return sorted(found, key=lambda row: row["batch"])


def picture(rows, header):
    """Draw what a call takes and what its GPU needs over the rows, and what a matrix product's rate allows."""
    counts = [row["views"] * row["batch"] for row in rows]
    rate = header["matrix_product_tflops"]["bfloat16"] * 1e12
    made, axes = figure(5.2, 3.9)
    axis = axes[0, 0]
    eager = [(n, called(row, "eager")) for n, row in zip(counts, rows, strict=True) if called(row, "eager")]
    gpu = [(n, on_gpu(row) or called(row)) for n, row in zip(counts, rows, strict=True)]
    least = [(n, 1e3 * 4 * n**2 * rows[0]["dim"] / rate) for n in counts]
    axis.loglog(*zip(*eager, strict=True), color=EAGER, marker="o", label="eager, a call")
    axis.loglog(counts, [called(row) for row in rows], color=OURS_COLOR, marker="o", label="ours, a call")
    axis.loglog(*zip(*gpu, strict=True), color=OURS_COLOR, marker="o", linestyle=":", label="ours, the GPU's part")
    axis.loglog(*zip(*least, strict=True), color="#7d8590", linestyle="--", label="4 M²D at the matrix product's rate")
    for kind in (HOST, MATRIX):
        limited = [n for n, row in zip(counts, rows, strict=True) if limit(row) == kind]
        if len(limited) < 2:  # one point is no band
            continue
        start, end, text = limited[0], limited[-1], kind
        axis.axvspan(start, end, color=OURS_COLOR, alpha=0.07, linewidth=0)
        axis.text((start * end) ** 0.5, 0.97, text, transform=axis.get_xaxis_transform(), ha="center", va="top")
    axis.set_xticks(counts, counts)
    axis.set_xlabel("rows M (all views)")
    axis.set_title(
        f"What limits a call (ms), {header['device']}\nD = {rows[0]['dim']}, bfloat16", fontsize=10, loc="left"
    )
    log_axis(axis.yaxis, [y for _, y in [*eager, *gpu, *least]])
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return made
