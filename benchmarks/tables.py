"""Write the tables and pictures of README.md and docs/ from the committed results: no number there without a file.

    python benchmarks/tables.py [--check]

Between ``<!-- results:FOLDER/NAME -->`` and ``<!-- end -->`` stands a table of that file of results, after
``<!-- pictures:FOLDER -->`` the picture of InfoNCE, after ``<!-- limits:FOLDER -->`` what limits each call (with
``/picture``: its picture alone), after ``<!-- performance -->`` the sections of all devices, and inside a line, after
``<!-- says:FOLDER/NAME -->``, words about that file. After ``<!-- curve:FOLDER/METHOD -->`` stands the curve of a
method, after ``<!-- gallery -->`` every picture with a sentence. ``--check`` fails where a page or a picture differs
from what the files say.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import curve_pages
import limits

from selfsup_kernels.lab.bench import baselines
from selfsup_kernels.lab.bench.baselines import OURS
from selfsup_kernels.lab.bench.results import ratio
from selfsup_kernels.lab.bench.tables import status

ROOT = Path(__file__).resolve().parent.parent
KINDS = "results|performance|pictures|limits|says|curve|gallery"
MARKER = re.compile(rf"(<!-- ({KINDS})(?::(\S+))? -->).*?(<!-- end -->)", re.DOTALL)
LABELS = {"info_nce": "InfoNCE", "siglip": "SigLIP", "byol": "BYOL loss", "ema": "EMA"}
DTYPES = ("float32", "bfloat16", "float16", "float64")
PARTS = {"forward": "forward", "backward": "backward", "both": "forward + backward", "update": "update"}
FEWEST = 3
"""Batch sizes that make a curve."""


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
        return f"{other}{self.views} views, D = {self.dim}, {self.dtype}"


def case_of(row):
    return Case(row["views"], row["dim"], row["dtype"], row.get("objective", PLAIN))


def load(folder, name):
    return json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


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


# ---------------------------------------------------------------- cells


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


def where(row):
    if row["op"] == "ema":
        return f"{row['model']}, {row['source']}"
    other = "" if case_of(row).objective == PLAIN else f"{row['objective']}, "
    return f"{other}{row['views']} views, B = {row['batch']}, D = {row['dim']}, {row['dtype']}"


# ---------------------------------------------------------------- short tables


def short_loss(rows):
    """Make README's table: forward + backward of float32 rows, two views; of the quadratic ones the memory too."""
    plain = [r for r in rows if case_of(r).objective == PLAIN]
    rows = [r for r in plain if (r["views"], r["dtype"], r["part"]) == (2, "float32", "both")]
    columns = [OURS, *(n for n in ("eager", "compile") if any(n in r["times"] for r in rows))]
    peaks = (OURS, "eager") if rows and rows[0]["op"] in ("info_nce", "siglip") else ()
    lines = []
    for r in sorted(rows, key=lambda r: (r["dim"], r["batch"])):
        cells = [time_cell(r, n) for n in columns] + [size(peak(r, n)) for n in peaks]
        lines.append([f"{r['batch']}, {r['dim']}", *cells])
    return table(["B, D", "ours", *columns[1:], *(("memory: ours", "eager") if peaks else ())], lines)


def short_ema(rows):
    """Make README's table: ours and the fastest baseline of each row."""
    lines = []
    for row in rows:
        others = {n: found["p50_ms"] for n, found in row["times"].items() if not baselines.impl_of(n)}
        best = min(others, key=others.get, default=None)
        fastest = f"`{best}` {time_cell(row, best)}" if best else "-"
        lines.append([f"{row['model']}, {row['source']}", time_cell(row, OURS), fastest, rate_cell(row)])
    return table(["model, source", "ours", "fastest baseline", "of the bandwidth"], lines)


def compat(rows):
    head = ["drop-in for", "version", "B", "ours", "original", "factor", "memory: ours", "original"]
    lines = []
    for row in rows:
        both = [milliseconds(row["times"][name]["p50_ms"]) for name in (OURS, "original")]
        peaks = [size(peak(row, name)) for name in (OURS, "original")]
        factor = times(ratio(row, "original"))
        lines.append([row["name"], row["version"], str(row["batch"] or "-"), *both, factor, *peaks])
    return table(head, lines)


