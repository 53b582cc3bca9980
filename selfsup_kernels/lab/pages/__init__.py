"""What the commands' reports share: pages that need no network, their pictures, and what is printed."""


def render(package, template, **values) -> str:
    """A page from ``template`` in ``package``'s folder; it extends ``base.html``, which holds the style."""
    import jinja2

    loaders = [jinja2.PackageLoader(package, "."), jinja2.PackageLoader(__name__, ".")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def console(**options):
    """A console whose tables are as wide as their words where the output goes into a file, which has no width."""
    from rich.console import Console

    made = Console(**options)
    return made if made.is_terminal else Console(width=120, **options)
