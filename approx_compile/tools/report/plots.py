"""Draw the figures of a report with plotly: the graph of sites, the roofline, and the cost of every site before and after the rewrite.

Plotly is an optional dependency (`approx-compile[report]`), so this module is imported only when a page is written. Names are escaped, because plotly
interprets HTML tags in text.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import networkx as nx
import plotly.graph_objects as go

if TYPE_CHECKING:
    from approx_compile.passes.planning.plan import ProductPlan
    from approx_compile.tools.report.report_data import ReportData, SiteReport

COLORS = {"sampled": "#e07b28", "replaced": "#a35bc9", "rows": "#2f86d6", "exact": "#8a9099"}
SYMBOLS = {"sampled": "circle", "replaced": "triangle-up", "rows": "diamond", "exact": "square"}
LABELS = {"sampled": "sampled", "replaced": "gradient replaced", "rows": "backward on rows", "exact": "exact"}
BEFORE = "#9aa3ad"
LABELLED_COLUMNS = 6
"""The largest number of columns of sites at which names are written beside the sites. With more columns the names are only in the hover text."""


@dataclass(frozen=True)
class Roof:
    """The peak rates of a machine in one dtype."""

    gflops: float
    """The rate of large products in 10^9 FLOP/s."""
    gb_s: float
    """The bandwidth of the memory in 10^9 bytes/s."""

    def at(self, intensity: float) -> float:
        """Compute the highest rate that the machine allows: min(peak, intensity * bandwidth).

        Args:
            intensity: FLOPs per byte.

        Returns:
            GFLOP/s.
        """
        return min(self.gflops, intensity * self.gb_s)


@dataclass(frozen=True)
class Rated:
    """A product as a point of the roofline."""

    text: str
    """The hover text."""
    decision: str
    intensity: float
    """FLOPs per byte."""
    height: float
    """GFLOP/s, or FLOPs if no rate is known."""


def kind_of(site: SiteReport) -> str:
    """Classify a site by what is done with its products; the first kind that applies counts.

    Args:
        site: The site.

    Returns:
        "sampled" if a product is sampled; else "replaced" if a gradient is replaced; else "rows" if the backward pass runs on some of the rows; else "exact".
    """
    kinds = {"sampled" if p.decision == "coupled" else p.decision for p in site.products.values()}
    return next((kind for kind in COLORS if kind in kinds), "exact")


# --- the graph of sites ---


def site_graph(report: ReportData) -> go.Figure:
    """Draw the graph of sites, coloured by decision, with an arrow from each site to those that read it.

    The layer of a site, from top to bottom, is the length of the longest chain of sites before it. Arrows that follow from others are left out, because behind
    residual sums every site reads all sites before it.

    Args:
        report: The report.

    Returns:
        The figure.
    """
    graph = report.to_networkx()
    places = _places(graph)
    figure = go.Figure()
    xs, ys, sizes = [], [], []
    for a, b in nx.transitive_reduction(graph).edges:
        points = list(_arrow(places[a], places[b]))
        xs += [*(x for x, _ in points), None]
        ys += [*(y for _, y in points), None]
        sizes += [0] * (len(points) - 1) + [9, 0]
    marker = {"symbol": "arrow", "angleref": "previous", "size": sizes, "standoff": 7, "color": BEFORE}
    line = {"color": BEFORE, "width": 1, "shape": "spline"}
    figure.add_scatter(x=xs, y=ys, mode="lines+markers", line=line, marker=marker, hoverinfo="skip", showlegend=False, name="edges")
    columns = max((x for x, _ in places.values()), default=0) * 2 + 1
    by_kind: dict[str, list[tuple[str, SiteReport]]] = defaultdict(list)
    for key, site in zip(report.keys, report.sites, strict=True):
        by_kind[kind_of(site)].append((key, site))
    for kind, members in by_kind.items():
        figure.add_scatter(
            x=[places[key][0] for key, _ in members],
            y=[places[key][1] for key, _ in members],
            mode="markers+text" if columns <= LABELLED_COLUMNS else "markers",
            text=["  " + escape(_short(key)) for key, _ in members],
            textposition="middle right",
            hovertext=[_hover(key, site) for key, site in members],
            hoverinfo="text",
            marker={"color": COLORS[kind], "symbol": SYMBOLS[kind], "size": 12},
            name=LABELS[kind],
        )
    depth = 1 - min((y for _, y in places.values()), default=0)
    figure.update_layout(height=120 + 34 * depth, legend={"orientation": "h", "y": 1, "yanchor": "bottom"}, margin={"l": 10, "r": 10, "t": 50, "b": 10})
    figure.update_xaxes(visible=False, range=[-columns / 2 - 0.1, columns / 2 + 0.4])
    figure.update_yaxes(visible=False, range=[0.7 - depth, 0.7])
    return figure


def _places(graph: nx.DiGraph[str]) -> dict[str, tuple[float, float]]:
    """Return (column, -layer) of every site. Sites come in execution order, so the sites that a site reads have been placed before it."""
    layer: dict[str, int] = {}
    layers: dict[int, list[str]] = defaultdict(list)
    for name in graph:
        layer[name] = max((layer[source] + 1 for source in graph.predecessors(name) if source in layer), default=0)
        layers[layer[name]].append(name)
    return {name: (i - (len(names) - 1) / 2, -depth) for depth, names in layers.items() for i, name in enumerate(names)}


def _arrow(a: tuple[float, float], b: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Yield the points of a line between two sites. A line that skips layers within one column bends around the sites between."""
    yield a
    span = a[1] - b[1]
    if span > 1 and a[0] == b[0]:
        yield a[0] - min(0.45, 0.06 * math.log2(span) + 0.04), (a[1] + b[1]) / 2
    yield b


