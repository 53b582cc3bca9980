"""Make what a reader sees of rows of results: one sentence, and a table for each operation."""

import math

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench import baselines, results

TITLES = {"info_nce": "InfoNCE", "siglip": "SigLIP", "byol": "BYOL loss", "ema": "EMA update"}
FACTS = {"model": "model", "views": "views", "batch": "B", "dim": "D", "dtype": "dtype"}
MATCH = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Errors up to these, relative to float64, are the rounding of the type."""


def answer(rows):
    """Return ``(sentence, numbers)``: the largest case of forward and backward against its fastest baseline.

    ``numbers`` are up to three pairs of a number and what it is: the ratio of times, the ratio of memory, the share of
    the device's rate.
    """
    measured = [row for row in rows if row["part"] in ("both", "update") and results.ours(row)]
    measured = [row for row in measured if others(row)] or measured
    if not measured:
        return "Nothing was measured: the reasons are below.", []
    first = next(op for op in TITLES if any(row["op"] == op for row in measured))
    row = max((row for row in measured if row["op"] == first), key=lambda row: (row.get("batch"), row.get("numbers")))
    ours, best = results.ours(row), min(others(row), key=lambda name: results.ratio(row, name), default=None)
    text = f"{TITLES[row['op']]} ({facts(row)}) takes {milliseconds(row['times'][ours]['p50_ms'])} ms"
    numbers = []
    if best:
        text += f"; {best}, the fastest baseline, takes {milliseconds(row['times'][best]['p50_ms'])} ms"
        numbers.append((factor(results.ratio(row, best)), f"time of {best} over ours"))
        mine, theirs = row["peak_bytes"].get(ours), row["peak_bytes"].get(best)
        if mine and theirs:
            numbers.append((factor(theirs / mine), f"memory of {best} over ours"))
    if row.get("fraction"):
        of = "matrix product" if "tflops" in row else "memory"
        numbers.append((f"{100 * row['fraction']:.0f} %", f"of the rate of the device's {of}"))
    return text + ".", numbers


def others(row):
    """Return the baselines with a time."""
    return [name for name in row["times"] if not baselines.impl_of(name)]


def facts(row, keys=FACTS):
    return ", ".join(f"{FACTS[key]} {row[key]}" for key in keys if key in row)


def make(op, rows) -> pages.Table:
    """Return the table of one operation; what all rows share goes into the title."""
    rows = [row for row in rows if row["op"] == op]
    varying = [key for key in FACTS if len({row.get(key) for row in rows}) > 1]
    title = f"{TITLES[op]}, {facts(rows[0], [key for key in FACTS if key not in varying])}"
    head = [*(FACTS[key] for key in varying), "part", "", "p20 ms", "p50 ms", "p80 ms", "x ours", "peak"]
    head += ["rate", "of device", "error"]
    lines, styles, notes = [], [], {}
    for row in rows:
        # What has no time is listed with the first part alone; what stands in the line above is not repeated.
        missing = row["unavailable"] if row["part"] in ("forward", "update") else ()
        names = [str(row[key]) for key in varying] + [row["part"]]
        for name in (*row["times"], *missing):
            lines.append(names + cells(row, name))
            styles.append(style(row, name))
            names = [""] * len(names)
        for name, text in (*row["unavailable"].items(), *row["notes"].items()):
            notes[f"{label(name)}: {text}"] = None
    return pages.Table(title, head, lines, styles, list(notes))


def cells(row, name):
    if name not in row["times"]:
        return [label(name), "", status(row["unavailable"][name]), *6 * [""]]
    last, found, rate = row["part"] in ("both", "update"), worst(row, name), ["", ""]
    if name == results.ours(row) and row.get("fraction") is not None:
        speed = flops(1e12 * row["tflops"]) if "tflops" in row else f"{row['gb_per_s']:.3g} GB/s"
        rate = [speed, f"{100 * row['fraction']:.0f} %"]
    return [
        label(name),
        *(milliseconds(row["times"][name][key]) for key in ("p20_ms", "p50_ms", "p80_ms")),
        factor(results.ratio(row, name)),
        size(row["peak_bytes"].get(name)) if last else "",
        *rate,
        "" if found is None or not last else f"{found:.0e}",
    ]


def style(row, name):
    """Return ours, slower (than ours), faster, absent, or wrong: its error is more than rounding."""
    if name not in row["times"]:
        return "absent"
    if (worst(row, name) or 0) > MATCH["float32" if row["op"] == "ema" else row["dtype"]]:
        return "wrong"
    if baselines.impl_of(name):
        return "ours"
    return "faster" if (results.ratio(row, name) or 1) < 1 else "slower"


def worst(row, name):
    """Return the largest error of a column, infinite where one is not finite; None where none is known."""
    found = {key: value for key, value in row["errors"].get(name, {}).items() if key != "rows"}
    return max((math.inf if value is None else value for value in found.values()), default=None)


def label(name):
    if name == baselines.OURS:
        return "ours"
    impl = baselines.impl_of(name)
    return f"ours, {impl}" if impl else name


def status(reason):
    """Return what stands in place of a time, in a word or two."""
    for word in ("out of memory", "skipped", "absent"):
        if word in reason.lower():
            return word
    return "failed" if "Error" in reason.partition(":")[0] else "not possible"


def milliseconds(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def factor(value):
    return "" if value is None else f"{value:.0f}x" if value >= 99.5 else f"{value:.3g}x"


def size(count):
    if count is None or count < 1e6:  # the system counts in pages, and not often
        return "" if count is None else "< 1 MB"
    return f"{count / 1e9:.3g} GB" if count >= 999.5e6 else f"{count / 1e6:.3g} MB"


def flops(value):
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def device_line(header):
    """Return the device and the versions of a run."""
    names = ("cpu_capability", "driver", "cuda", "selfsup_kernels", "torch", "triton", "python")
    pairs = {name: header.get(name) for name in names} | header["peers"]
    threads = [f"{header['threads']} threads"] if header.get("threads") else []
    return ", ".join([header["device"], *threads, *(f"{k} {v}" for k, v in pairs.items() if v), header["date"]])


def rates_line(header):
    """Return the rates of the device in prose."""
    products = [f"{flops(1e12 * value)} ({name})" for name, value in header["matrix_product_tflops"].items()]
    side = header["matrix_product_size"]
    copy, in_place = (f"{header[key]:.0f} GB/s" for key in ("copy_gb_per_s", "in_place_gb_per_s"))
    return f"In the same run: matrix product ({side}²) {', '.join(products)}, copy {copy}, scaling in place {in_place}."


def show(console, header, rows):
    """Print the sentence, the device, a table for each operation and, below each, what is missing and why."""
    made = [make(op, rows) for op in TITLES if any(row["op"] == op for row in rows)]
    pages.show(console, answer(rows)[0], made, about=[device_line(header), rates_line(header)])