def compat_words(rows, header):
    """Write the range of the factors, with the drop-ins at its ends."""
    rows = sorted(rows, key=lambda row: ratio(row, "original"))
    factors = [ratio(row, "original") for row in rows]
    least, most = (f"{times(factors[i])[:-1]} times ({rows[i]['name']}, B = {rows[i]['batch']})" for i in (0, -1))
    return (
        f"between {least} and {most} as fast as its original;"
        f" the median of {len(rows)} is {statistics.median(factors):.1f} times"
    )


def loss_words(rows, header):
    """Write how ours compares with eager PyTorch at the largest batch at which both were measured."""
    case = Case(2, 256, "bfloat16") if header.get("kind") == "cuda" else Case(2, 128, "float32")
    row = max((r for r in cases(rows)[case] if r["part"] == "both" and ratio(r, "eager")), key=lambda r: r["batch"])
    sizes = f"B = {row['batch']}, D = {row['dim']}, {row['dtype']}"
    ours, eager = (size(peak(row, name)) for name in (OURS, "eager"))
    return (
        f"**{times(ratio(row, 'eager'))[:-1]} times as fast as eager PyTorch, with {ours} in place of {eager}**"
        f" (NT-Xent, forward and backward, {sizes}; {device_name(header)}, commit {header['commit']})."
    )


def scaling(rows):
    head = ["ranks", "rows", "received", "by the formula", "memory", "CPU time, of one rank's", "gradient, off by"]
    lines = []
    for row in rows:
        alone = next(r for r in rows if r["rows"] == row["rows"])
        sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("received_bytes", "model_received_bytes")]
        share = f"{row['processor_ms'] / alone['processor_ms']:.2f}"
        line = [str(row["processes"]), str(row["rows"]), *sizes, f"{row['peak_bytes'] / 1e6:.0f} MB", share]
        lines.append([*line, f"{row['gradient_error']:.1e}"])
    return table(head, lines)


def pairs(rows):
    """Make the table of benchmarks/pairs.py: a line for each form of the call, a column for each objective."""
    objectives, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("objective", "form"))
    found = {(row["form"], row["objective"]): row for row in rows}

    def cell(row):
        return f"{milliseconds(row['p50_ms'])} ({row['of_plain']:.2f}x)"

    return table(
        ["", *(f"`{objective}`" for objective in objectives)],
        [[form, *(cell(found[form, objective]) for objective in objectives)] for form in forms],
    )


TABLES = {"info_nce": short_loss, "siglip": short_loss, "byol": short_loss, "ema": short_ema}
WORDS = {"compat": compat_words, "info_nce": loss_words}
TABLES |= {"compat": compat, "scaling": scaling, "pairs": pairs}


# ---------------------------------------------------------------- the sections of docs/performance.md


def section(folder, shown):
    """Make the section of one device, as Markdown lines; ``shown`` has an image for each (op, case)."""
    found = {op: load(folder, op) for op in LABELS if (folder / f"{op}.json").exists()}
    header = next(iter(found.values()))["header"]
    lines = [f"## {device_name(header)}", "", *facts(header), ""]
    for op in ("info_nce", "siglip", "byol"):
        lines += [*headline(op, found[op]["rows"]), ""] if op in found else []
    lines += ["### Where ours is slower", "", *slower(found)]
    for op, data in found.items():
        lines += ["", f"### {LABELS[op]}"]
        if facts(data["header"])[0] != facts(header)[0]:  # measured in another run
            lines += ["", *facts(data["header"])]
        if op == "ema":
            lines += ["", *times_table(data["rows"])]
        for case, rows in cases(data["rows"]).items() if op != "ema" else ():
            lines += ["", f"#### {case.title()}", ""]
            lines += [shown[op, case], ""] if (op, case) in shown else []
            lines += [*times_table(rows), *memory_table(case, rows)]
        lines += [*absences(data["rows"]), *errors(data["rows"])]
    return lines