def _hover(key: str, site: SiteReport) -> str:
    shown = ", ".join(site.reads[-4:]) + (f" and {len(site.reads) - 4} before" if len(site.reads) > 4 else "")
    flops = f"FLOPs {site.flops_exact:.4g} -> {site.flops_sampled:.4g}"
    lines = (key, f"{site.op}  {site.shape}  {site.dtype}", f"{site.decision}: {site.reason}", flops, f"reads {shown or 'no other site'}")
    return "<br>".join(escape(line) for line in lines)


def _short(text: str, limit: int = 48) -> str:
    """Shorten a long name to its end, which says more than its beginning."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


# --- roofline ---


def roofline(report: ReportData, roofs: Mapping[str, Roof]) -> tuple[go.Figure, str]:
    """Draw the roofline, with every exact product at its FLOPs per byte; the bytes are those of its operands and its result, each counted once.

    The height of a product is its predicted rate if the report has times for all products. Otherwise it is the highest rate that `roofs` allow, if they have
    all dtypes of the report. Otherwise no rate is known, and the height is the number of FLOPs.

    Args:
        report: The report.
        roofs: The peak rates by dtype.

    Returns:
        The figure, and what the height means: the title of the vertical axis.
    """
    what, rated = _rated(report, roofs)
    figure = go.Figure()
    for kind in dict.fromkeys(r.decision for r in rated):
        points = [r for r in rated if r.decision == kind]
        figure.add_scatter(
            x=[p.intensity for p in points],
            y=[p.height for p in points],
            mode="markers",
            hovertext=[p.text for p in points],
            hoverinfo="text+x+y",
            marker={"color": COLORS[kind], "symbol": SYMBOLS[kind], "size": 9, "opacity": 0.75, "line": {"width": 1, "color": BEFORE}},
            name=LABELS[kind],
        )
    used = {s.dtype for s in report.sites}
    for dtype, roof in ((d, r) for d, r in roofs.items() if d in used and what != "FLOPs"):
        ends = sorted({min([r.intensity for r in rated]) / 2, roof.gflops / roof.gb_s, max([r.intensity for r in rated]) * 2})
        named = f"{escape(dtype)}: {roof.gflops:.4g} GFLOP/s, {roof.gb_s:.4g} GB/s"
        figure.add_scatter(x=ends, y=[roof.at(x) for x in ends], mode="lines", name=named, hoverinfo="name")
    figure.update_layout(height=460, margin={"l": 10, "r": 10, "t": 20, "b": 10})
    figure.update_xaxes(type="log", title="FLOPs per byte", automargin=True, dtick="D2", tickformat="~s")
    figure.update_yaxes(type="log", title=what, automargin=True, dtick="D2", tickformat="~s")
    return figure, what


def _rated(report: ReportData, roofs: Mapping[str, Roof]) -> tuple[str, list[Rated]]:
    products = [(key, s, p) for key, s in zip(report.keys, report.sites, strict=True) for p in s.products.values()]
    if products and all(_time_us(p) for _, _, p in products):
        what = "GFLOP/s, predicted"
    elif products and all(s.dtype in roofs for _, s, _ in products):
        what = "GFLOP/s at most"
    else:
        what = "FLOPs"

    def height(site: SiteReport, p: ProductPlan, intensity: float) -> float:
        if what == "FLOPs":
            return p.flops_exact
        return p.flops_exact / _time_us(p) / 1e3 if what == "GFLOP/s, predicted" else roofs[site.dtype].at(intensity)

    def rate(key: str, site: SiteReport, p: ProductPlan) -> Rated:
        intensity = p.flops_exact / max(1, p.bytes_exact)
        kind = "sampled" if p.decision == "coupled" else p.decision
        text = "<br>".join(escape(t) for t in (f"{key}: {p.name}", f"{site.shape} {site.dtype}", f"{p.decision}: {p.reason}"))
        return Rated(text, kind, intensity, height(site, p, intensity))

    return what, [rate(*one) for one in products if one[2].flops_exact > 0]


def _time_us(p: ProductPlan) -> float:
    return float(getattr(p, "time_exact_us", None) or 0.0)


# --- before and after ---


def before_and_after(names: Sequence[str], before: Iterable[float], after: Iterable[float], what: str) -> go.Figure:
    """Draw two bars for every site, its cost before and after the rewrite, in execution order from the top.

    Args:
        names: The names of the sites.
        before: The costs before.
        after: The costs after.
        what: What the costs are, with their unit.

    Returns:
        The figure.
    """
    places = list(range(len(names)))
    figure = go.Figure()
    for title, values, color in (("before", before, BEFORE), ("after", after, COLORS["sampled"])):
        figure.add_bar(
            x=list(values),
            y=places,
            orientation="h",
            name=title,
            marker={"color": color},
            hovertext=[escape(n) for n in names],
            hoverinfo="x+text+name",
        )
    legend = {"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "traceorder": "normal"}
    figure.update_layout(barmode="group", height=150 + 30 * len(names), legend=legend)
    longest = max((len(_short(n)) for n in names), default=0)
    # the margin is computed here, because plotly's "automargin" takes seconds to measure every name
    figure.update_layout(margin={"l": 20 + 7 * longest, "r": 10, "t": 90, "b": 50}, bargap=0.25)
    figure.update_xaxes(title=what, tickformat="~s", side="top" if len(names) > 15 else "bottom")
    ticks = {"tickvals": places, "ticktext": [escape(_short(n)) for n in names]}
    figure.update_yaxes(range=[len(names) - 0.4, -0.6], **ticks)
    return figure
