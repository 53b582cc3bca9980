"""What the tables of the documents are made of: cases, and the cells that show their times, memory and rates."""

import json
from pathlib import Path
from typing import NamedTuple

from selfsup_kernels.lab.bench import baselines
from selfsup_kernels.lab.bench.baselines import OURS
from selfsup_kernels.lab.bench.results import ratio
from selfsup_kernels.lab.bench.tables import status

LABELS = {"info_nce": "InfoNCE", "siglip": "SigLIP", "byol": "BYOL loss", "ema": "EMA"}
DTYPES = ("float32", "bfloat16", "float16", "float64")
PARTS = {"forward": "forward", "backward": "backward", "both": "forward + backward", "update": "update"}

PLAIN = "supcon_out"
"""The objective of rows that name none."""


class Case(NamedTuple):
    """Name what the rows of one table, and of one picture, have in common."""

    views: int
    dim: int
    dtype: str
    objective: str = PLAIN

    def title(self):
        other = "" if self.objective == PLAIN else f"{self.objective}, "
        return f"{other}{counted(self.views, 'view')}, D = {self.dim}, {self.dtype}"


def case_of(row):
    return Case(row["views"], row["dim"], row["dtype"], row.get("objective", PLAIN))


def load(folder, name):
    """Read a file of results, without the columns of kernels that the package no longer has (``removed`` in its
    header). Where the removed one was the default, the other kernel of that run is ours."""
    data = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    removed = data["header"].get("removed", ())
    for row in data["rows"] if removed else ():
        if OURS in removed:
            _other_kernel_is_ours(row)
            continue
        for column in PER_COLUMN:
            row[column] = {key: value for key, value in row.get(column, {}).items() if key not in removed}
    return data


PER_COLUMN = ("times", "peak_bytes", "errors", "graph_ms")


def _other_kernel_is_ours(row):
    """Rename the kernel that has a column of its own, and scale the rates, which are of ours."""
    other = next((name for name in row["times"] if baselines.impl_of(name) and name != OURS), None)
    rates = {"times": ("tflops", "gb_per_s", "fraction"), "graph_ms": ("graph_fraction",)}
    for column, keys in rates.items():
        before, after = (row.get(column, {}).get(name) for name in (OURS, other))
        faster = 0.0
        if before and after:
            faster = before["p50_ms"] / after["p50_ms"] if column == "times" else before / after
        row |= {key: row[key] * faster or None for key in keys if row.get(key)}
    for column in PER_COLUMN:
        cells = row.get(column, {})
        ours = {OURS: cells[other]} if other in cells else {}
        row[column] = ours | {key: value for key, value in cells.items() if key not in (OURS, other)}


def cases(rows):
    """Return ``{case: its rows}``, by objective, views, dimension and dtype, and inside by batch and part."""
    parts, groups = list(PARTS), {}

    def place(row):
        case = case_of(row)
        objective = "" if case.objective == PLAIN else case.objective  # the default first
        sizes = case.views, case.dim, DTYPES.index(case.dtype)
        return objective, *sizes, row["batch"], parts.index(row["part"])

    for row in sorted(rows, key=place):
        groups.setdefault(case_of(row), []).append(row)
    return groups


def names(rows):
    """Return the columns: ours, our explicit implementations, the baselines, without those that no case can have."""
    found = dict.fromkeys(name for row in rows for name in row["times"])
    for row in rows:
        found |= dict.fromkeys(
            n for n, why in row["unavailable"].items() if status(why) in ("out of memory", "skipped")
        )
    return sorted(found, key=lambda name: (name != OURS, not baselines.impl_of(name)))


def table(head, lines):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(x) + " |" for x in lines)]


def milliseconds(value):
    if value >= 1000:
        return f"{value / 1000:.1f} s" if value >= 10000 else f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def times(value):
    """Write a factor: ``0.92x``, ``3.1x``, ``713x``."""
    return f"{value:.2f}x" if value < 1 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def tflops(value):
    return f"{value:.3g} TFLOP/s" if value >= 1 else f"{1000 * value:.0f} GFLOP/s"


def size(count):
    if count is None or count < 1e6:
        return "-" if count is None else "< 1 MB"
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def peak(row, name):
    return row.get("peak_bytes", {}).get(name)


def why_not(row, name):
    """Return what stands in place of a number, in a word or two."""
    return status(row["unavailable"][name]) if name in row["unavailable"] else "-"


def time_cell(row, name):
    if name not in row["times"]:
        return why_not(row, name)
    over = "" if baselines.impl_of(name) or ratio(row, name) is None else f" ({times(ratio(row, name))})"
    return milliseconds(row["times"][name]["p50_ms"]) + over


def rate_cell(row):
    """Return what ours reached, and the share of the rate that was measured in the same run."""
    if "tflops" not in row and "gb_per_s" not in row:
        return "-"
    rate = tflops(row["tflops"]) if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
    return rate if row.get("fraction") is None else f"{rate}, {row['fraction']:.0%}"


def graph_cell(row):
    """Return ours as a replayed CUDA graph, which is what the GPU needs, and the others' times over it."""
    found = row.get("graph_ms") or {}
    if row["part"] not in ("both", "update") or OURS not in found:
        return "-"
    others = [f"{name} {times(value / found[OURS])}" for name, value in found.items() if not baselines.impl_of(name)]
    return milliseconds(found[OURS]) + (f" ({', '.join(others)})" if others else "")


def counted(number, what):
    return f"{number} {what}{'s' * (number != 1)}"


def where(row):
    if row["op"] == "ema":
        return f"{row['model']}, {row['source']}"
    other = "" if case_of(row).objective == PLAIN else f"{row['objective']}, "
    return f"{other}{counted(row['views'], 'view')}, B = {row['batch']}, D = {row['dim']}, {row['dtype']}"


def device_name(header):
    threads = header.get("threads")
    return header["device"] + (f", {counted(threads, 'thread')}" if threads else "")


def device_line(header):
    """Write the device and the versions of a results file, as one line."""
    facts = [header["cpu_capability"]] if header.get("threads") and header.get("cpu_capability") else []
    keys = ("torch",) if header.get("threads") else ("driver", "cuda", "torch", "triton")
    facts += [f"{key} {header[key]}" for key in keys if header.get(key)]
    facts += [f"commit {header['commit']}"] if header.get("commit") else []
    return ", ".join([device_name(header), *facts, f"measured {header['date']}"]) + "."
