"""Convert formulas to MathML, which browsers draw without scripts, fonts or a network.

A formula that cannot be converted as a whole is a warning, and ``make docs`` turns warnings into errors.
"""

import html
import re
from xml.etree import ElementTree

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
MATHML = "http://www.w3.org/1998/Math/MathML"
# latex2mathml keeps unknown commands as names that begin with a backslash, without a warning.
UNKNOWN = re.compile(r"\\[A-Za-z]+")
FUNCTION = re.compile(r"[A-Za-z]{2,}")
NO_SPACE_BEFORE = set("()[]|,⟩")

ElementTree.register_namespace("", MATHML)


def converted(formula: str, display: str) -> str:
    """Return the MathML of a formula.

    Raises:
        ValueError: latex2mathml does not know a command, or raised an exception.
    """
    try:
        root = ElementTree.fromstring(convert(formula, display=display))
    except Exception as error:  # latex2mathml has a dozen exception classes without a common base
        raise ValueError(f"{type(error).__name__} {error}".strip()) from error
    for row in root.iter(f"{{{MATHML}}}mrow"):
        _space_functions(row)
    for operator in root.iter(f"{{{MATHML}}}mo"):
        if operator.text == "|":  # bars of a norm, which browsers would space like a relation
            operator.set("lspace", "0.1em")
            operator.set("rspace", "0.1em")
    made = ElementTree.tostring(root, encoding="unicode")
    unknown = UNKNOWN.search(made)
    if unknown:
        raise ValueError(f"unknown: {unknown.group()}")
    return made


def _space_functions(row):
    """Insert a thin space between a function's name and an argument without brackets, as TeX does."""
    children = list(row)
    for at in reversed(range(len(children) - 1)):
        first = children[at]
        name = first if first.tag.endswith("}mi") else next(iter(first), None)
        following = "".join(children[at + 1].itertext())[:1]
        if (
            name is not None
            and name.tag.endswith("}mi")
            and FUNCTION.fullmatch(name.text or "")
            and following not in NO_SPACE_BEFORE
        ):
            row.insert(at + 1, ElementTree.Element(f"{{{MATHML}}}mspace", width="0.17em"))


def _write(translator, node, display):
    formula = node.astext()
    try:
        made = converted(formula, display)
    except ValueError as error:
        LOGGER.warning("formula %r: %s", formula, error, location=node)
        made = f"<code>{html.escape(formula)}</code>"
    if display == "block":
        label = f' id="{html.escape(node["ids"][0])}"' if node["ids"] else ""
        made = f'<div class="formula"{label}>{made}</div>'
    translator.body.append(made)
    raise SkipNode


def _inline(translator, node):
    _write(translator, node, "inline")


def _block(translator, node):
    _write(translator, node, "block")


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
