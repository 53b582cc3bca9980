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
import os
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import curve_pages
import limits
from cells import (
    LABELS,
    PLAIN,
    Case,
    case_of,
    cases,
    device_line,
    device_name,
    load,
    milliseconds,
    peak,
    rate_cell,
    size,
    table,
    time_cell,
    times,
)
from sections import headline, section

from selfsup_kernels.lab.bench import baselines
from selfsup_kernels.lab.bench.baselines import OURS
from selfsup_kernels.lab.bench.results import ratio

ROOT = Path(__file__).resolve().parent.parent
KINDS = "results|performance|pictures|limits|says|curve|gallery"
MARKER = re.compile(rf"(<!-- ({KINDS})(?::(\S+))? -->).*?(<!-- end -->)", re.DOTALL)
FEWEST = 3
"""Batch sizes that make a curve."""


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
        if (made := limits_of(folder, self.images)) is None:
            return []
        path, rows, header = made
        text = f"Time over the rows, {case_of(rows[0]).title()}: a call, its part on the GPU, and eager PyTorch"
        lines = [f'<img src="{self.source(path, page)}" width="520" alt="{text}">', ""]
        found = [(op, load(folder, op)["rows"]) for op in LABELS if (folder / f"{op}.json").exists()]
        made = [line for op, some in found for line in limits.lines(op, some)]
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
            # A blank line ends the picture's paragraph: Sphinx copies only images that stand alone in theirs.
            return "\n".join(["", *(lines[:2] if part == "picture" else lines), ""])
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
