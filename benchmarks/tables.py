"""Writes the tables and pictures of README.md and docs/ from the committed results: no number there without a file.

    python benchmarks/tables.py [--check]

Between ``<!-- results:FOLDER/NAME -->`` and ``<!-- end -->`` stands a table of that file of results, after
``<!-- model:NAME -->`` one that is calculated, after ``<!-- pictures:FOLDER -->`` the pictures of InfoNCE, after
``<!-- performance -->`` the sections of all devices, and inside a line, after ``<!-- says:FOLDER/NAME -->``, words
about that file. ``--check`` fails where a page or a picture differs from what the files say.
"""

import argparse
import os
import re
import statistics
import sys
from pathlib import Path

import measured as m
import performance
import pictures
import scaling_model

MARKER = re.compile(r"(<!-- results:(\S+)/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODEL = re.compile(r"(<!-- model:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PERFORMANCE = re.compile(r"(<!-- performance -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURES = re.compile(r"(<!-- pictures:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SAYS = re.compile(r"(<!-- says:(\S+)/(\w+) -->).*?(<!-- end -->)", re.DOTALL)


def compat(data):
    head = ["drop-in for", "version", "B", "ours", "original", "factor", "memory: ours", "original"]
    lines = []
    for row in data["rows"]:
        peaks = [m.size(m.peak(row, name)) for name in (m.OURS, "original")]
        both = [m.milliseconds(m.median(row, name)) for name in (m.OURS, "original")]
        factor = m.times(m.factor(row, "original"))
        lines.append([row["name"], row["version"], str(row["batch"] or "-"), *both, factor, *peaks])
    return performance.table(head, lines)


def compat_words(data):
    """The range of the factors, with the drop-ins at its ends."""
    rows = sorted(data["rows"], key=lambda row: m.factor(row, "original"))
    factors = [m.factor(row, "original") for row in rows]

    def end(row, ratio):
        return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}", f"{row['name']}, B = {row['batch']}"

    (least, slowest), (most, fastest) = end(rows[0], factors[0]), end(rows[-1], factors[-1])
    return (
        f"between {least} times ({slowest}) and {most} times ({fastest}) as fast as its original;"
        f" the median of {len(rows)} is {statistics.median(factors):.1f} times"
    )


def scaling(data):
    lines = ["| ranks | rows | received | model | memory | model | time of one | model | gradient, off by |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in data["rows"]:
        alone = next(r for r in data["rows"] if r["rows"] == row["rows"])
        lines.append(
            f"| {row['processes']} | {row['rows']} | {row['received_bytes'] / 1e6:.2f} MB |"
            f" {row['model_received_bytes'] / 1e6:.2f} MB | {row['peak_bytes'] / 1e6:.0f} MB |"
            f" {row['model_peak_bytes'] / 1e6:.0f} MB | {row['processor_ms'] / alone['processor_ms']:.2f} |"
            f" {row['model_products'] / alone['model_products']:.2f} | {row['gradient_error']:.1e} |"
        )
    return lines


def gpus():
    """The model of `docs/scaling.md`, with the rates that it states."""
    rates = scaling_model.Rates(300e12, 200e9, 25e9)
    lines = ["| GPUs | rows | received | memory | operations | computing | sending |", "|---|---|---|---|---|---|---|"]
    for processes in (1, 8, 64, 256, 1024):
        rows = 1024 * processes
        work = scaling_model.gpu(processes, rows, 256, 2)
        computing, sending = scaling_model.seconds(work, processes, rates)
        lines.append(
            f"| {processes} | {rows:,} | {work.received_bytes / 1e6:,.1f} MB | {work.peak_bytes / 1e6:,.0f} MB |"
            f" {work.products / 1e12:.3g} T | {1e3 * computing:.3g} ms | {1e3 * sending:.3g} ms |"
        )
    return lines


TABLES = {
    "info_nce": performance.short_info_nce,
    "byol": performance.short_byol,
    "ema": performance.short_ema,
    "compat": compat,
    "scaling": scaling,
}
MODELS = {"gpus": gpus}
WORDS = {"compat": compat_words}


class Documents:
    """The pages of a checkout, its results, and what the pages have to say about them."""

    def __init__(self, root=m.ROOT, results=None):
        self.root = Path(root)
        self.results = Path(results or self.root / "benchmarks" / "results")
        self.images = self.root / "docs" / "images"
        self.pages = [self.root / "README.md", *sorted((self.root / "docs").rglob("*.md"))]

    def filled(self, page):
        """The text of ``page`` with everything between the markers made anew."""

        def table(match):
            data = m.load(self.results / match.group(2), match.group(3))
            lines = [*TABLES[match.group(3)](data), "", m.device_line(data["header"]), ""]
            return match.group(1) + "\n".join(lines) + match.group(4)

        def model(match):
            return match.group(1) + "\n".join([*MODELS[match.group(2)](), ""]) + match.group(3)

        def devices(match):
            return match.group(1) + "\n".join(["", *self.performance(page), "", ""]) + match.group(2)

        def words(match):
            return (
                match.group(1)
                + WORDS[match.group(3)](m.load(self.results / match.group(2), match.group(3)))
                + "<!-- end -->"
            )

        def shown(match):
            return match.group(1) + self.pictures(self.results / match.group(2), page) + "\n" + match.group(3)

        text = page.read_text(encoding="utf-8")
        for pattern, made in (
            (MARKER, table),
            (MODEL, model),
            (PERFORMANCE, devices),
            (PICTURES, shown),
            (SAYS, words),
        ):
            text = pattern.sub(made, text)
        return text

    def performance(self, page):
        """The sections of all devices."""
        lines = []
        for folder in m.device_folders(self.results):
            lines += [*([""] if lines else []), *performance.section(folder, self.planned(folder, page))]
        return lines

    def pictures(self, folder, page):
        """The pictures of InfoNCE with two views in float32, the case with most batch sizes."""
        cases = pictures.wanted(folder)
        fitting = [key for key in cases if (key[0], key[1].views, key[1].dtype) == ("info_nce", 2, "float32")]
        if not fitting:
            return ""
        return performance.images(self.planned(folder, page)[max(fitting, key=lambda key: len(cases[key]))])

    def planned(self, folder, page):
        """``{(op, case): [(path, alt text), ...]}``, paths as ``page`` reaches them."""
        return {
            key: [(Path(os.path.relpath(path, page.parent)).as_posix(), text) for path, _, _, text in made]
            for key, made in pictures.plan(folder, self.images).items()
        }

    def update(self, write=True):
        """Makes pages and pictures anew; returns those that differed from what the files say."""
        changed = []
        for folder in m.device_folders(self.results):
            changed += pictures.update(folder, self.images, write)
        for page in self.pages:
            before = page.read_text(encoding="utf-8")
            after = self.filled(page)
            if before != after:
                changed.append(page)
                if write:
                    page.write_text(after, encoding="utf-8")
        return changed


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something differs")
    options = parser.parse_args(arguments)
    changed = Documents().update(write=not options.check)
    for path in changed:
        print(f"{path.relative_to(m.ROOT)} {'differs from' if options.check else 'made from'} benchmarks/results")
    if options.check and changed:
        sys.exit("run: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
