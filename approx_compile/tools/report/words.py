"""Put into words what happens in a layer: its type, its forward and its backward pass, and numbers with the letter of their order of magnitude."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from approx_compile.config.words import UNIT_METHODS
from approx_compile.utils import percent

if TYPE_CHECKING:
    from approx_compile.passes.planning.plan import ProductPlan
    from approx_compile.tools.report.report_data import ReportData, SiteReport


def si(number: float) -> str:
    """Write a number with three significant digits and the letter of its order of magnitude.

    Args:
        number: The number.

    Returns:
        Text such as "1.23 M".
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:.3g} P"


def duration(us: float | None) -> str:
    """Write a time with a unit that fits.

    Args:
        us: Microseconds; None if the time is not known.

    Returns:
        Text such as "474 us" or "1.23 ms"; empty if the time is not known.
    """
    if us is None:
        return ""
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999_500 else f"{us / 1e6:.3g} s"


def type_of(site: SiteReport) -> str:
    """Describe a layer by its sizes without the batch, such as "Linear 784 -> 1024" or "Conv2d 64 -> 128, 3x3".

    Args:
        site: The site of the layer.

    Returns:
        The description; the shape as it is where its form is not known.
    """
    if site.kind == "conv":
        match = re.fullmatch(r".* \* ([0-9x]+)(?: g(\d+))?", site.shape)
        if match is None:
            return f"{site.op} {site.shape}"
        first, second, *kernel = match[1].split("x")
        groups = int(match[2] or 1)
        transposed = "transpose" in site.op
        ins, outs = (first, int(second) * groups) if transposed else (int(second) * groups, first)
        named = f"Conv{'Transpose' if transposed else ''}{len(kernel)}d {ins} -> {outs}, {'x'.join(kernel)}"
        return named + (f", {groups} groups" if groups > 1 else "")
    sizes = site.shape.rsplit("x", 3)
    if site.kind == "linear":
        return f"Linear {sizes[-2]} -> {sizes[-1]}"
    return f"matmul {'x'.join(sizes[-3:-1])} @ {'x'.join(sizes[-2:])}" if len(sizes) >= 3 else f"{site.op} {site.shape}"


def forward_of(site: SiteReport, report: ReportData) -> str:
    """Say what the forward pass of a layer does.

    Args:
        site: The site of the layer.
        report: The report that it belongs to.

    Returns:
        Text such as "exact", "keeps 32 of 64 (topk)" or "makes 32 of 64 units (dropout)".
    """
    output = next(iter(site.products.values()))
    if site.units is not None:
        made = site.units.estimator
        read = f"reads {output.k} of {output.size}, " if output.decision == "sampled" else ""
        return f"{read}makes {made.k} of {made.size} units ({made.method})"
    if output.decision != "sampled":
        return "exact"
    if output.method in UNIT_METHODS:
        return f"reads {output.k} of {output.size} units"
    kept = f"{output.k} of {output.size} ({output.method})"
    if not report.chooses_ratio(output):
        return f"keeps {kept}"
    now = report.adaptive.outputs if report.adaptive is not None else 1.0
    return f"exact now, later {kept}" if now == 1 else f"keeps {percent(now or 1.0)} ({output.method}), later {output.k} of {output.size}"


def backward_of(site: SiteReport, report: ReportData) -> str:
    """Say what the backward pass of a layer does.

    Args:
        site: The site of the layer.
        report: The report that it belongs to.

    Returns:
        Text such as "exact", "64 of 256 rows" or "input exact, weight max".
    """
    words = {p.name.removeprefix("grad_").partition("#")[0]: _gradient(p, report) for p in list(site.products.values())[1:]}
    if site.units is not None and all(text == "exact" for text in words.values()):
        return "as forward"
    if not words:
        return "none"
    alike = len(set(words.values())) == 1
    return next(iter(words.values())) if alike else ", ".join(f"{name} {text}" for name, text in words.items())


def _gradient(p: ProductPlan, report: ReportData) -> str:
    if p.decision == "rows":
        if not report.chooses_rows(p):
            return f"{p.k} of {p.size} {report.unit(p)}"
        return f"{report.rows_at(report.rows_now(p), p.size)} of {p.size} {report.unit(p)} now"
    if p.decision == "coupled":
        return "as forward"
    if p.decision == "sampled":
        return f"keeps {p.k} of {p.size} ({p.method})"
    return f"replaced ({p.method})" if p.decision == "replaced" else "exact"


def why(site: SiteReport) -> str:
    """Return the reason of a site without what the column of the backward pass says."""
    return "; ".join(part for part in str(site.reason).split("; ") if not part.startswith("backward on "))
