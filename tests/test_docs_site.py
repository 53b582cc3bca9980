"""Test the documentation site: it builds without warnings, has every public name, and its layout is intact."""

import importlib
import io
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

for _name in ("sphinx", "furo", "myst_parser", "latex2mathml", "sphinx_copybutton"):
    pytest.importorskip(_name, reason="the documentation's dependencies are not installed")

from browser import check_layout, open_page  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import selfsup_kernels as sk  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS / "extensions"))

import mathml  # noqa: E402

PAGES = ("index.html", "quickstart.html", "performance.html", "objectives.html", "api/functional.html", "compat.html")
PAGES += ("gallery.html", "methods/simclr.html")
DRAWERS = ".sidebar-drawer, .toc-drawer, .skip-to-content"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as ``make docs`` does and return its folder."""
    out = tmp_path_factory.mktemp("site")
    said = io.StringIO()
    with warnings.catch_warnings():  # deprecation warnings of the extensions
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        app = Sphinx(DOCS, DOCS, out / "html", out / "doctrees", "html", status=None, warning=said, freshenv=True)
        app.build()
    assert app.statuscode == 0
    assert not said.getvalue()
    return out / "html"


def test_every_public_name_has_an_entry(site):
    pages = [page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html")]
    ids = {found for page in pages for found in re.findall(r'\bid="([^"]+)"', page)}
    missing = []
    modules = ["selfsup_kernels", *(f"selfsup_kernels.{name}" for name in ("methods", "optim"))]
    modules += [f"selfsup_kernels.compat.{name}" for name in sk.compat.__all__ if name not in ("patch", "report")]
    for module in modules:
        for name in importlib.import_module(module).__all__:
            if not {f"{module}.{name}", f"module-{module}.{name}"} & ids:
                missing.append(f"{module}.{name}")
    assert not missing
    assert {"selfsup_kernels.compat.patch", "selfsup_kernels.compat.report"} <= ids


class Links(HTMLParser):
    """Collect the ids and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.targets.add(value)


def test_links_of_the_site_are_not_broken(site):
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    broken, count = [], 0
    for page, found in pages.items():
        for target in found.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            aim = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not aim.exists() or (anchor and aim in pages and anchor not in pages[aim].ids):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert not broken
    assert count > 1000


def test_the_search_works_without_a_server(site):
    with open_page(site / "index.html") as page:
        page.fill("input[name=q]", "info_nce_loss")
        page.press("input[name=q]", "Enter")
        page.wait_for_selector("#search-results li a")
        titles = page.eval_on_selector_all("#search-results li", "all => all.map(e => e.textContent)")
        assert any("Python function" in title for title in titles)
        assert not page.complaints


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_pages_have_an_intact_layout(site, name, width):
    with open_page(site / name, width=width) as page:
        check_layout(page, ignore=DRAWERS)
        if name == "objectives.html":
            # Formulas are drawn, not shown as a line of letters: numerators are above their denominators.
            gaps = page.eval_on_selector_all(
                "math mfrac",
                "all => all.map(e => e.lastElementChild.getBoundingClientRect().top -"
                " e.firstElementChild.getBoundingClientRect().bottom)",
            )
            assert len(gaps) > 6
            assert min(gaps) > -2
        if name == "performance.html" and width == 390:  # wide tables scroll in their own box
            assert page.eval_on_selector_all(".table-wrapper", "all => all.some(e => e.scrollWidth > e.clientWidth)")


def test_formulas_that_cannot_be_drawn_are_refused():
    for formula, reason in ((r"\unheardof{x}", r"unknown: .unheardof"), (r"\left( x", "Left"), ("x_", "Subscript")):
        with pytest.raises(ValueError, match=reason):
            mathml.converted(formula, "inline")
    assert "unheardof" not in mathml.converted(r"\operatorname{softmax}(x)", "inline")


def test_a_space_separates_a_function_from_its_argument():
    for formula, apart in ((r"\log x", True), (r"\sum_b \exp S_{ab}", True), (r"\log(x)", False), ("a b", False)):
        assert ("<mspace" in mathml.converted(formula, "inline")) == apart
