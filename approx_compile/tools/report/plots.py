"""Draw the figures of a report as SVG: the graph of sites, the roofline, and the share of the rows kept over the steps.

matplotlib and networkx draw. The figures have colours of a palette that stands for variables of the page's style sheet, so that they are light or dark as the
page is. What a mark stands for is its `<title>`, which browsers show where the pointer is.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import networkx as nx

from approx_compile.backend.runtime.decisions import LINES, draw_shares
from approx_compile.tools.report.words import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from approx_compile.passes.planning.plan import ProductPlan
    from approx_compile.tools.report.report_data import ReportData, SiteReport

LABELS = {"sampled": "sampled", "replaced": "gradient replaced", "rows": "backward on rows", "exact": "exact"}
KINDS = tuple(LABELS)
MARKERS = dict(zip(KINDS, "o^Ds", strict=True))
"""The forms of marks, which say the kind as the colours do."""

PALETTE = {name: f"#abc1{i:02x}" for i, name in enumerate(("ink", "quiet", "line", "page", *KINDS, *(f"series{i}" for i in range(LINES))))}
"""Colours to draw with. In the page, "ink" is the colour of its text, and every other one is the variable of its name."""

_INK, _QUIET = PALETTE["ink"], PALETTE["quiet"]
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "approx_compile", "text.parse_math": False, "font.size": 13, "legend.frameon": False}
STYLE |= {"text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _QUIET, "grid.color": PALETTE["line"]}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
"""How matplotlib draws: text stays text, is never a formula, and the same figure gives the same file."""


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


def _drawn(name: str, size: tuple[float, float], draw: Callable[[Axes], Sequence[str]]) -> str:
    """Draw a figure of a size in pixels. `draw` returns the titles of the marks; mark number i has the gid "mark i". A gid becomes a class in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), io.StringIO() as out:
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        titles = draw(figure.add_axes((0, 0, 1, 1)))
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.1, transparent=True, metadata=nothing)
        svg = out.getvalue()
    svg = re.sub(r'(width|height)="([0-9.]+)pt"', r'\1="\2"', svg[svg.index("<svg") :], count=2)
    svg = svg.replace("<svg", f'<svg class="figure" role="img" aria-label="{name}"', 1)
    svg = re.sub(r'<g id="mark (\d+)">', lambda m: f'<g class="mark"><title>{escape(titles[int(m[1])])}</title>', svg).replace('<g id="', '<g class="')
    variables = {color: "currentColor" if name == "ink" else f"var(--{name})" for name, color in PALETTE.items()}
    return re.sub(r"(?<=: )#abc1\w\w", lambda m: variables[m[0]], svg)


def _legend(axes: Axes, kinds: set[str]) -> None:
    """Say above the figure which forms and colours stand for the kinds."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linestyle": "", "markersize": 9, "markeredgecolor": PALETTE["page"]}
    marks = [Line2D([], [], marker=MARKERS[k], color=PALETTE[k], label=LABELS[k], **look) for k in KINDS if k in kinds]
    axes.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(marks), handletextpad=0.1)


# --- the graph of sites ---


def branches(report: ReportData) -> bool:
    """Tell whether any site reads several others or is read by several; a chain needs no drawing."""
    graph = nx.transitive_reduction(report.to_networkx())
    return any(degree > 1 for _, degree in (*graph.in_degree, *graph.out_degree))


def site_graph(report: ReportData) -> str:
    """Draw the graph of sites, with an arrow from each site to those that read it.

    The layer of a site, from top to bottom, is the length of the longest chain of sites before it. Arrows that follow from others are left out, because behind
    residual sums every site reads all sites before it. An arrow that skips layers within one column bends around the sites between.

    Args:
        report: The report.

    Returns:
        The figure as SVG.
    """
    graph = report.to_networkx()
    layers = list(nx.topological_generations(graph))
    columns = max(map(len, layers))
    labelled = columns <= 6
    across, down = (180 if labelled else 22), 34
    at = {name: ((i - (len(names) - 1) / 2) * across, -depth * down) for depth, names in enumerate(layers) for i, name in enumerate(names)}
    arrows: dict[float, list[tuple[str, str]]] = defaultdict(list)  # by how much they bend
    for a, b in nx.transitive_reduction(graph).edges:
        span = (at[a][1] - at[b][1]) / down
        arrows[2 * min(80.0, 12 * math.log2(span) + 8) / (span * down) if span > 1 and at[a][0] == at[b][0] else 0.0].append((a, b))
    kinds = {key: kind_of(site) for key, site in zip(report.keys, report.sites, strict=True)}

    def draw(axes: Axes) -> list[str]:
        axes.set(xlim=(-columns * across / 2, columns * across / 2), ylim=((0.5 - len(layers)) * down, down / 2))
        axes.set_axis_off()
        look: dict[str, Any] = {"edge_color": PALETTE["quiet"], "node_size": 100, "arrowsize": 9, "hide_ticks": False}
        for bend, edges in arrows.items():
            for arrow in nx.draw_networkx_edges(graph, at, edges, ax=axes, arrows=True, connectionstyle=f"arc3,rad={-bend}", **look):
                arrow.set_gid("edge")
        for i, (key, kind) in enumerate(kinds.items()):
            axes.plot(*at[key], MARKERS[kind], color=PALETTE[kind], markersize=10, markeredgecolor=PALETTE["page"], gid=f"mark {i}", clip_on=False)
            if labelled:
                axes.annotate(_short(key), at[key], (9, 0), textcoords="offset points", va="center", annotation_clip=False)
        _legend(axes, set(kinds.values()))
        return [_title(key, site) for key, site in zip(report.keys, report.sites, strict=True)]

    return _drawn("graph of sites", (columns * across, len(layers) * down), draw)


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

    def draw(axes: Axes) -> list[str]:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set(xscale="log", yscale="log", xlim=xs, ylim=ys, xlabel="FLOPs per byte", ylabel=what)
        for axis, (low, high) in ((axes.xaxis, xs), (axes.yaxis, ys)):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(lambda value, _: si(value))
        axes.grid(True)
        axes.set_axisbelow(True)
        for dtype in used[:LINES]:
            roof = roofs[dtype]
            points = [xs[0], roof.gflops / roof.gb_s, xs[1]]
            axes.plot(points, [roof.at(x) for x in points], color=PALETTE["ink"], linewidth=2, gid="roof")
            label = f"{dtype}: {roof.gflops:.4g} GFLOP/s, {roof.gb_s:.4g} GB/s"
            axes.annotate(label, (xs[1], roof.gflops), (-4, 4), textcoords="offset points", ha="right")
        for i, r in enumerate(rated):
            axes.plot(r.intensity, r.height, MARKERS[r.decision], color=PALETTE[r.decision], markersize=10, markeredgecolor=PALETTE["page"], gid=f"mark {i}")
        _legend(axes, {r.decision for r in rated})
        return [f"{r.text}\n{r.height:.3g} GFLOP/s at {r.intensity:.3g} FLOPs per byte" for r in rated]

    return _drawn("roofline", (820, 290), draw), what


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

    def draw(axes: Axes) -> list[str]:
        draw_shares(axes, {label: (changes, steps) for label, changes in history.items()}, [PALETTE[f"series{i}"] for i in range(LINES)])
        axes.grid(axis="y")
        return []

    return _drawn("rows kept over steps", (640, 240), draw)
