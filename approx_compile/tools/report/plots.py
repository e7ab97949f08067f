"""Draw the figures of a report as SVG: the graph of sites, the roofline, and the share of the rows kept over the steps.

The figures have no colours of their own but classes, which the page's style sheet colours, light or dark. What a mark stands for is its `<title>`, which
browsers show where the pointer is. ElementTree escapes all text.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, tostring

import networkx as nx

from approx_compile.tools.report.words import si

if TYPE_CHECKING:
    from approx_compile.passes.planning.plan import ProductPlan
    from approx_compile.tools.report.report_data import ReportData, SiteReport

KINDS = ("sampled", "replaced", "rows", "exact")
LABELS = {"sampled": "sampled", "replaced": "gradient replaced", "rows": "backward on rows", "exact": "exact"}
LINES = 4
"""The most lines of a figure."""

WIDTH, HEIGHT, MARGIN = 900, 380, 56
"""The size of the figures with axes, and the space that their axes take, in pixels."""


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
    """What the point stands for."""
    decision: str
    intensity: float
    """FLOPs per byte."""
    height: float
    """GFLOP/s."""


def kind_of(site: SiteReport) -> str:
    """Classify a site by what is done with its products; the first kind that applies counts.

    Args:
        site: The site.

    Returns:
        "sampled" if a product is sampled; else "replaced" if a gradient is replaced; else "rows" if the backward pass runs on some of the rows; else "exact".
    """
    kinds = {"sampled" if p.decision == "coupled" else p.decision for p in site.products.values()}
    return next((kind for kind in KINDS if kind in kinds), "exact")


# --- drawing ---


def _svg(width: float, height: float, name: str) -> Element:
    return Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": name, "class": "figure"})


def _text(parent: Element, x: float, y: float, text: str, anchor: str = "start", style: str = "") -> None:
    SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": style or "label"}).text = text


def _path(parent: Element, points: Sequence[tuple[float, float]], style: str) -> None:
    SubElement(parent, "path", {"d": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), "class": f"line {style}"})


def _mark(parent: Element, x: float, y: float, kind: str, title: str) -> None:
    """Draw a mark whose form says the kind, too: a circle, a triangle, a diamond or a square."""
    forms = {"replaced": "M0-6L6 5L-6 5Z", "rows": "M0-7L7 0L0 7L-7 0Z", "exact": "M-5-5L5-5L5 5L-5 5Z"}
    place = {"transform": f"translate({x:.1f} {y:.1f})", "class": f"mark {kind}"}
    mark = SubElement(parent, "path", place | {"d": forms[kind]}) if kind in forms else SubElement(parent, "circle", place | {"r": "6"})
    SubElement(mark, "title").text = title


def _legend(parent: Element, kinds: Sequence[str], x: float, y: float) -> None:
    for kind in kinds:
        _mark(parent, x, y, kind, LABELS[kind])
        _text(parent, x + 12, y + 4, LABELS[kind])
        x += 40 + 8 * len(LABELS[kind])


# --- the graph of sites ---


def branches(report: ReportData) -> bool:
    """Tell whether any site reads several others or is read by several; a chain needs no drawing."""
    graph = nx.transitive_reduction(report.to_networkx())
    return any(degree > 1 for _, degree in (*graph.in_degree, *graph.out_degree))


def site_graph(report: ReportData) -> str:
    """Draw the graph of sites, with an arrow from each site to those that read it.

    The layer of a site, from top to bottom, is the length of the longest chain of sites before it. Arrows that follow from others are left out, because behind
    residual sums every site reads all sites before it.

    Args:
        report: The report.

    Returns:
        The figure as SVG.
    """
    graph = report.to_networkx()
    places = _places(graph)
    columns = max(abs(x) for x, _ in places.values()) * 2 + 1
    left, space = (40 + 90 * columns, 180) if columns <= 6 else (30 + 22 * columns, 22)
    width, height = left + (columns - 1) / 2 * space + 380, 70 + 34 * (1 - min(y for _, y in places.values()))
    at = {name: (left + x * space, 60 - 34 * y) for name, (x, y) in places.items()}
    figure = _svg(width, height, "graph of sites")
    for a, b in nx.transitive_reduction(graph).edges:
        points = list(_arrow(at[a], at[b]))
        _path(figure, points, "edge")
        x, y = points[-1]
        SubElement(figure, "path", {"d": f"M{x:.1f} {y - 7:.1f}l-4 -7h8z", "class": "tip"})
    sites = dict(zip(report.keys, report.sites, strict=True))
    for key, (x, y) in at.items():
        _mark(figure, x, y, kind_of(sites[key]), _title(key, sites[key]))
        if columns <= 6:
            _text(figure, x + 12, y + 4, _short(key))
    _legend(figure, [k for k in KINDS if k in {kind_of(s) for s in report.sites}], 20, 20)
    return tostring(figure, encoding="unicode")


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
    span = (b[1] - a[1]) / 34
    if span > 1 and a[0] == b[0]:
        yield a[0] - min(80.0, 12 * math.log2(span) + 8), (a[1] + b[1]) / 2
    yield b


def _title(key: str, site: SiteReport) -> str:
    shown = ", ".join(site.reads[-4:]) + (f" and {len(site.reads) - 4} before" if len(site.reads) > 4 else "")
    flops = f"FLOPs {si(site.flops_exact)} -> {si(site.flops_sampled)}"
    return "\n".join((key, f"{site.op}  {site.shape}  {site.dtype}", f"{site.decision}: {site.reason}", flops, f"reads {shown or 'no other site'}"))


def _short(text: str, limit: int = 48) -> str:
    """Shorten a long name to its end, which says more than its beginning."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


# --- roofline ---


