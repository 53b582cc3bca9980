"""Writes the tables of README.md and docs/ from the committed results: no number there without a file.

    python benchmarks/tables.py [--check]

Between ``<!-- results:FOLDER/NAME -->`` and ``<!-- end -->`` stands the table NAME of that folder of results, after
``<!-- model:NAME -->`` one that is calculated.
``--check`` fails where a page differs from what the files say.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import scaling_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(r"(<!-- results:(\S+)/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODEL = re.compile(r"(<!-- model:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(folder, name):
    return json.loads((ROOT / "benchmarks" / "results" / folder / f"{name}.json").read_text())


def median(row, name):
    return row["times"][name]["p50_ms"]


def milliseconds(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times_table(title, rows, label, rivals):
    """One line a row: our time, then each rival's time and how many times ours that is."""
    lines = [f"| {title} | selfsup_kernels | " + " | ".join(rivals) + " |", "|---|" + "---|" * (1 + len(rivals))]
    for row in rows:
        ours = median(row, "selfsup_kernels")
        cells = [f"{milliseconds(median(row, r))} ms ({median(row, r) / ours:.1f}x)" for r in rivals]
        lines.append(f"| {label(row)} | {milliseconds(ours)} ms | " + " | ".join(cells) + " |")
    return lines


def info_nce(data):
    def label(row):
        return f"B = {row['batch']}, D = {row['dim']}, {row['part'].replace('both', 'forward + backward')}"

    lines = times_table("InfoNCE, two views, float32", data["rows"], label, ["eager", "compile"])
    lines[0] += " rate / matrix product |"
    lines[1] += "---|"
    for i, row in enumerate(data["rows"]):
        lines[2 + i] += f" {row['gflops']:.0f} / {row['matrix_product_gflops']:.0f} GFLOP/s |"
    return lines


def byol(data):
    def label(row):
        return f"B = {row['batch']}, D = {row['dim']}, {row['part'].replace('both', 'forward + backward')}"

    return times_table("BYOL loss, pairs, float32", data["rows"], label, ["eager", "compile"])


def ema(data):
    lines = ["| EMA, ResNet-50, float32 target | selfsup_kernels | the op alone | rival | bandwidth of the op |"]
    lines.append("|---|---|---|---|---|")
    for row in data["rows"]:
        ours = median(row, "selfsup_kernels")
        rival = next(n for n in row["times"] if n not in ("selfsup_kernels", "the op alone"))
        lines.append(
            f"| {row['source']} source | {milliseconds(ours)} ms | {milliseconds(median(row, 'the op alone'))} ms"
            f" | `{rival}` {milliseconds(median(row, rival))} ms ({median(row, rival) / ours:.2f}x)"
            f" | {row['gb_per_s']:.0f} of {row['in_place_gb_per_s']:.0f} GB/s |"
        )
    return lines


def memory(data):
    lines = ["| rows, D = 128 | | time | memory above the inputs | times the embeddings |", "|---|---|---|---|---|"]
    for row in data["rows"]:
        lines.append(
            f"| {row['rows']} | {row['name']} | {milliseconds(row['ms'])} ms |"
            f" {row['peak_bytes_above_inputs'] / 1e6:.0f} MB | {row['ratio']:.1f}x |"
        )
    return lines


def compat(data):
    def megabytes(size):
        return "-" if size is None else f"{size / 1e6:.0f} MB"

    lines = ["| drop-in for | version | B | ours | original | factor | memory: ours | original |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in data["rows"]:
        ours, original = median(row, "selfsup_kernels"), median(row, "original")
        peak = row.get("peak_bytes", {})
        lines.append(
            f"| {row['name']} | {row['version']} | {row['batch'] or '-'} | {milliseconds(ours)} ms |"
            f" {milliseconds(original)} ms | {original / ours:.1f}x |"
            f" {megabytes(peak.get('selfsup_kernels'))} | {megabytes(peak.get('original'))} |"
        )
    return lines


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


TABLES = {"info_nce": info_nce, "byol": byol, "ema": ema, "memory": memory, "compat": compat, "scaling": scaling}
MODELS = {"gpus": gpus}


def device_line(header):
    return (
        f"{header['device']}, {header['threads']} threads, {header['cpu_capability']}, torch {header['torch']},"
        f" measured {header['date']}."
    )


def fill(text):
    def table(match):
        data = load(match.group(2), match.group(3))
        return (
            match.group(1)
            + "\n".join([*TABLES[match.group(3)](data), "", device_line(data["header"]), ""])
            + match.group(4)
        )

    def model(match):
        return match.group(1) + "\n".join([*MODELS[match.group(2)](), ""]) + match.group(3)

    return MODEL.sub(model, MARKER.sub(table, text))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for page in PAGES:
        before = page.read_text()
        after = fill(before)
        if not args.check:
            page.write_text(after)
        elif before != after:
            sys.exit(f"{page.name} differs from benchmarks/results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
