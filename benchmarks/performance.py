"""The sections of docs/performance.md, and the short tables of README.md, from the files of one device."""

import math

import measured as m

LABELS = {"info_nce": "InfoNCE", "byol": "BYOL loss", "ema": "EMA"}


def table(head, lines):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(x) + " |" for x in lines)]


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
    if "tflops" in row:
        return f"{m.rate(row['tflops'])}, {row['fraction']:.0%}"
    return f"{row['gb_per_s']:.0f} GB/s, {row['fraction']:.0%}"


def graph_cell(row):
    """Ours as a replayed CUDA graph, which is what the GPU needs, and the others' times over it."""
    found = row.get("graph_ms") or {}
    if row["part"] not in ("both", "update") or m.OURS not in found:
        return "-"
    others = [f"{name} {m.times(value / found[m.OURS])}" for name, value in found.items() if not m.is_ours(name)]
    return m.milliseconds(found[m.OURS]) + (f" ({', '.join(others)})" if others else "")


def graph_column(rows):
    """The heading of :func:`graph_cell`'s column, where any row has one."""
    return ["CUDA graph"] if any(graph_cell(row) != "-" for row in rows) else []


def short_info_nce(data):
    """README: forward + backward of float32 rows, two views, time and memory."""
    rows = [r for r in data["rows"] if (r["views"], r["dtype"], r["part"]) == (2, "float32", "both")]
    rivals = [n for n in ("eager", "compile") if any(n in r["times"] for r in rows)]
    lines = []
    for row in sorted(rows, key=lambda r: (r["dim"], r["batch"])):
        memory = [m.size(m.peak(row, n)) for n in (m.OURS, "eager")]
        lines.append([f"{row['batch']}, {row['dim']}", *(time_cell(row, n) for n in (m.OURS, *rivals)), *memory])
    return table(["B, D", "ours", *rivals, "memory: ours", "eager"], lines)


def short_byol(data):
    rows = [r for r in data["rows"] if r["views"] == 2 and r["dtype"] == "float32" and r["part"] == "both"]
    rivals = [n for n in ("eager", "compile") if any(n in r["times"] for r in rows)]
    lines = [
        [f"{r['batch']}, {r['dim']}", *(time_cell(r, n) for n in (m.OURS, *rivals))]
        for r in sorted(rows, key=lambda r: (r["dim"], r["batch"]))
    ]
    return table(["B, D", "ours", *rivals], lines)


def short_ema(data):
    """README: ours beside the fastest rival of each row."""
    lines = []
    for row in data["rows"]:
        rivals = [n for n in row["times"] if not m.is_ours(n)]
        best = min(rivals, key=lambda n: m.median(row, n), default=None)
        fastest = f"`{best}` {time_cell(row, best)}" if best else "-"
        lines.append([f"{row['model']}, {row['source']}", time_cell(row, m.OURS), fastest, rate_cell(row)])
    return table(["model, source", "ours", "fastest rival", "of the bandwidth"], lines)


def facts(header):
    """What the numbers below were measured on and beside."""
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


