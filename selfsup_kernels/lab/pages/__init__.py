"""The parts that the commands' reports share: pages that need no network, their tables, and what is printed."""

from typing import NamedTuple


class Table(NamedTuple):
    """A table that ``show`` prints and the template ``table.html`` renders."""

    title: str
    columns: tuple
    rows: list


def render(package, template, **values) -> str:
    """Make a page from ``template`` in ``package``'s folder; it extends ``base.html``.

    With ``answer``, a sentence, and ``numbers``, three of ``(value, label)``, the page begins with these.
    """
    import jinja2

    loaders = [jinja2.PackageLoader(package, "."), jinja2.PackageLoader(__name__, ".")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def console(**options):
    """Make a console whose tables have a fixed width where the output goes into a file, which has none."""
    from rich.console import Console

    made = Console(**options)
    return made if made.is_terminal else Console(width=120, **options)


def show(console, tables, answer, notes, page):
    """Print tables, the answer, notes and where the page is."""
    from rich.table import Table as Printed

    for table in tables:
        made = Printed(title=table.title, pad_edge=False, collapse_padding=True)
        for i, column in enumerate(table.columns):
            made.add_column(column, justify="right" if i else "left")
        for row in table.rows:
            made.add_row(*map(str, row))
        console.print(made)
    for line in (f"\n[bold]{answer}[/bold]", *(f"- {note}" for note in notes), f"\nReport: {page.resolve()}"):
        console.print(line, highlight=False, soft_wrap=True)
