"""What a reader sees of the rows of one operation: titles, columns and cells, for the terminal and for the page."""

import math
from typing import NamedTuple

from selfsup_kernels.lab.bench import results, rivals

TITLES = {"info_nce": "InfoNCE", "byol": "BYOL loss", "ema": "EMA update"}
PARTS = {"forward": "forward", "backward": "backward", "both": "both", "update": "update"}
FACTS = {"model": "model", "views": "views", "batch": "B", "dim": "D", "dtype": "dtype"}
MATCH = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Errors up to these, relative to float64, are the rounding of the type."""


class Line(NamedTuple):
    """One line of a table. ``style``: ours, slower (than ours), faster, or absent."""

    cells: list[str]
    style: str
    wrong: bool
    """Whether its error is more than rounding."""
    first: bool
    """Whether it is the first one of its case and part."""


class Table(NamedTuple):
    op: str
    title: str
    head: list[str]
    lines: list[Line]
    notes: list[str]


def make(op, rows) -> Table:
    """The rows of one operation; what all of them share goes into the title."""
    rows = [row for row in rows if row["op"] == op]
    varying = [key for key in FACTS if len({row.get(key) for row in rows}) > 1]
    title = ", ".join(
        [TITLES[op], *(fact(key, rows[0][key]) for key in FACTS if key in rows[0] and key not in varying)]
    )
    head = [*(FACTS[key] for key in varying), "part", "", "p20 ms", "p50 ms", "p80 ms", "x ours", "peak"]
    head += ["rate", "of device", "error"]
    lines, before = [], None
    for row in rows:
        # What has no time is listed with the first part alone; what stands in the line above is not repeated.
        missing = row["unavailable"] if row["part"] in ("forward", "update") else ()
        for name in (*row["times"], *missing):
            facts = [str(row[key]) for key in varying]
            same = [*facts, row["part"]] == before
            before = [*facts, row["part"]]
            shown = [""] * len(before) if same else [*facts, PARTS[row["part"]]]
            lines.append(Line(shown + cells(row, name), style(row, name), wrong(row, name), not same))
    return Table(op, title, head, lines, list(remarks(rows, varying)))


def fact(key, value):
    return f"{value} views" if key == "views" else f"{FACTS[key]} = {value}" if key in ("batch", "dim") else str(value)


def cells(row, name):
    if name not in row["times"]:
        return [label(name), "", status(row["unavailable"][name]), "", "", "", "", "", ""]
    times = row["times"][name]
    last = row["part"] in ("both", "update")
    rate, fraction = rate_of(row, name)
    return [
        label(name),
        *(milliseconds(times[key]) for key in ("p20_ms", "p50_ms", "p80_ms")),
        factor(results.ratio(row, name)),
        size(row["peak_bytes"].get(name)) if last else "",
        rate,
        "" if fraction is None else f"{100 * fraction:.0f} %",
        error(row, name) if last else "",
    ]


def rate_of(row, name):
    """``("104 GB/s", fraction of the device's)`` of a column, counting for all the work that ours does; ``("", None)``
    where there is none."""
    if row.get("fraction") is None:
        return "", None
    share = 1 / results.ratio(row, name)
    text = flops(1e12 * share * row["tflops"]) if "tflops" in row else f"{share * row['gb_per_s']:.3g} GB/s"
    return text, share * row["fraction"]


def style(row, name):
    if name not in row["times"]:
        return "absent"
    if rivals.impl_of(name):
        return "ours"
    ratio = results.ratio(row, name)
    return "" if ratio is None else "faster" if ratio < 1 else "slower"


def worst(row, name):
    """The largest error of a column, infinite where one is not finite; None where none is known."""
    found = row["errors"].get(name, {})
    values = [math.inf if value is None else value for key, value in found.items() if key != "rows"]
    return max(values, default=None)


def wrong(row, name):
    value = worst(row, name)
    return value is not None and not value <= MATCH["float32" if row["op"] == "ema" else row["dtype"]]


def error(row, name):
    value = worst(row, name)
    return "" if value is None else f"{value:.0e}"


def remarks(rows, varying):
    """Why something was not measured, and what is to be known of a rival: each once, with the cases it is about."""
    found = {}
    for row in rows:
        where = " ".join(f"{FACTS[key]} {row[key]}" for key in varying)
        for name, text in (*row["unavailable"].items(), *row["notes"].items()):
            found.setdefault((name, text), []).append(where)
    everywhere = {" ".join(f"{FACTS[key]} {row[key]}" for key in varying) for row in rows}
    for (name, text), places in found.items():
        places = list(dict.fromkeys(places))
        yield f"{label(name)}: {text}" + ("" if set(places) == everywhere else f" ({'; '.join(places)})")


def label(name):
    impl = rivals.impl_of(name)
    return "ours" if name == rivals.OURS else f"ours, {impl}" if impl else name


def status(reason):
    """What stands in the place of a time, in a word or two."""
    for word in ("out of memory", "skipped", "absent"):
        if word in reason.lower():
            return word
    return "failed" if "Error" in reason.partition(":")[0] else "not possible"


def milliseconds(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def duration(value):
    """Of ms, in prose."""
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms" if value >= 99.5 else f"{value:.2g} ms"


def factor(value):
    if value is None:
        return ""
    return f"{value:.0f}x" if value >= 99.5 else f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def size(count):
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return "< 1 MB"  # the system counts in pages, and not often


def device_line(header):
    """The device, the versions and the rates of a run, in two lines of prose."""
    place = [header["device"]]
    if header.get("threads"):
        place += [f"{header['threads']} thread{'s' * (header['threads'] > 1)}", str(header.get("cpu_capability") or "")]
    place += [f"{key} {header[key]}" for key in ("driver", "cuda") if header.get(key)]
    versions = [f"{key} {header[key]}" for key in ("selfsup_kernels", "torch", "triton", "python") if header.get(key)]
    peers = [f"{name} {version}" for name, version in header.get("peers", {}).items()]
    return "; ".join([", ".join(filter(None, place)), ", ".join(versions + peers), header["date"]])


def rates_line(header):
    products = [flops(1e12 * value) + f" ({name})" for name, value in header["matrix_product_tflops"].items()]
    size = header["matrix_product_size"]
    return (
        f"In the same run a product of two {size} x {size} matrices reached {', '.join(products)}, "
        f"a copy {header['copy_gb_per_s']:.0f} GB/s, scaling in place {header['in_place_gb_per_s']:.0f} GB/s (read and "
        "written)."
    )


def bandwidth(header):
    """The rate of memory that fractions refer to: of a copy on a GPU, of scaling in place on a CPU."""
    return header["copy_gb_per_s" if header["kind"] == "cuda" else "in_place_gb_per_s"]


def flops(value):
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"
