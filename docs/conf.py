"""Sphinx configuration: `make docs` builds the site into docs/_build/html."""

from __future__ import annotations

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
nitpicky = False
