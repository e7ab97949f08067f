"""Write a report as a single HTML file that loads nothing else.

jinja2 fills in the page, `plots` draws the figures as SVG, DataTables (in the build that itables ships) makes the tables sortable, and pygments marks changed
lines.
"""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from approx_compile.tools.report.plots import Roof
    from approx_compile.tools.report.report_data import ReportData

HEIGHTS = {
    "GFLOP/s at most": "A product's height is the most that the machine allows at its intensity; no time was predicted or measured.",
    "GFLOP/s, predicted": "A product's height is the rate predicted for the exact product.",
}


class Peaks(Protocol):
    """The peak rates of a machine that a roofline needs. The profiles of `approx_compile.machine` have these methods."""

    def dtypes(self) -> list[str]:
        """Return the names of the dtypes whose peaks are known, such as "float32"."""
        ...

    def peak_gflops(self, dtype: str) -> float:
        """Return the rate of large products in a dtype.

        Args:
            dtype: One of `dtypes()`.

        Returns:
            GFLOP/s (10^9 FLOPs per second).
        """
        ...

    def bandwidth_gb_s(self) -> float:
        """Return the bandwidth of the memory in GB/s (10^9 bytes per second)."""
        ...


@dataclass(frozen=True)
class Difference:
    """The differences between the code of one graph before and after the rewrite, as HTML.

    Attributes:
        before: The code before the rewrite, with the removed lines marked.
        after: The code after the rewrite, with the added lines marked.
        changes: The changed lines alone, with some context.
        removed: The number of removed lines.
        added: The number of added lines.
    """

    before: str
    after: str
    changes: str
    removed: int
    added: int


def write(report: ReportData, path: str | Path, machine: Peaks | None = None) -> None:
    """Write a report as one HTML file.

    Args:
        report: The report.
        path: The file.
        machine: The machine's peaks for the roofline; None leaves out the roofline.

    Raises:
        ImportError: If the extra `report` is not installed.
        OSError: If the file cannot be written.
    """
    try:
        page = render(report, machine)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] not in ("itables", "jinja2", "matplotlib", "pygments"):
            raise
        raise ImportError(f"to_html needs {e.name}, which is not installed: pip install 'approx-compile[report]'") from None
    Path(path).write_text(page, encoding="utf-8")


def render(report: ReportData, machine: Peaks | None) -> str:
    """Render a report as an HTML page.

    Args:
        report: The report.
        machine: The machine's peaks for the roofline; None leaves out the roofline.

    Returns:
        The text of the page.

    Raises:
        ModuleNotFoundError: If a library of the extra `report` is not installed.
    """
    import jinja2
    import pygments.formatters

    from approx_compile.passes.planning.selection import PREDICTION_ERROR
    from approx_compile.tools.report import report_text, words
    from approx_compile.tools.report.plots import LABELS, Roof, kind_of

    source = resources.files("approx_compile.tools.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    style = {name: pygments.formatters.HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark")}
    roofs = {dtype: Roof(machine.peak_gflops(dtype), machine.bandwidth_gb_s()) for dtype in machine.dtypes()} if machine is not None else {}
    return environment.from_string(source).render(
        report=report,
        sites=list(zip(report.keys, report.sites, strict=True)),
        verdict=report_text.verdict(report),
        notes=list(report_text.notes(report, advice=False)),  # it stands beside the reasons
        words=words,
        flops_title=report_text.flops_title(report),
        flops_of=lambda site: report_text.flops_of(site, report),
        kind_of=kind_of,
        labels=LABELS,
        broken=_breakable,
        marked=_code_marked,
        graphs=[difference(b, a) for b, a in zip(report.before, report.after, strict=True)],
        reasons=any(words.why(s) for s in report.sites),
        timed=any(s.time_exact_us is not None for s in report.sites),
        break_even=f"{PREDICTION_ERROR:g}" if any(s.break_even for s in report.sites) else "",
        traced=report.traced(),
        nothing=report_text.NOTHING_FOUND,
        light=style["default"],
        dark=style["github-dark"],
        **_tables(),
        **_figures(report, roofs),
    )


def _breakable(name: str) -> Any:
    """Return a name as HTML that a browser may break after dots and underscores, and nowhere else."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in re.split(r"(?<=[._/])", name) if part]
    return Markup("<wbr>").join(parts)


def _code_marked(text: str) -> Any:
    """Return text as HTML with what is in backticks marked as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _tables() -> dict[str, str]:
    """Return the JavaScript module of DataTables, in base64 so that the page loads it from memory, and its style sheet."""
    import itables.options

    bundle = Path(itables.options.dt_bundle)
    return {"table_module": base64.b64encode(bundle.read_bytes()).decode("ascii"), "table_style": bundle.with_suffix(".css").read_text(encoding="utf-8")}


def _figures(report: ReportData, roofs: Mapping[str, Roof]) -> dict[str, str]:
    """Return the figures as SVG, empty where there is nothing to draw, and the note on the roofline."""
    from approx_compile.tools.report import plots

    roofline = plots.roofline(report, roofs)
    trained = report.adaptive is not None and report.adaptive.history
    return {
        "graph": plots.site_graph(report) if plots.branches(report) else "",
        "roofline": roofline[0] if roofline is not None else "",
        "roofline_note": HEIGHTS[roofline[1]] if roofline is not None else "",
        "rows": plots.rows_over_steps(report.adaptive.history, report.adaptive.steps) if report.adaptive is not None and trained else "",
    }


def difference(before: str, after: str) -> Difference:
    """Compare the code of a graph before and after the rewrite line by line.

    Args:
        before: The code before.
        after: The code after.

    Returns:
        The differences as HTML.
    """
    a, b = before.splitlines(), after.splitlines()
    removed: list[int] = []
    added: list[int] = []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            removed += range(a0 + 1, a1 + 1)
            added += range(b0 + 1, b1 + 1)
    changes = "\n".join(difflib.unified_diff(a, b, "before", "after", lineterm=""))
    return Difference(_marked(before, removed), _marked(after, added), _marked(changes, [], "diff"), len(removed), len(added))


def _marked(text: str, lines: list[int], language: str = "text") -> str:
    """Return code as HTML with some lines marked.

    The default language is plain text, because graphs have thousands of lines: with Python's syntax coloured word by word, a browser would take half a minute
    to show the page.
    """
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    lexer = get_lexer_by_name(language, stripnl=False)  # empty lines at the beginning must stay, because lines are marked by number
    return str(highlight(text, lexer, HtmlFormatter(hl_lines=lines, wrapcode=True)))
