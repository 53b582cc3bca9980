"""Share what the commands' reports have: pages that need no network, their tables, and what is printed."""

from typing import NamedTuple

LEFT = ("", "part", "run", "features")
"""Titles of columns of names."""
STYLES = {"ours": "bold cyan", "absent": "dim", "faster": "yellow", "wrong": "bold red"}
THEMES = {
    "light": {
        **{"paper": "#ffffff", "ink": "#1f2933", "soft": "#52606d", "line": "#dde2e7", "tint": "#f3f5f7"},
        **{"ours": "#1f5fbf", "faster": "#8a5200", "wrong": "#b3261e", "shade": "#00000040"},
    },
    "dark": {
        **{"paper": "#14181d", "ink": "#e6e9ec", "soft": "#a9b4bf", "line": "#38414b", "tint": "#232a31"},
        **{"ours": "#8ab8ff", "faster": "#e8b04b", "wrong": "#ff9a90", "shade": "#ffffff59"},
    },
}
"""Colours of the pages, and of text, axes and grids in their pictures."""


class Table(NamedTuple):
    """A table that ``show`` prints and the template ``table.html`` renders."""

    title: str
    columns: tuple
    rows: list
    styles: list = []  # noqa: RUF012
    """A name for each row: a class of the page, and a key of ``STYLES`` where it is printed in colour."""
    notes: list = []  # noqa: RUF012


def render(package, template, **values) -> str:
    """Make a page from ``template`` in ``package``'s folder; it extends ``base.html``.

    The page begins with ``answer``, a sentence, and ``numbers``, three of ``(value, label)``.
    """
    import jinja2

    loaders = [jinja2.PackageLoader(package, "."), jinja2.PackageLoader(__name__, ".")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(themes=THEMES, left=LEFT, **values)


def console(width=120):
    """Make a console whose tables have a fixed width where the output goes into a file, which has none."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=width)


def show(console, answer, tables, about=(), notes=(), page=None):
    """Print the answer, lines about the run, tables, notes and where the page is."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as Grid

    def say(lines, style=None):
        for line in lines:
            console.print(escape(line), style=style, highlight=False, soft_wrap=True)

    say([answer], "bold")
    say(about, "dim")
    for table in tables:
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in table.columns:
            grid.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
        for row, style in zip(table.rows, table.styles or [None] * len(table.rows), strict=True):
            grid.add_row(*(escape(str(cell)) for cell in row), style=STYLES.get(style))
        console.print(grid)
        say(table.notes, "dim")
    say(f"- {note}" for note in notes)
    say([f"\nReport: {page.resolve()}"] if page else [])
