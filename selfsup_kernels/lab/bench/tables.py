"""Make what a reader sees of rows of results: one sentence, and a table for each operation."""

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench import baselines, results
from selfsup_kernels.lab.bench.accuracy import is_different, rounding, worst

TITLES = {"info_nce": "InfoNCE", "siglip": "SigLIP", "byol": "BYOL loss", "ema": "EMA update"}
FACTS = {"objective": "objective", "model": "model", "views": "views", "batch": "B", "dim": "D", "dtype": "dtype"}
FACTOR = "x ours: time of the baseline / time of ours. Memory: the peak above the inputs. Error: against float64."
EAGER_ONLY = "There are no C++ kernels here, so ours is eager PyTorch: python -m selfsup_kernels info says why."
NO_SHARE = (
    '"of device" is empty where the measured rate is not the device\'s limit: a matrix product in a type that the '
    "device has to convert, a slow library, or numbers that fit into a cache."
)


def answer(rows):
    """Return ``(text, numbers)``: the largest case of forward and backward against its fastest baseline, and in how
    many of all cases ours is the fastest.

    ``numbers`` are up to three pairs of a number and what it is: the ratio of times, the ratio of memory, the share of
    the device's rate.
    """
    measured = [row for row in rows if row["part"] in ("both", "update") and results.ours(row)]
    measured = [row for row in measured if others(row)] or measured
    if not measured:
        return "Nothing was measured: the reasons are below.", []
    first = next(op for op in TITLES if any(row["op"] == op for row in measured))
    row = max((row for row in measured if row["op"] == first), key=lambda row: (row.get("batch"), row.get("numbers")))
    ours, best = results.ours(row), fastest(row)
    text = f"{name_of(row)} takes {milliseconds(row['times'][ours]['p50_ms'])} ms"
    numbers = []
    if best:
        text += f"; {best}, the fastest baseline, takes {milliseconds(row['times'][best]['p50_ms'])} ms"
        text += " (not the same loss?)" if is_different(row, best) else ""
        numbers.append((factor(results.ratio(row, best)), f"time of {best} over ours"))
        mine, theirs = row["peak_bytes"].get(ours), row["peak_bytes"].get(best)
        if mine and theirs:
            numbers.append((factor(theirs / mine), f"memory of {best} over ours"))
    if row.get("fraction"):
        of = "matrix product" if "tflops" in row else "memory"
        numbers.append((f"{100 * row['fraction']:.0f} %", f"of the rate of the device's {of}"))
    return f"{text}.{every_case(measured)}", numbers


def every_case(rows) -> str:
    """Return a sentence on all cases with baselines, or "" if there is only one."""
    found = [(row, best) for row in rows if (best := fastest(row)) and not is_different(row, best)]
    ratios = [(results.ratio(row, best), best, row) for row, best in found]
    if len(ratios) < 2:
        return ""
    least, best, row = min(ratios, key=lambda found: found[0])
    if least >= 1:
        return f" Ours is the fastest in all {len(ratios)} cases."
    count = sum(ratio >= 1 for ratio, *_ in ratios)
    times = f"{best} takes {factor(least)} the time of ours"
    return f" Ours is the fastest in {count} of {len(ratios)} cases; the worst is {name_of(row)}: {times}."


def fastest(row):
    """Return the fastest baseline that computes the same loss; without one, the fastest; None without baselines."""
    same = [name for name in others(row) if not is_different(row, name)] or others(row)
    return min(same, key=lambda name: results.ratio(row, name), default=None)


def name_of(row):
    return f"{TITLES[row['op']]} ({facts(row)})"


def others(row):
    """Return the baselines with a time."""
    return [name for name in row["times"] if not baselines.impl_of(name)]


def facts(row, keys=FACTS):
    return ", ".join(f"{FACTS[key]} {row[key]}" for key in keys if key in row)


def make(op, rows) -> pages.Table:
    """Return the table of one operation; what all rows share goes into the title."""
    rows = [row for row in rows if row["op"] == op]
    varying = [key for key in FACTS if len({row.get(key) for row in rows}) > 1]
    title = ", ".join(filter(None, [TITLES[op], facts(rows[0], [key for key in FACTS if key not in varying])]))
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
    if any("fraction" not in row for row in rows if results.ours(row)):
        notes[NO_SHARE] = None
    return pages.Table(title, head, lines, styles, list(notes))


def cells(row, name):
    if name not in row["times"]:
        return [label(name), "", status(row["unavailable"][name]), *6 * [""]]
    last, found, rate = row["part"] in ("both", "update"), worst(row, name), ["", ""]
    if name == results.ours(row) and ("tflops" in row or "gb_per_s" in row):
        speed = flops(1e12 * row["tflops"]) if "tflops" in row else f"{row['gb_per_s']:.3g} GB/s"
        rate = [speed, f"{100 * row['fraction']:.0f} %" if row.get("fraction") else ""]
    return [
        label(name),
        *(milliseconds(row["times"][name][key]) for key in ("p20_ms", "p50_ms", "p80_ms")),
        factor(results.ratio(row, name)),
        size(row["peak_bytes"].get(name)) if last else "",
        *rate,
        "" if found is None or not last else f"{found:.0e}{' ?' * is_different(row, name)}",
    ]


def style(row, name):
    """Return ours, slower (than ours), faster, absent, or wrong: its error is more than rounding."""
    if name not in row["times"]:
        return "absent"
    if (worst(row, name) or 0) > rounding(row):
        return "wrong"
    if baselines.impl_of(name):
        return "ours"
    return "faster" if (results.ratio(row, name) or 1) < 1 else "slower"


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
    """Return the device, the versions and the commit of a run."""
    names = ("driver", "cuda", "selfsup_kernels", "commit", "torch", "triton", "python")
    pairs = {name: header.get(name) for name in names} | header["peers"]
    threads = [f"{header['threads']} threads"] if header.get("threads") else []
    threads += [header["cpu_capability"]] if header.get("cpu_capability") else []
    return ", ".join([header["device"], *threads, *(f"{k} {v}" for k, v in pairs.items() if v), header["date"]])


def is_eager(header) -> bool:
    """Tell whether ours was measured without its C++ kernels."""
    return header.get("cpu_capability") == results.PURE


def rates_line(header):
    """Return the rates of the device in prose."""
    sides, products = header["matrix_product_size"], []
    for name, value in header["matrix_product_tflops"].items():
        products.append(f"{flops(1e12 * value)} ({name}, {sides[name] if isinstance(sides, dict) else sides}²)")
    copy, in_place = (f"{header[key]:.0f} GB/s" for key in ("copy_gb_per_s", "in_place_gb_per_s"))
    return f"In the same run: matrix product {', '.join(products)}, copy {copy}, scaling in place {in_place}."


def show(console, header, rows):
    """Print the device, a table for each operation with what is missing and why, and last the sentence."""
    made = [make(op, rows) for op in TITLES if any(row["op"] == op for row in rows)]
    first = [EAGER_ONLY] if is_eager(header) else []
    about = [*first, device_line(header), rates_line(header), FACTOR]
    pages.show(console, about[0], made, about=about[1:])


def show_answer(console, rows):
    console.print(answer(rows)[0], style="bold", highlight=False, soft_wrap=True, markup=False)
