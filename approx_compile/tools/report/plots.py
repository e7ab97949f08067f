"""A report's pictures as plotly figures: the graph of sites, the roofline, what every site costs before and after.

Plotly is an extra (`approx-compile[report]`), so this module is imported only where a page is written. Names are escaped: plotly reads tags in text.
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
"""Sites side by side up to which their names are written beside them; with more the names are in the hover text alone."""


@dataclass(frozen=True)
class Roof:
    """What a machine can do in one dtype: `gflops` (10^9 FLOP/s of large products) and `gb_s` (10^9 bytes/s of memory)."""

    gflops: float
    gb_s: float

    def at(self, intensity: float) -> float:
        """GFLOP/s at most, at `intensity` FLOPs per byte: min(peak, intensity * bandwidth)."""
        return min(self.gflops, intensity * self.gb_s)


@dataclass(frozen=True)
class Rated:
    """A product on the roofline: FLOPs per byte and `height` (GFLOP/s, or FLOPs where no rate is known)."""

    text: str
    decision: str
    intensity: float
    height: float


def kind_of(site: SiteReport) -> str:
    """`sampled`; else `replaced`: a gradient is; else `rows`: the backward pass runs on some of the rows; else `exact`."""
    kinds = {"sampled" if p.decision == "coupled" else p.decision for p in site.products.values()}
    return next((kind for kind in COLORS if kind in kinds), "exact")


# --- the graph of sites ---


def site_graph(report: ReportData) -> go.Figure:
    """The sites from top to bottom by the longest chain of sites before them, coloured by decision, with an arrow from each to those that read it, less
    the arrows that others imply: behind residual sums every site reads all before it.
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
    for kind, found in by_kind.items():
        figure.add_scatter(
            x=[places[key][0] for key, _ in found],
            y=[places[key][1] for key, _ in found],
            mode="markers+text" if columns <= LABELLED_COLUMNS else "markers",
            text=["  " + escape(_short(key)) for key, _ in found],
            textposition="middle right",
            hovertext=[_hover(key, site) for key, site in found],
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
    """(column, -layer) of every site; sites come in execution order, so those a site reads have theirs already."""
    layer: dict[str, int] = {}
    layers: dict[int, list[str]] = defaultdict(list)
    for name in graph:
        layer[name] = max((layer[source] + 1 for source in graph.predecessors(name) if source in layer), default=0)
        layers[layer[name]].append(name)
    return {name: (i - (len(names) - 1) / 2, -depth) for depth, names in layers.items() for i, name in enumerate(names)}


def _arrow(a: tuple[float, float], b: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """A line; one that skips layers in its own column bends around the sites between."""
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
    """The end of a long name says more than its beginning."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


# --- roofline ---


def roofline(report: ReportData, roofs: Mapping[str, Roof]) -> tuple[go.Figure, str]:
    """Every product over its FLOPs per byte (operands and result once, exact), with what its height means. Height: the predicted rate where the report
    has times; else the most that `roofs` allow; else, no rate being known, FLOPs.
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
    """Two bars for every site, in execution order from the top."""
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
    figure.update_layout(margin={"l": 20 + 7 * longest, "r": 10, "t": 90, "b": 50}, bargap=0.25)  # "automargin" measures every name, for seconds
    figure.update_xaxes(title=what, tickformat="~s", side="top" if len(names) > 15 else "bottom")
    ticks = {"tickvals": places, "ticktext": [escape(_short(n)) for n in names]}
    figure.update_yaxes(range=[len(names) - 0.4, -0.6], **ticks)
    return figure