def roofline(report: ReportData, roofs: Mapping[str, Roof]) -> tuple[str, str] | None:
    """Draw the roofline, with every exact product at its FLOPs per byte; the bytes are those of its operands and its result, each counted once.

    The height of a product is its predicted rate if the report has times for all products, else the highest rate that the machine allows.

    Args:
        report: The report.
        roofs: The peak rates by dtype.

    Returns:
        The figure as SVG, and what the height means; None if `roofs` lacks a dtype of the report, so that there is no roof.
    """
    what, rated = rated_products(report, roofs)
    used = sorted({s.dtype for s in report.sites})
    if not rated or not set(used) <= set(roofs):
        return None
    knees = [roofs[d].gflops / roofs[d].gb_s for d in used]
    xs = (min([*knees, *(r.intensity for r in rated)]) / 2, max([*knees, *(r.intensity for r in rated)]) * 2)
    ys = (min(r.height for r in rated) / 2, max(roofs[d].gflops for d in used) * 2)
    figure = _svg(WIDTH, HEIGHT, "roofline")

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log(v / low) / math.log(high / low) for v, (low, high) in ((x, xs), (max(y, ys[0]), ys)))
        return MARGIN + across * (WIDTH - MARGIN - 20), HEIGHT - 46 - up * (HEIGHT - 46 - 40)

    for x in _ticks(*xs):
        _path(figure, [place(x, ys[0]), place(x, ys[1])], "grid")
        _text(figure, place(x, ys[0])[0], HEIGHT - 28, si(x), "middle", "tick")
    for y in _ticks(*ys):
        _path(figure, [place(xs[0], y), place(xs[1], y)], "grid")
        _text(figure, MARGIN - 8, place(xs[0], y)[1] + 4, si(y), "end", "tick")
    _text(figure, WIDTH / 2, HEIGHT - 8, "FLOPs per byte", "middle")
    _text(figure, 8, 34, what)
    for dtype in used[:LINES]:
        roof = roofs[dtype]
        _path(figure, [place(x, roof.at(x)) for x in (xs[0], roof.gflops / roof.gb_s, xs[1])], "roof")
        _text(figure, WIDTH - 24, place(xs[1], roof.gflops)[1] - 6, f"{dtype}: {roof.gflops:.4g} GFLOP/s, {roof.gb_s:.4g} GB/s", "end")
    for r in rated:
        _mark(figure, *place(r.intensity, r.height), r.decision, f"{r.text}\n{r.height:.3g} GFLOP/s at {r.intensity:.3g} FLOPs per byte")
    _legend(figure, [k for k in KINDS if k in {r.decision for r in rated}], 240, 14)
    return tostring(figure, encoding="unicode"), what


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two numbers, only the powers if these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leads = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [t for p in powers for lead in leads if low <= (t := lead * 10.0**p) <= high]


def rated_products(report: ReportData, roofs: Mapping[str, Roof]) -> tuple[str, list[Rated]]:
    """Return what the height of the roofline means, and its points; no points where neither times nor roofs are known."""
    products = [(key, s, p) for key, s in zip(report.keys, report.sites, strict=True) for p in s.products.values() if p.flops_exact > 0]
    predicted = bool(products) and all(p.time_exact_us for _, _, p in products)
    if not predicted and not all(s.dtype in roofs for _, s, _ in products):
        return "GFLOP/s at most", []

    def rate(key: str, site: SiteReport, p: ProductPlan) -> Rated:
        intensity = p.flops_exact / max(1, p.bytes_exact)
        kind = "sampled" if p.decision == "coupled" else p.decision
        text = "\n".join((f"{key}: {p.name}", f"{site.shape} {site.dtype}", f"{p.decision}: {p.reason}"))
        height = p.flops_exact / p.time_exact_us / 1e3 if predicted and p.time_exact_us else roofs[site.dtype].at(intensity)
        return Rated(text, kind, intensity, height)

    return "GFLOP/s, predicted" if predicted else "GFLOP/s at most", [rate(*one) for one in products]


# --- rows over steps ---


def rows_over_steps(history: Mapping[str, Sequence[tuple[int, float]]], steps: int) -> str:
    """Draw the share of the rows kept over the steps: at most four lines, each labelled at its end.

    Args:
        history: For what each line stands for, (step, share) of every change.
        steps: The steps so far.

    Returns:
        The figure as SVG.
    """
    shown = sorted(history.items(), key=lambda item: -len(item[1]))[:LINES]
    figure = _svg(WIDTH, 240, "rows kept over steps")
    right, top, bottom = WIDTH - 260, 20, 196

    def place(step: float, share: float) -> tuple[float, float]:
        return MARGIN + step / max(1, steps) * (right - MARGIN), bottom - share * (bottom - top)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _path(figure, [place(0, share), place(steps, share)], "grid")
        _text(figure, MARGIN - 8, place(0, share)[1] + 4, f"{share:.0%}", "end", "tick")
    for step in sorted({0, steps // 2, steps}):
        _text(figure, place(step, 0)[0], bottom + 18, str(step), "middle", "tick")
    _text(figure, (MARGIN + right) / 2, bottom + 38, "steps", "middle")
    ends: list[float] = []
    for i, (label, changes) in enumerate(shown):
        points = [place(*changes[0])]
        for (_, before), (step, after) in itertools.pairwise([*changes, (steps, changes[-1][1])]):
            points += [place(step, before), place(step, after)]
        _path(figure, points, f"series{i}")
        y = place(0, changes[-1][1])[1]
        while any(abs(y - other) < 15 for other in ends):
            y += 15
        ends.append(y)
        _text(figure, right + 8, y + 4, _short(label, 34), "start", f"label series{i}")
    return tostring(figure, encoding="unicode")
