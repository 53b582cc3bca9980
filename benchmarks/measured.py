"""Reads the committed results, and writes their numbers: shared by the tables and the pictures."""

import json
from pathlib import Path
from typing import NamedTuple

OURS = "selfsup_kernels"
OPS = ("info_nce", "byol", "ema")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PARTS = {"forward": "forward", "backward": "backward", "both": "forward + backward", "update": "update"}
TRIED = ("out of memory", "skipped")
"""How the reasons begin for which a rival that is there has no time."""


class Case(NamedTuple):
    """What the rows of one table, and of one picture, have in common."""

    views: int
    dim: int
    dtype: str

    def title(self):
        return f"{self.views} views, D = {self.dim}, {self.dtype}"


def load(folder, name):
    return json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


def device_folders(results):
    """The folders that hold results of the bench command."""
    return sorted(folder for folder in results.iterdir() if any((folder / f"{op}.json").exists() for op in OPS))


def cases(rows):
    """``{case: its rows}``, by views, dimension and dtype, and inside by batch and part."""
    parts, groups = list(PARTS), {}

    def place(row):
        return row["views"], row["dim"], DTYPES.index(row["dtype"]), row["batch"], parts.index(row["part"])

    for row in sorted(rows, key=place):
        groups.setdefault(Case(row["views"], row["dim"], row["dtype"]), []).append(row)
    return groups


def median(row, name):
    """Milliseconds, or None where the rival has no time in this row."""
    return row["times"][name]["p50_ms"] if name in row["times"] else None


def factor(row, name):
    """A rival's time over ours; None where one of the two is missing."""
    ours, theirs = median(row, OURS), median(row, name)
    return theirs / ours if ours and theirs is not None else None


def peak(row, name):
    return (row.get("peak_bytes") or {}).get(name)


def is_ours(name):
    return name == OURS or name.startswith("impl=")


def why_not(row, name):
    """What stands in the place of a time that is missing, in a word or two."""
    reason = (row.get("unavailable") or {}).get(name)
    if reason is None:
        return "-"
    return next((word for word in (*TRIED, "absent") if reason.lower().startswith(word)), "not possible")


def names(rows):
    """Ours, then our explicit implementations, then the rivals as they were measured.

    Those that are not on this machine, or cannot do any of these cases, have no column.
    """
    found = dict.fromkeys(name for row in rows for name in row["times"])
    for row in rows:
        found |= dict.fromkeys(name for name in row.get("unavailable") or {} if why_not(row, name) in TRIED)
    return sorted(found, key=lambda name: (name != OURS, not is_ours(name)))


def milliseconds(value):
    if value >= 1000:
        return f"{value / 1000:.1f} s" if value >= 10000 else f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def times(value):
    """A factor: ``0.92x``, ``3.1x``, ``713x``."""
    return f"{value:.2f}x" if value < 1 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def rate(tflops):
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.0f} GFLOP/s"


def size(count):
    if count is None:
        return "-"
    if count < 1e6:
        return "< 1 MB"
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def device_name(header):
    threads = header.get("threads")
    return header["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def device_line(header):
    """The device and the versions of a results file, as one line."""
    facts = [header["cpu_capability"]] if header.get("threads") and header.get("cpu_capability") else []
    keys = ("torch",) if header.get("threads") else ("driver", "cuda", "torch", "triton")
    facts += [f"{key} {header[key]}" for key in keys if header.get(key)]
    return ", ".join([device_name(header), *facts, f"measured {header['date']}"]) + "."