def device_name(header):
    threads = header.get("threads")
    return header["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def headline(case, rows):
    """One sentence of the largest batch at which something was measured beside ours."""
    both = m.by_batch(rows, "both")
    batch = max((b for b, r in both.items() if any(not m.is_ours(n) for n in r["times"])), default=None)
    if batch is None or m.median(both[batch], m.OURS) is None:
        return []
    row = both[batch]
    others = [f"{n} {time_cell(row, n)}" for n in m.names([row]) if n in row["times"] and not m.is_ours(n)]
    peaks = [f"{n} {m.size(m.peak(row, n))}" for n in m.names([row]) if not m.is_ours(n) and m.peak(row, n)]
    memory = f" Memory above the inputs: {m.size(m.peak(row, m.OURS))}; {', '.join(peaks)}." if peaks else ""
    return [
        f"- {case.title()}, B = {batch}, forward + backward: {time_cell(row, m.OURS)}; {', '.join(others)}.{memory}"
    ]


def times_section(rows):
    columns, graph = m.names(rows), graph_column(rows)
    lines = [
        [
            f"{row['batch']}, {m.PARTS[row['part']]}",
            *(time_cell(row, n) for n in columns),
            *(graph_cell(row) for _ in graph),
            rate_cell(row),
        ]
        for row in rows
    ]
    rate = "of a matrix product" if rows[0]["op"] == "info_nce" else "of the bandwidth"
    return table(["B", *columns, *graph, rate], lines)


def memory_section(case, rows):
    both = [r for r in rows if r["part"] == "both" and any((r.get("peak_bytes") or {}).values())]
    if not both:
        return []
    columns = m.names(both)
    width = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    lines = []
    for row in both:
        inputs = case.views * row["batch"] * case.dim * width
        cells = [m.size(m.peak(row, n)) if m.peak(row, n) is not None else m.why_not(row, n) for n in columns]
        ours = m.peak(row, m.OURS)
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


def where(row):
    if row["op"] == "ema":
        return f"{row['model']}, {row['source']}"
    return f"{row['views']} views, B = {row['batch']}, D = {row['dim']}, {row['dtype']}"


def images(shown):
    """Side by side where there is room: of a width, which Markdown's own pictures have not."""
    return "\n".join(f'<img src="{path}" width="360" alt="{text}">' for path, text in shown)


def errors(rows):
    """The largest error of each rival, over all rows, against float64."""
    worst = {}
    for row in rows:
        for name, values in (row.get("errors") or {}).items():
            for key, value in values.items():
                if key != "rows":
                    found = worst.setdefault((row["dtype"], name), {}).setdefault(key, [])
                    found.append(math.inf if value is None else value)  # JSON has no number for what is not finite
    if not worst:
        return []
    keys = list(dict.fromkeys(key for values in worst.values() for key in values))
    lines = [
        [dtype, name, *(f"{max(values[k]):.0e}" if k in values else "-" for k in keys)]
        for (dtype, name), values in sorted(worst.items(), key=lambda item: (item[0][0], item[0][1] != m.OURS))
    ]
    title = "Largest error over the rows above, relative to float64:"
    return ["", title, "", *table(["dtype", "", *keys], lines)]


def loss_section(folder, op, data, pictures):
    lines = ["", f"### {LABELS[op]}"]
    for case, rows in m.cases(data["rows"]).items():
        lines += ["", f"#### {case.title()}", ""]
        shown = pictures.get((op, case), [])
        lines += [images(shown), ""] if shown else []
        lines += times_section(rows)
        lines += memory_section(case, rows)
    return lines + absences(data["rows"]) + errors(data["rows"])


def ema_section(data):
    rows = data["rows"]
    columns, graph = m.names(rows), graph_column(rows)
    lines = [
        [
            f"{row['model']}, {row['tensors']} tensors, {row['source']} to {row['target']}",
            *(time_cell(row, n) for n in columns),
            *(graph_cell(row) for _ in graph),
            rate_cell(row),
        ]
        for row in rows
    ]
    head = ["model", *columns, *graph, "of the bandwidth"]
    return ["", f"### {LABELS['ema']}", "", *table(head, lines), *absences(rows), *errors(rows)]


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
    for (label, case, name), cases in sorted(groups.items(), key=lambda item: min(ratio for ratio, _ in item[1])):
        ratio, worst = min(cases, key=lambda pair: pair[0])
        places = [spot(row) for _, row in cases]
        pair = f"{time_cell(worst, m.OURS)}, {name} {time_cell(worst, name)}"
        shown = f"{spot(worst)}: {pair}" if len(places) > 1 else pair
        lines.append([f"{label}, {case}", name, "; ".join(places), shown])
    return table(["case", "rival", "where", "the worst"], lines)


def family(row):
    if row["op"] == "ema":
        return f"{row['model']}, {row['source']} to {row['target']}"
    return m.Case(row["views"], row["dim"], row["dtype"]).title()


def spot(row):
    return "update" if row["op"] == "ema" else f"{row['batch']} {m.PARTS[row['part']]}"


def section(folder, pictures):
    """The section of one device: its folder's files of the bench command, as Markdown lines."""
    found = {op: m.load(folder, op) for op in m.OPS if (folder / f"{op}.json").exists()}
    header = next(iter(found.values()))["header"]
    lines = [f"## {device_name(header)}", "", "\n".join(facts(header)), ""]
    for op in ("info_nce", "byol"):
        if op in found:
            heads = [x for case, rows in m.cases(found[op]["rows"]).items() for x in headline(case, rows)]
            lines += [f"{LABELS[op]}:", "", *heads, ""] if heads else []
    lines += ["### Where ours is slower", "", *slower(found)]
    for op in ("info_nce", "byol"):
        lines += loss_section(folder, op, found[op], pictures) if op in found else []
    return lines + (ema_section(found["ema"]) if "ema" in found else [])
