"""Sphinx's configuration of the site: ``make docs``, or ``sphinx-build docs build/docs``. No network is used."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from selfsup_kernels.version import __version__

project = "selfsup_kernels"
author = "the authors of selfsup_kernels"
project_copyright = "%Y, the authors of selfsup_kernels"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "mathml"]
exclude_patterns = ["extensions", "_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
default_role = "code"

nitpicky = True
# PyTorch's and Python's own classes: their pages are on other hosts, and a build needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|dist|nn|typing|collections)\..*"),
    ("py:.*", r"(optional|callable|Iterable|NamedTuple|Module|Tensor|OrderedDict|Mapping)"),
]

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # keeps arguments that share a line of the docstring on one line

myst_enable_extensions = ["dollarmath", "html_image"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"selfsup_kernels {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_domain_indices = False
html_show_search_summary = False  # is fetched, which browsers refuse to a page that was opened from a file
html_math_renderer = "mathml"
pygments_style = "friendly"

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
