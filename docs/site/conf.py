"""Configuration of Sphinx for the site (see ``build.py``)."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

project = "COREC, reproduced"
author = "the COREC reproduction contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
root_doc = "index"
exclude_patterns = ["corec/**", "params/**", "profiles/**", "tests/**", "extra/**", "static/**"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]
html_theme_options: dict[str, Any] = {
    "home_page_in_toc": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
}
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_show_sourcelink = False
html_copy_source = False
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = [
    "myst.header",
    "mystnb.unknown_mime_type",
    "ref.python",
    "myst.xref_missing",
    "docutils",
    "misc.highlighting_failure",
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = False
napoleon_use_rtype = False  # the return values are described in prose


def mathml(node: Any, display: str) -> str:
    """MathML of a formula, which browsers render without a script."""
    text = re.sub(r"\\(label\{[^}]*\}|!|,|;)", lambda match: {"!": "", ",": r"\:", ";": r"\:"}.get(match[1], ""), node.astext())
    return convert(text, display=display)


def visit_inline(translator: Any, node: Any) -> None:
    """Write a formula in a line of text."""
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: Any) -> None:
    """Write a displayed formula."""
    translator.body.append(f'<div class="formula">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
