"""The page of ``--html``: one file, no network."""

from pathlib import Path

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench import findings, plots, tables
from selfsup_kernels.lab.pages.figures import data_uri


def write(path, header, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(header, rows), encoding="utf-8")


def page(header, rows) -> str:
    operations = [op for op in tables.TITLES if any(row["op"] == op for row in rows)]
    roofline = plots.roofline(header, rows)
    return pages.render(
        __package__,
        "report.html",
        answer=findings.answer(rows),
        findings=findings.findings(rows),
        wrong=findings.wrong(rows),
        device=tables.device_line(header),
        rates=tables.rates_line(header),
        gpu=header["kind"] == "cuda",
        sections=[section(op, rows) for op in operations],
        roofline=roofline and data_uri(roofline),
        errors=errors(rows),
    )


def section(op, rows):
    """Title, pictures (source, text, caption) and table of one operation."""
    rows = [row for row in rows if row["op"] == op]
    pictures = list(of_updates(rows)) if op == "ema" else list(of_batches(op, rows))
    return {"op": op, "title": tables.TITLES[op], "groups": pictures, "table": tables.make(op, rows)}


def of_batches(op, rows):
    """A pair of pictures for each number of views, width and dtype."""
    groups = {}
    for row in rows:
        if row["part"] == "both":
            groups.setdefault((row["views"], row["dim"], row["dtype"]), []).append(row)
    for (views, dim, dtype), some in groups.items():
        title = f"{views} views, D = {dim}, {dtype}"
        if len({row["batch"] for row in some}) == 1:
            title += f", B = {some[0]['batch']}"
        made = {column: plots.over_batch(some, column) for column in plots.COLUMNS}
        drawn = [
            (data_uri(picture), f"{tables.TITLES[op]}, {title}: {column} over the batch size")
            for column, picture in made.items()
            if picture
        ]
        if drawn:
            yield title, drawn


def of_updates(rows):
    drawn = [
        (data_uri(picture), f"EMA update of {row['model']} from {row['source']}: time of each rival")
        for row, picture in plots.updates(rows)
    ]
    if drawn:
        yield "", drawn


def errors(rows):
    """``(head, lines)``: the largest error of each column for each operation and dtype."""
    found = {}
    for row in rows:
        for name in row["errors"]:
            value = tables.worst(row, name)
            if value is not None:
                cells = found.setdefault(name, {})
                key = (tables.TITLES[row["op"]], row["dtype"])
                largest, wrong = cells.get(key, (0.0, False))
                cells[key] = max(value, largest), wrong or tables.wrong(row, name)
    heads = list(dict.fromkeys(key for cells in found.values() for key in cells))
    lines = [
        (
            tables.label(name),
            [(f"{cells[key][0]:.0e}", cells[key][1]) if key in cells else ("", False) for key in heads],
        )
        for name, cells in found.items()
    ]
    return [", ".join(key) for key in heads], lines
