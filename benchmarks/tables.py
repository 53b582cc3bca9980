"""Writes the tables and pictures of README.md and docs/ from the committed results: no number there without a file.

    python benchmarks/tables.py [--check]

Between ``<!-- results:FOLDER/NAME -->`` and ``<!-- end -->`` stands a table of that file of results, after
``<!-- model:NAME -->`` one that is calculated, after ``<!-- pictures:FOLDER -->`` the pictures of InfoNCE, after
``<!-- performance -->`` the sections of all devices, and inside a line, after ``<!-- says:FOLDER/NAME -->``, words
about that file. ``--check`` fails where a page or a picture differs from what the files say.
"""

import argparse
import math
import os
import re
import statistics
import sys
from pathlib import Path

import measured as m
import pictures
import scaling_model

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"(<!-- (results|model|performance|pictures|says)(?::(\S+))? -->).*?(<!-- end -->)", re.DOTALL)
LABELS = {"info_nce": "InfoNCE", "byol": "BYOL loss", "ema": "EMA"}


def table(head, lines):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(x) + " |" for x in lines)]


# ---------------------------------------------------------------- cells


def time_cell(row, name):
    value = m.median(row, name)
    if value is None:
        return m.why_not(row, name)
    ratio = None if m.is_ours(name) else m.factor(row, name)
    return m.milliseconds(value) + (f" ({m.times(ratio)})" if ratio else "")


def rate_cell(row):
    """What ours reached of the rate that was measured in the same run."""
    if row.get("fraction") is None:
        return "-"
    rate = m.rate(row["tflops"]) if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
    return f"{rate}, {row['fraction']:.0%}"


def graph_cell(row):
    """Ours as a replayed CUDA graph, which is what the GPU needs, and the others' times over it."""
    found = row.get("graph_ms") or {}
    if row["part"] not in ("both", "update") or m.OURS not in found:
        return "-"
    others = [f"{name} {m.times(value / found[m.OURS])}" for name, value in found.items() if not m.is_ours(name)]
    return m.milliseconds(found[m.OURS]) + (f" ({', '.join(others)})" if others else "")


def family(row):
    if row["op"] == "ema":
        return f"{row['model']}, {row['source']} to {row['target']}"
    return m.Case(row["views"], row["dim"], row["dtype"]).title()


def spot(row):
    return "update" if row["op"] == "ema" else f"{row['batch']} {m.PARTS[row['part']]}"


def where(row):
    if row["op"] == "ema":
        return f"{row['model']}, {row['source']}"
    return f"{row['views']} views, B = {row['batch']}, D = {row['dim']}, {row['dtype']}"


# ---------------------------------------------------------------- short tables


def short_loss(data):
    """README: forward + backward of float32 rows, two views; of InfoNCE the memory too."""
    rows = [r for r in data["rows"] if (r["views"], r["dtype"], r["part"]) == (2, "float32", "both")]
    rivals = [n for n in ("eager", "compile") if any(n in r["times"] for r in rows)]
    peaks = (m.OURS, "eager") if rows and rows[0]["op"] == "info_nce" else ()
    lines = [
        [
            f"{r['batch']}, {r['dim']}",
            *(time_cell(r, n) for n in (m.OURS, *rivals)),
            *(m.size(m.peak(r, n)) for n in peaks),
        ]
        for r in sorted(rows, key=lambda r: (r["dim"], r["batch"]))
    ]
    return table(["B, D", "ours", *rivals, *(("memory: ours", "eager") if peaks else ())], lines)


def short_ema(data):
    """README: ours and the fastest rival of each row."""
    lines = []
    for row in data["rows"]:
        rivals = [n for n in row["times"] if not m.is_ours(n)]
        best = min(rivals, key=lambda n: m.median(row, n), default=None)
        fastest = f"`{best}` {time_cell(row, best)}" if best else "-"
        lines.append([f"{row['model']}, {row['source']}", time_cell(row, m.OURS), fastest, rate_cell(row)])
    return table(["model, source", "ours", "fastest rival", "of the bandwidth"], lines)


