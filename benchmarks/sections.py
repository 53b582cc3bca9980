"""The sections of docs/performance.md: all that was measured on one device."""

import math

from cells import (
    LABELS,
    PARTS,
    case_of,
    cases,
    device_line,
    device_name,
    graph_cell,
    load,
    names,
    peak,
    rate_cell,
    size,
    table,
    tflops,
    time_cell,
    where,
    why_not,
)

from selfsup_kernels.lab.bench import baselines
from selfsup_kernels.lab.bench.baselines import OURS
from selfsup_kernels.lab.bench.results import ratio


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
