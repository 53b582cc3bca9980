"""Write the page of ``--html``: one file, no network."""

from pathlib import Path

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench import plots, tables
from selfsup_kernels.lab.pages.figures import data_uri


def write(path, header, rows):
    sections = [section(op, [row for row in rows if row["op"] == op]) for op in tables.TITLES]
    answer, numbers = tables.answer(rows)
    text = pages.render(
        __package__,
        "report.html",
        answer=answer,
        numbers=numbers,
        device=tables.device_line(header),
        rates=tables.rates_line(header),
        gpu=header["kind"] == "cuda",
        sections=[made for made in sections if made],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def section(op, rows):
    """Return the title, the pictures (source, text) of one operation, and its table."""
    groups = {}
    for row in rows:
        if row["part"] in ("both", "update"):
            key = ("model", "dtype") if op == "ema" else ("views", "dim", "dtype")
            groups.setdefault(tables.facts(row, key), []).append(row)
    drawn = [
        (data_uri(picture), f"{tables.TITLES[op]}, {title}: {column}")
        for title, some in groups.items()
        for column in (("time",) if op == "ema" else ("time", "memory"))
        if (picture := plots.rivals_of(some, column, title))
    ]
    return rows and {"title": tables.TITLES[op], "pictures": drawn, "table": tables.make(op, rows)}