def compat(data):
    head = ["drop-in for", "version", "B", "ours", "original", "factor", "memory: ours", "original"]
    lines = []
    for row in data["rows"]:
        peaks = [m.size(m.peak(row, name)) for name in (m.OURS, "original")]
        both = [m.milliseconds(m.median(row, name)) for name in (m.OURS, "original")]
        factor = m.times(m.factor(row, "original"))
        lines.append([row["name"], row["version"], str(row["batch"] or "-"), *both, factor, *peaks])
    return table(head, lines)


def compat_words(data):
    """The range of the factors, with the drop-ins at its ends."""
    rows = sorted(data["rows"], key=lambda row: m.factor(row, "original"))
    factors = [m.factor(row, "original") for row in rows]
    least, most = (f"{m.times(factors[i])[:-1]} times ({rows[i]['name']}, B = {rows[i]['batch']})" for i in (0, -1))
    return (
        f"between {least} and {most} as fast as its original;"
        f" the median of {len(rows)} is {statistics.median(factors):.1f} times"
    )


def scaling(data):
    head = ["ranks", "rows", "received", "model", "memory", "model", "time of one", "model", "gradient, off by"]
    lines = []
    for row in data["rows"]:
        alone = next(r for r in data["rows"] if r["rows"] == row["rows"])
        line = [str(row["processes"]), str(row["rows"])]
        line += [f"{row[key] / 1e6:.2f} MB" for key in ("received_bytes", "model_received_bytes")]
        line += [f"{row[key] / 1e6:.0f} MB" for key in ("peak_bytes", "model_peak_bytes")]
        line += [f"{row[key] / alone[key]:.2f}" for key in ("processor_ms", "model_products")]
        lines.append([*line, f"{row['gradient_error']:.1e}"])
    return table(head, lines)


def gpus():
    """The model of `docs/scaling.md`, with the rates that it states."""
    lines = []
    for processes in (1, 8, 64, 256, 1024):
        rows = 1024 * processes
        work = scaling_model.gpu(processes, rows, 256, 2)
        times = [f"{1e3 * s:.3g} ms" for s in scaling_model.seconds(work, processes, 300e12, 200e9, 25e9)]
        sizes = [f"{work.received_bytes / 1e6:,.1f} MB", f"{work.peak_bytes / 1e6:,.0f} MB"]
        lines.append([str(processes), f"{rows:,}", *sizes, f"{work.products / 1e12:.3g} T", *times])
    return table(["GPUs", "rows", "received", "memory", "operations", "computing", "sending"], lines)


TABLES = {"info_nce": short_loss, "byol": short_loss, "ema": short_ema, "compat": compat, "scaling": scaling}


# ---------------------------------------------------------------- the sections of docs/performance.md


def section(folder, shown):
    """The section of one device, as Markdown lines. ``shown``: what :func:`planned` gives."""
    found = {op: m.load(folder, op) for op in m.OPS if (folder / f"{op}.json").exists()}
    header = next(iter(found.values()))["header"]
    lines = [f"## {m.device_name(header)}", "", *facts(header), ""]
    for op in ("info_nce", "byol"):
        lines += [*headline(op, found[op]["rows"]), ""] if op in found else []
    lines += ["### Where ours is slower", "", *slower(found)]
    for op, data in found.items():
        lines += ["", f"### {LABELS[op]}"]
        if op == "ema":
            lines += ["", *times_table(data["rows"])]
        for case, rows in m.cases(data["rows"]).items() if op != "ema" else ():
            lines += ["", f"#### {case.title()}", ""]
            lines += [images(shown[op, case]), ""] if (op, case) in shown else []
            lines += [*times_table(rows), *memory_table(case, rows)]
        lines += [*absences(data["rows"]), *errors(data["rows"])]
    return lines


