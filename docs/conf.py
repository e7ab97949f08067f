"""Sphinx configuration: `make docs` builds the site into docs/_build/html."""

from __future__ import annotations

import re
from typing import Any

import approx_compile

project = "approx_compile"
copyright = "the approx_compile authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design", "sphinxcontrib.typer"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "pydata_sphinx_theme"
html_title = "approx_compile"
html_static_path = ["_static"]
html_css_files = ["site.css"]
SECTIONS = ("tutorials", "how-to", "methods", "explanation", "reference", "contributing")
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": {f"{section}/*": ["page-toc"] for section in SECTIONS} | {"results/*": [], "index": []},  # tables of results need the width
}
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpicky = True
# Objects of other libraries: the site is built without a network, so their inventories cannot be read.
_LIBRARIES = "torch|nn|fx|nx|networkx|rich|pydantic|pathlib|collections|typing|os|Tensor|Module|Path|Any|Callable|Mapping|Sequence|PathLike|DiGraph|Progress"
_LIBRARIES += "|DistributedDataParallel"
# Built-in types, and literals in annotations.
_BUILT_IN = r"str|int|float|bool|dict|list|tuple|set|type|object|None|optional|ValueError|TypeError|KeyError|OSError|ImportError|.*['\"].*"
nitpick_ignore_regex = [("py:.*", rf"({_LIBRARIES})(\..*)?"), ("py:.*", rf"({_BUILT_IN})")]
# Types in annotations whose content is documented in other words: tables of settings on the page on configuration, records and plans as tables of fields.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        *(f"approx_compile.config.schema.{table}" for table in ("OutputTable", "GradTable", "InputTable", "WeightTable", "AdaptiveTable")),
        "approx_compile.config.units.UnitsTable",
        "approx_compile.config.adaptive.AdaptiveTable",
        "approx_compile.rows.variance_budget.VarianceBudget",
        "approx_compile.config.rules.Rule",
        "approx_compile.config.plan_file.Tuned",
        *(f"approx_compile.passes.planning.plan.{plan}" for plan in ("ProductPlan", "RowCut")),
        *(f"approx_compile.tools.report.report_data.{part}" for part in ("SiteReport", "AdaptiveShares")),
        *(f"approx_compile.tools.recommend.{part}" for part in ("Facts", "Advice")),
        "approx_compile.tools.report.html.Peaks",  # a protocol: any object with the peak rates
        "AdaptiveTable",
        "Listener",  # the type of a callback of `Backend`, for tools
    )
]


def _link_public_names(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn text in single backticks into a link if it is a public name of the package, else into code."""

    def replaced(match: re.Match[str]) -> str:
        word = match[1].removesuffix("()").removeprefix("approx_compile.")
        return f":py:obj:`approx_compile.{word}`" if word in approx_compile.__all__ else f"``{match[1]}``"

    lines[:] = [re.sub(r"(?<![`:])`([^`]+)`(?![`_])", replaced, line) for line in lines]


def setup(app: Any) -> None:
    """Connect the hook with autodoc."""
    app.connect("autodoc-process-docstring", _link_public_names)