def device_name(header):
    threads = header.get("threads")
    return header["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def device_line(header):
    """Write the device and the versions of a results file, as one line."""
    facts = [header["cpu_capability"]] if header.get("threads") and header.get("cpu_capability") else []
    keys = ("torch",) if header.get("threads") else ("driver", "cuda", "torch", "triton")
    facts += [f"{key} {header[key]}" for key in keys if header.get(key)]
    facts += [f"commit {header['commit']}"] if header.get("commit") else []
    return ", ".join([device_name(header), *facts, f"measured {header['date']}"]) + "."


def facts(header):
    """Write what the numbers below were measured on."""
    lines = [device_line(header)]
    if header["peers"]:
        lines.append(f"Compared with: {', '.join(f'{name} {v}' for name, v in sorted(header['peers'].items()))}.")
    rates = [f"{tflops(value)} ({dtype})" for dtype, value in header["matrix_product_tflops"].items()]
    lines.append(f"A large matrix product ran at {', '.join(rates)} in the same run.")
    for key, what in (("copy_gb_per_s", "A copy"), ("in_place_gb_per_s", "Scaling numbers in place")):
        lines.append(f"{what} ran at {header[key]:.0f} GB/s, read and written bytes together.")
    return lines


def headline(op, rows):
    """Write one sentence, of the first case at the largest batch at which eager PyTorch was measured."""
    both = [r for r in next(iter(cases(rows).values())) if r["part"] == "both" and ratio(r, "eager")]
    if not both:
        return []
    row = both[-1]
    cells = [
        f"{label} {time_cell(row, n)} and {size(peak(row, n))}" for label, n in (("ours", OURS), ("eager", "eager"))
    ]
    return [f"{LABELS[op]}, {where(row)}, forward + backward: {', '.join(cells)}."]


def times_table(rows):
    op, columns = rows[0]["op"], names(rows)
    graph = any(graph_cell(row) != "-" for row in rows)
    lines = []
    for row in rows:
        if op == "ema":
            name = f"{row['model']}, {row['tensors']} tensors, {row['source']} to {row['target']}"
        else:
            name = f"{row['batch']}, {PARTS[row['part']]}"
        cells = [time_cell(row, n) for n in columns] + ([graph_cell(row)] if graph else [])
        lines.append([name, *cells, rate_cell(row)])
    rate = "of a matrix product" if op in ("info_nce", "siglip") else "of the bandwidth"
    return table(["model" if op == "ema" else "B", *columns, *(["CUDA graph"] if graph else []), rate], lines)


def memory_table(case, rows):
    both = [r for r in rows if r["part"] == "both" and any(r["peak_bytes"].values())]
    if not both:
        return []
    columns = names(both)
    width = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    lines = []
    for row in both:
        cells = [size(peak(row, n)) if peak(row, n) is not None else why_not(row, n) for n in columns]
        ours, inputs = peak(row, OURS), case.views * row["batch"] * case.dim * width
        lines.append([str(row["batch"]), *cells, f"{ours / inputs:.1f}x" if ours is not None else "-"])
    head = ["B", *columns, "ours, times the embeddings"]
    return ["", "Most memory of forward + backward, above the inputs:", "", *table(head, lines)]


def absences(rows):
    """Write why a time is missing, and what has to be known of a baseline: each reason once, with where it applies."""
    found = {}
    for row in rows:
        for pair in row["unavailable"].items():
            found.setdefault(pair, []).append(where(row))
        for pair in row["notes"].items():
            found.setdefault(pair, [])
    lines = []
    for (name, text), places in found.items():
        places = list(dict.fromkeys(places))
        everywhere = not places or len(places) == len({where(row) for row in rows})
        shown = "; ".join(places) if len(places) <= 3 else f"{len(places)} cases"
        lines.append(f"- {name}: {text}" + ("" if everywhere else f" ({shown})"))
    return ["", *lines] if lines else []


def errors(rows):
    """Make the table of the largest error of each baseline against float64; JSON has None for what is not finite."""
    worst = {}
    for row in rows:
        for name, values in row["errors"].items():
            found = worst.setdefault((row["dtype"], name), {})
            for key in values.keys() - {"rows"}:
                found[key] = max(found.get(key, 0.0), math.inf if values[key] is None else values[key])
    if not worst:
        return []
    keys = [key for key in ("loss", "gradient", "value") if any(key in values for values in worst.values())]
    lines = [
        [dtype, name, *(f"{values[k]:.0e}" if k in values else "-" for k in keys)]
        for (dtype, name), values in sorted(worst.items(), key=lambda item: (item[0][0], item[0][1] != OURS))
    ]
    title = "Largest error over the rows above, relative to float64:"
    return ["", title, "", *table(["dtype", "", *keys], lines)]


def slower(found):
    """Make the table of the cases in which a baseline is faster than ours, by case and baseline, the worst first."""
    groups = {}
    for op, data in found.items():
        for row in data["rows"]:
            case = f"{row['model']}, {row['source']} to {row['target']}" if op == "ema" else ""
            case = case or case_of(row).title()
            for name in row["times"]:
                if not baselines.impl_of(name) and (ratio(row, name) or 1) < 1:
                    groups.setdefault((f"{LABELS[op]}, {case}", name), []).append(row)
    if not groups:
        return ["In none of the cases below."]
    lines = []
    for (case, name), rows in sorted(groups.items(), key=lambda item: min(ratio(row, item[0][1]) for row in item[1])):
        spots = ["update" if r["op"] == "ema" else f"{r['batch']} {PARTS[r['part']]}" for r in rows]
        worst = min(range(len(rows)), key=lambda i: ratio(rows[i], name))
        pair = f"{time_cell(rows[worst], OURS)}, {name} {time_cell(rows[worst], name)}"
        lines.append([case, name, "; ".join(spots), f"{spots[worst]}: {pair}" if len(rows) > 1 else pair])
    return table(["case", "baseline", "where", "the worst"], lines)


# ---------------------------------------------------------------- pictures


def pictures(folder, images):
    """Return ``{(op, case): (path, rows of forward + backward)}`` of the cases with enough batch sizes."""
    made = {}
    for op in ("info_nce", "byol"):
        for case, rows in cases(load(folder, op)["rows"] if (folder / f"{op}.json").exists() else []).items():
            both = [row for row in rows if row["part"] == "both" and row["times"]]
            if len(both) >= FEWEST:
                made[op, case] = (images / f"{folder.name}-{op}-{name_of(case)}-time.png", both)
    return made


def name_of(case):
    other = "" if case.objective == PLAIN else f"{case.objective}-"
    return f"{other}{case.views}x{case.dim}-{case.dtype}"


def limits_of(folder, images):
    """Return (path, rows, header) of the picture of what limits calls, or None: it is for GPUs."""
    data = load(folder, "info_nce") if (folder / "info_nce.json").exists() else {"header": {}, "rows": []}
    rows = limits.shown(data["rows"])
    if data["header"].get("kind") != "cuda" or not rows:
        return None
    return images / f"{folder.name}-limits.png", rows, data["header"]


def digest(shown):
    """Return the digest that a picture holds of what it shows: other versions of matplotlib make other bytes of it."""
    return hashlib.sha256(json.dumps(["3", shown], sort_keys=True).encode()).hexdigest()


def is_current(path, shown):
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Digest") == digest(shown)


def save(path, shown, figure):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Software would hold matplotlib's version.
    figure.savefig(path, format="png", dpi=144, metadata={"Software": None, "Digest": digest(shown)})


# ---------------------------------------------------------------- pages


class Documents:
    """The pages of a checkout, and its results."""

    def __init__(self, root=ROOT):
        self.root = Path(root)
        self.results, self.images = self.root / "benchmarks" / "results", self.root / "docs" / "images"
        self.pages = [self.root / "README.md", *sorted((self.root / "docs").rglob("*.md"))]
        folders = sorted(self.results.iterdir())
        self.folders = [f for f in folders if any((f / f"{op}.json").exists() for op in LABELS)]

    def shown(self, folder, page):
        """Return ``{(op, case): an image}``, whose path is relative to ``page``."""
        made = {}
        for (op, case), (path, _) in pictures(folder, self.images).items():
            source = self.source(path, page)
            text = f"Time of forward and backward over the batch size, {case.title()}, on logarithmic axes"
            made[op, case] = f'<img src="{source}" width="480" alt="{text}">'
        return made

    def limits(self, folder, page):
        """Return the picture and the table of what limits each call on a device."""
        path, rows, header = limits_of(folder, self.images)
        text = (
            f"Time of forward and backward over the rows, {case_of(rows[0]).title()}: a call, its part on the GPU, and"
        )
        lines = [f'<img src="{self.source(path, page)}" width="520" alt="{text} eager PyTorch">', ""]
        found = [(op, load(folder, op)["rows"]) for op in LABELS if (folder / f"{op}.json").exists()]
        made = [line for op, some in found for line in limits.lines(op, LABELS[op], some, milliseconds, times)]
        return [*lines, *table(["op", *limits.LIMITS], made), "", device_line(header)]

    def source(self, path, page):
        return Path(os.path.relpath(path, page.parent)).as_posix()

    def curves(self, folder):
        """Return the header and the rows of the folder's curves."""
        data = load(folder, "curves") if (folder / "curves.json").exists() else {"header": None, "rows": []}
        return data["header"], data["rows"]

    def gallery(self, page):
        """Return every picture with one sentence, as Markdown lines."""
        lines = ["", "## Training", ""]
        for folder in self.folders:
            for row in self.curves(folder)[1]:
                lines += [*curve_pages.gallery(row, self.source(curve_pages.path(self.images, row), page)), ""]
        for folder in self.folders:
            shown = self.shown(folder, page)
            if shown:
                header = next(load(folder, op)["header"] for op in LABELS if (folder / f"{op}.json").exists())
                lines += [f"## Speed: {device_name(header)}", ""]
            for (op, case), (_, rows) in pictures(folder, self.images).items():
                lines += [shown[op, case], "", *headline(op, rows), ""]
        return lines

    def filling(self, kind, name, page):
        """Return what stands between a marker and its end."""
        if kind == "performance":
            sections = [section(folder, self.shown(folder, page)) for folder in self.folders]
            return "\n\n" + "\n\n".join("\n".join(lines) for lines in sections) + "\n\n"
        if kind == "limits":
            name, _, part = name.partition("/")
            lines = self.limits(self.results / name, page)
            return "\n".join(["", *(lines[:1] if part == "picture" else lines), ""])
        if kind == "pictures":  # of InfoNCE with two views in float32, the case with most batch sizes
            plan = pictures(self.results / name, self.images)
            fitting = [key for key in plan if key[0] == "info_nce" and key[1] == Case(2, key[1].dim, "float32")]
            most = max(fitting, key=lambda key: len(plan[key][1]), default=None)
            return f"\n{self.shown(self.results / name, page).get(most, '')}\n"
        if kind == "gallery":
            return "\n".join(["", *self.gallery(page), ""])
        folder, _, file = name.partition("/")
        if kind == "curve":
            header, rows = self.curves(self.results / folder)
            (row,) = (row for row in rows if row["method"] == file)
            source = self.source(curve_pages.path(self.images, row), page)
            return "\n".join(["", *curve_pages.lines(header, row, source, device_line(header)), ""])
        data = load(self.results / folder, file)
        if kind == "says":
            return WORDS[file](data["rows"], data["header"])
        return "\n".join(["", *TABLES[file](data["rows"]), "", device_line(data["header"]), ""])

    def drawn(self):
        """Yield (path, what it shows, a function that draws it) of every picture."""
        from selfsup_kernels.lab.bench import report

        for folder in self.folders:
            for (_, case), (path, rows) in pictures(folder, self.images).items():
                shown = [[row["batch"], row["times"]] for row in rows]
                yield path, shown, functools.partial(report.picture, rows, "time", case.title())
            if (found := limits_of(folder, self.images)) is not None:
                path, rows, header = found
                shown = [[row["batch"], row["times"], row.get("graph_ms")] for row in rows]
                yield path, shown, functools.partial(limits.picture, rows, header)
            for row in self.curves(folder)[1]:
                drawing = functools.partial(curve_pages.picture, row)
                yield curve_pages.path(self.images, row), curve_pages.shown(row), drawing

    def update(self, write=True):
        """Make pages and pictures again; return those that differed from what the files say."""
        changed = []
        for path, shown, drawing in self.drawn():
            if not is_current(path, shown):
                changed.append(path)
                if write:
                    save(path, shown, drawing())
        for page in self.pages:
            before = page.read_text(encoding="utf-8")
            after = MARKER.sub(lambda x, page=page: x[1] + self.filling(x[2], x[3], page) + x[4], before)
            if before != after:
                changed.append(page)
                if write:
                    page.write_text(after, encoding="utf-8")
        return changed


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something differs")
    options = parser.parse_args(arguments)
    documents = Documents()
    changed = documents.update(write=not options.check)
    verb = "differs from" if options.check else "made from"
    for path in changed:
        print(f"{path.relative_to(documents.root)} {verb} benchmarks/results")
    if options.check and changed:
        sys.exit("run: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