def facts(header):
    """What the numbers below were measured on."""
    lines = [m.device_line(header)]
    peers = ", ".join(f"{name} {version}" for name, version in sorted((header.get("peers") or {}).items()))
    if peers:
        lines.append(f"Compared with: {peers}.")
    rates = [f"{m.rate(value)} ({dtype})" for dtype, value in (header.get("matrix_product_tflops") or {}).items()]
    if rates:
        lines.append(f"A large matrix product ran at {', '.join(rates)} in the same run.")
    for key, what in (("copy_gb_per_s", "A copy"), ("in_place_gb_per_s", "Scaling numbers in place")):
        if header.get(key):
            lines.append(f"{what} ran at {header[key]:.0f} GB/s, read and written bytes together.")
    return lines


def headline(op, rows):
    """One sentence, of the first case at the largest batch at which eager PyTorch was measured."""
    both = [r for r in next(iter(m.cases(rows).values())) if r["part"] == "both" and m.factor(r, "eager")]
    if not both:
        return []
    row = both[-1]
    cells = [
        f"{name} {time_cell(row, key)} and {m.size(m.peak(row, key))}"
        for name, key in (("ours", m.OURS), ("eager", "eager"))
    ]
    return [f"{LABELS[op]}, {where(row)}, forward + backward: {', '.join(cells)}."]


def times_table(rows):
    op, columns = rows[0]["op"], m.names(rows)
    graph = any(graph_cell(row) != "-" for row in rows)
    lines = []
    for row in rows:
        if op == "ema":
            name = f"{row['model']}, {row['tensors']} tensors, {row['source']} to {row['target']}"
        else:
            name = f"{row['batch']}, {m.PARTS[row['part']]}"
        times = [time_cell(row, n) for n in columns]
        lines.append([name, *times, *([graph_cell(row)] if graph else []), rate_cell(row)])
    rate = "of a matrix product" if op == "info_nce" else "of the bandwidth"
    return table(["model" if op == "ema" else "B", *columns, *(["CUDA graph"] if graph else []), rate], lines)


def memory_table(case, rows):
    both = [r for r in rows if r["part"] == "both" and any((r.get("peak_bytes") or {}).values())]
    if not both:
        return []
    columns = m.names(both)
    width = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    lines = []
    for row in both:
        cells = [m.size(m.peak(row, n)) if m.peak(row, n) is not None else m.why_not(row, n) for n in columns]
        ours, inputs = m.peak(row, m.OURS), case.views * row["batch"] * case.dim * width
        lines.append([str(row["batch"]), *cells, f"{ours / inputs:.1f}x" if ours is not None else "-"])
    head = ["B", *columns, "ours, times the embeddings"]
    return ["", "Most memory of forward + backward, above the inputs:", "", *table(head, lines)]


def absences(rows):
    """Why a time is missing, and what has to be known of a rival: each reason once, with where it applies."""
    found = {}
    for row in rows:
        for name, reason in (row.get("unavailable") or {}).items():
            found.setdefault((name, reason), []).append(where(row))
        for name, note in (row.get("notes") or {}).items():
            found.setdefault((name, note), [])
    lines = []
    for (name, text), places in found.items():
        places = list(dict.fromkeys(places))
        everywhere = not places or len(places) == len({where(row) for row in rows})
        shown = "; ".join(places) if len(places) <= 3 else f"{len(places)} cases"
        lines.append(f"- {name}: {text}" + ("" if everywhere else f" ({shown})"))
    return ["", *lines] if lines else []


