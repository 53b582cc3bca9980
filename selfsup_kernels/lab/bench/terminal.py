"""The command's tables on a terminal."""

from rich.table import Table
from rich.text import Text

from selfsup_kernels.lab.bench import tables

STYLES = {"ours": "bold cyan", "absent": "dim", "faster": "yellow"}
LEFT = ("part", "")


def show(console, header, rows):
    """Print the header, a table for each operation and, below each, what is missing and why."""
    console.print(Text(tables.device_line(header)))
    console.print(Text(tables.rates_line(header), style="dim"))
    for op in tables.TITLES:
        if any(row["op"] == op for row in rows):
            of_op(console, tables.make(op, rows))


def of_op(console, table):
    made = Table(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    for name in table.head:
        left = name in LEFT
        made.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for line in table.lines:
        cells = [Text(cell) for cell in line.cells]
        if line.wrong:
            cells[-1].stylize("bold red")
        made.add_row(*cells, style=STYLES.get(line.style))
    console.print()
    console.print(made)
    for note in table.notes:
        console.print(Text(f"  {note}", style="dim"))