def errors(rows):
    """The largest error of each rival, over all rows, against float64."""
    worst = {}
    for row in rows:
        for name, values in (row.get("errors") or {}).items():
            for key, value in values.items():
                if key != "rows":
                    found = worst.setdefault((row["dtype"], name), {})
                    # JSON has no number for what is not finite
                    found[key] = max(found.get(key, 0.0), math.inf if value is None else value)
    if not worst:
        return []
    keys = list(dict.fromkeys(key for values in worst.values() for key in values))
    lines = [
        [dtype, name, *(f"{values[k]:.0e}" if k in values else "-" for k in keys)]
        for (dtype, name), values in sorted(worst.items(), key=lambda item: (item[0][0], item[0][1] != m.OURS))
    ]
    title = "Largest error over the rows above, relative to float64:"
    return ["", title, "", *table(["dtype", "", *keys], lines)]


def slower(found):
    """Every measured case in which a rival takes less time than ours, by case and rival, the worst first."""
    groups = {}
    for op, data in found.items():
        for row in data["rows"]:
            for name in row["times"]:
                ratio = None if m.is_ours(name) else m.factor(row, name)
                if ratio is not None and ratio < 1:
                    groups.setdefault((LABELS[op], family(row), name), []).append((ratio, row))
    if not groups:
        return ["In none of the cases below."]
    lines = []
    for (label, case, name), rows in sorted(groups.items(), key=lambda item: min(ratio for ratio, _ in item[1])):
        _, worst = min(rows, key=lambda pair: pair[0])
        pair = f"{time_cell(worst, m.OURS)}, {name} {time_cell(worst, name)}"
        shown = f"{spot(worst)}: {pair}" if len(rows) > 1 else pair
        lines.append([f"{label}, {case}", name, "; ".join(spot(row) for _, row in rows), shown])
    return table(["case", "rival", "where", "the worst"], lines)


def images(shown):
    """Side by side where there is room, by a width, which Markdown's own pictures do not have."""
    return "\n".join(f'<img src="{path}" width="360" alt="{text}">' for path, text in shown)


# ---------------------------------------------------------------- pages


class Documents:
    """The pages of a checkout, and its results."""

    def __init__(self, root=ROOT):
        self.root = Path(root)
        self.results, self.images = self.root / "benchmarks" / "results", self.root / "docs" / "images"
        self.pages = [self.root / "README.md", *sorted((self.root / "docs").rglob("*.md"))]

    def planned(self, folder, page):
        """``{(op, case): [(path, alt text), ...]}``, paths as ``page`` reaches them."""
        return {
            key: [(Path(os.path.relpath(path, page.parent)).as_posix(), text) for path, _, _, text in made]
            for key, made in pictures.plan(folder, self.images).items()
        }

    def filling(self, kind, name, page):
        """What stands between a marker and its end."""
        if kind == "model":
            return "\n".join(["", *{"gpus": gpus}[name](), ""])
        if kind == "performance":
            sections = [section(folder, self.planned(folder, page)) for folder in m.device_folders(self.results)]
            return "\n\n" + "\n\n".join("\n".join(lines) for lines in sections) + "\n\n"
        if kind == "pictures":  # of InfoNCE with two views in float32, the case with most batch sizes
            plan = pictures.plan(self.results / name, self.images)
            fitting = [key for key in plan if (key[0], key[1].views, key[1].dtype) == ("info_nce", 2, "float32")]
            most = max(fitting, key=lambda key: len(plan[key][0][1]), default=None)
            return f"\n{images(self.planned(self.results / name, page).get(most, []))}\n"
        folder, _, file = name.partition("/")
        data = m.load(self.results / folder, file)
        if kind == "says":
            return {"compat": compat_words}[file](data)
        return "\n".join(["", *TABLES[file](data), "", m.device_line(data["header"]), ""])

    def update(self, write=True):
        """Make pages and pictures again; return those that differed from what the files say."""
        changed = []
        for folder in m.device_folders(self.results):
            changed += pictures.update(folder, self.images, write)
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
    for path in changed:
        print(
            f"{path.relative_to(documents.root)} {'differs from' if options.check else 'made from'} benchmarks/results"
        )
    if options.check and changed:
        sys.exit("run: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
