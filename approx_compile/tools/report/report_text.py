"""Put a report into words: the first line, the table of layers, and the notes below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from approx_compile.config.words import UNIT_METHODS, nearest
from approx_compile.reasons.decisions import TOKENS_OF_REGIONS
from approx_compile.tools.report.words import backward_of, forward_of, si, type_of, why
from approx_compile.utils import counted, percent, printed, terminal_width

if TYPE_CHECKING:
    from approx_compile.passes.planning.plan import ProductPlan, RowCut
    from approx_compile.tools.report.report_data import ReportData, SiteReport

LEAST_REASON = 32
"""The fewest columns for reasons beside the rest of the table."""

NAME = 32
"""The most columns that the names of layers have before they are broken."""

UP_TO = 4
"""The most names that a line of equal layers lists one by one."""

NOTHING_FOUND = (
    "No matrix product or convolution was found, so there is nothing to approximate. Look at a model that has linear layers, convolutions or matmuls; "
    "if this one has, TORCH_LOGS=graph_breaks says which parts torch.compile does not see."
)
ROWS = "A row is a sample of the batch. The backward pass runs on the rows that it keeps; the forward pass always runs on all."
TOKENS = (
    "A token is an entry of the batch's samples and positions. Regions of the backward pass that keep tokens apart run on those that they keep; "
    "the forward pass, and what mixes tokens, run on all."
)
FLOPS = "FLOPs: matrix products of one training step, forward and backward, 2 for each multiply-add, with those of the sampling."


# --- the first line ---


def headline(report: ReportData) -> str:
    """Say in one line what happens in a training step now, and what may happen later.

    Args:
        report: The report.

    Returns:
        The line.
    """
    return f"Forward: {_forward(report)}. Backward: {_backward(report)}. {_cost(report)}."


def verdict(report: ReportData) -> tuple[str, str]:
    """Say the same in two sentences.

    Args:
        report: The report.

    Returns:
        What happens in the passes of a training step, and what it costs.
    """
    return f"Forward: {_forward(report)}; backward: {_backward(report)}.", f"{_cost(report)}."


def _cost(report: ReportData) -> str:
    exact, now, possible = report.flops_exact, report.flops_now, report.flops_possible
    if possible != now:
        return f"FLOPs {si(now)} now; about {si(possible)} if {_condition(report)}"
    return f"FLOPs {si(exact)} -> {si(now)} ({percent(now / max(1, exact))})" if now != exact else f"FLOPs {si(exact)}"


def _forward(report: ReportData) -> str:
    outputs = [next(iter(s.products.values())) for s in report.sites]
    sampled = [p for p in outputs if p.decision == "sampled" and p.method not in UNIT_METHODS]
    units = _units(report)
    if not sampled:
        return units or "exact"
    if units:
        return f"{units}, and SAMPLED in {len(sampled)} ({', '.join(sorted({p.method for p in sampled}))})"
    where = f"{len(sampled)} of {_count(report)}"
    methods = ", ".join(sorted({p.method for p in sampled}))
    free = [p for p in sampled if report.chooses_ratio(p)]
    if not free or report.adaptive is None or report.adaptive.outputs is None:
        return f"SAMPLED in {where} ({methods})"
    now, least = report.adaptive.outputs, percent(report.adaptive.least_outputs)
    if now == 1 and len(free) == len(sampled):
        return f"exact now, {where} may be SAMPLED later ({methods}, down to {least})"
    return f"SAMPLED in {where} ({methods}, {percent(now)} now, could drop to {least})"


def _units(report: ReportData) -> str:
    """How many units hidden layers make; empty if all make all."""
    choosing = [s for s in report.sites if s.units is not None]
    made, size = sum(s.k for s in choosing), sum(s.size for s in choosing)
    methods = ", ".join(sorted({s.method for s in choosing}))
    return f"{len(choosing)} of {_count(report)} make {percent(made / size)} of their units ({methods})" if choosing else ""


def _backward(report: ReportData) -> str:
    gradients = [(s.name, p) for s in report.sites for p in list(s.products.values())[1:]]
    parts = []
    on_rows = [p for _, p in gradients if p.decision == "rows"]
    free = [p for p in on_rows if report.chooses_rows(p)]
    if free:
        size = free[0].size
        now, least = (report.rows_at(share, size) for share in (max(report.rows_now(p) for p in free), report.least_rows))
        parts.append(f"adaptive {report.unit(free[0])}, {now} of {size} now (could drop to {least}){_among(report, gradients, 'rows')}")
    elif on_rows:
        parts.append(f"on {min(p.k for p in on_rows)} of {on_rows[0].size} {report.unit(on_rows[0])}{_among(report, gradients, 'rows')}")
    later = "exact now, later " if any(report.chooses_ratio(p) for _, p in gradients) and report.adaptive and report.adaptive.outputs == 1 else ""
    for decision, words in (("sampled", "sampled"), ("coupled", f"{later}only what forward keeps"), ("replaced", "gradients replaced")):
        if any(p.decision == decision for _, p in gradients):
            parts.append(words + _among(report, gradients, decision))
    return ", ".join(parts) or "exact"


def _among(report: ReportData, gradients: Sequence[tuple[str, ProductPlan]], decision: str) -> str:
    layers = {name for name, p in gradients if p.decision == decision}
    return f" in {len(layers)} of {_count(report)}" if len(layers) < len(report.sites) else ""


def _count(report: ReportData) -> str:
    return counted(len(report.sites), "layer")


def _condition(report: ReportData) -> str:
    units = dict.fromkeys(report.unit(p) for s in report.sites for p in s.products.values() if report.chooses_rows(p))
    outputs = any(report.chooses_ratio(p) for s in report.sites for p in s.products.values())
    least = percent(report.adaptive.least_outputs) if report.adaptive is not None else ""
    return " and ".join([*(f"a quarter of the {unit} is kept" for unit in units), *([f"forward keeps {least}"] if outputs else [])])


# --- the table ---


@dataclass(frozen=True)
class Line:
    """What the table says about one layer, or about several equal ones."""

    names: tuple[str, ...]
    type: str
    forward: str
    backward: str
    flops: str
    why: str

    @property
    def label(self) -> str:
        """The name of the layer, or one for all: "blocks.*.up x 4"."""
        if len(self.names) == 1:
            return self.names[0]
        pattern = _pattern(self.names[0])
        if any(c.isalpha() for c in pattern):
            return f"{pattern} x {len(self.names)}"
        return ", ".join(self.names) if len(self.names) <= UP_TO else f"{self.names[0]}, {self.names[1]}, ..., {self.names[-1]} x {len(self.names)}"


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def lines(report: ReportData, collapse: bool = True) -> list[Line]:
    """Return the lines of the table.

    Args:
        report: The report.
        collapse: Whether layers that differ only in the numbers of their names share a line.

    Returns:
        The lines, in the order of their first layers.
    """
    by_content: dict[tuple[str, ...], list[str]] = {}
    for name, site in zip(report.keys, report.sites, strict=True):
        said = (type_of(site), forward_of(site, report), backward_of(site, report), flops_of(site, report), why(site))
        by_content.setdefault((_pattern(name) if collapse else name, *said), []).append(name)
    return [Line(tuple(names), *said) for (_, *said), names in by_content.items()]


def table(report: ReportData, rows: Sequence[Line], reasons: bool) -> Table:
    """Make the table of layers.

    Args:
        report: The report. If it is verbose, every layer has also its op, shape (symbols as traced), dtype and kept entries.
        rows: What to show.
        reasons: Whether the table has a column of reasons.

    Returns:
        The table.
    """
    layers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    layers.add_column("layer", overflow="fold", no_wrap=reasons, min_width=min(NAME, max(len(r.label) for r in rows)))
    for title in ("type", "forward", "backward"):
        layers.add_column(title, overflow="fold", no_wrap=reasons)
    layers.add_column(flops_title(report), justify="right", no_wrap=True)
    if report.verbose:
        layers.add_column("op, shape, dtype, k of K", overflow="fold", no_wrap=reasons)
    if reasons:
        layers.add_column("why", overflow="fold")
    sites = dict(zip(report.keys, report.sites, strict=True))
    for r in rows:
        site = sites[r.names[0]]
        more = [f"{site.op} {site.shape} {site.dtype}, {site.k} of {site.size}"] if report.verbose else []
        layers.add_row(r.label, r.type, r.forward, r.backward, r.flops, *more, *([r.why] if reasons else []))
    return layers


def flops_title(report: ReportData) -> str:
    """Return the title of the column of FLOPs."""
    if report.flops_possible != report.flops_now:
        return "FLOPs now -> possible"
    return "FLOPs exact -> now" if report.flops_now != report.flops_exact else "FLOPs"


def flops_of(site: SiteReport, report: ReportData) -> str:
    """Return a site's FLOPs under the title that `flops_title` gives."""
    exact, now, possible = si(site.flops_exact), si(report.now(site)), si(report.possible(site))
    shown = {"FLOPs": (exact,), "FLOPs exact -> now": (exact, now)}.get(flops_title(report), (now, possible))
    return " -> ".join(shown)


def _layers(report: ReportData, width: int) -> list[object]:
    """Return the table; where too little of the width is left for a column of reasons, they come as lines below it."""
    rows = lines(report, collapse=not report.verbose)
    bare = table(report, rows, False)
    reasons = [r for r in rows if r.why]
    if not reasons:
        return [bare]
    if Console(width=10_000, markup=False).measure(bare).maximum + LEAST_REASON <= width:
        return [table(report, rows, True)]
    by_reason: dict[str, list[str]] = {}
    for r in reasons:
        by_reason.setdefault(r.why, []).append(r.label)
    return [bare, *(f"{', '.join(labels)}: {reason}" for reason, labels in by_reason.items())]


def notes(report: ReportData, advice: bool = True) -> Iterable[str]:
    """Yield the lines below the table: what was assumed, where rows are chosen, which patterns match nothing, and the legend.

    Args:
        report: The report.
        advice: Whether lines say what the user can do about the reasons.
    """
    if report.verbose and (sizes := report.traced()):
        yield f"{sizes} as traced, which FLOPs and times are for"
    if len(report.before) > 1:
        yield f"torch.compile makes {len(report.before)} graphs of the model."
    for chain in report.chains:
        yield f"Chain {' > '.join(chain)}: each layer multiplies only the units that the one before makes; units left out are 0 and are not updated."
    cuts = together(report.cuts)
    for cut in cuts:
        yield _cut(cut, len(cuts) > 1)
    if report.kept_bytes < report.gradient_bytes:
        sent, whole = (f"{n / 1e6:.3g}" for n in (report.kept_bytes, report.gradient_bytes))
        yield f"Data parallel: {sent} of {whole} MB of gradients need to be exchanged in a step (approx_compile.distributed.register)."
    for reason_id, text in report.advice().items() if advice else ():
        yield f"What you can do ({reason_id}): {text}"
    if report.assignments > 1:
        which = f"the first of {report.assignments} assignments over the run"
        yield f"These are the settings of step 0, {which}; explain(..., config=config.at(step, phase)) shows another."
    for pattern in report.unmatched:
        yield f"The rule pattern {pattern!r} matches no site.{nearest(pattern, report.keys)}"
    yield from report.remarks
    for axis, legend in (("rows", ROWS), ("tokens", TOKENS)):
        if any(c.decision == "rows" and c.axis == axis for c in report.cuts):
            yield legend
    if report.sites:
        assumes = f" Possible: if {_condition(report)}." if report.flops_possible != report.flops_now else ""
        yield FLOPS + assumes


def together(cuts: Sequence[RowCut]) -> list[RowCut]:
    """Return cuts with one in place of the regions of tokens that have the same settings: models have several for each block."""
    found: dict[Any, list[RowCut]] = {}
    for i, cut in enumerate(cuts):
        found.setdefault((cut.method, cut.ratio) if cut.axis == "tokens" and cut.decision == "rows" else i, []).append(cut)
    return [_joined(alike) if len(alike) > 1 else alike[0] for alike in found.values()]


def _joined(cuts: Sequence[RowCut]) -> RowCut:
    return replace(cuts[0], flops_on_rows=sum(c.flops_on_rows for c in cuts), reason=TOKENS_OF_REGIONS(regions=counted(len(cuts), "region")))


def _cut(cut: RowCut, several: bool) -> str:
    place = cut.axis.capitalize() + (f", level {cut.level}" if several else "")
    if cut.decision != "rows":
        return f"{place}: all are kept; {cut.reason}"
    kept = percent(cut.ratio) if cut.ratio is not None else "as many as the gradient's variance asks for"
    share = cut.flops_on_rows / max(1, cut.flops_all)
    return f"{place}: {kept} ({cut.method}), in {percent(share)} of the backward FLOPs; {cut.reason}"


def as_text(report: ReportData) -> str:
    """Put a whole report into words: the first line, the table, and the notes.

    Args:
        report: The report.

    Returns:
        The text, as wide as the terminal.
    """
    if not report.sites:
        return printed(NOTHING_FOUND, *notes(report))
    return printed(headline(report), *_layers(report, terminal_width()), *notes(report))


def costs(report: ReportData, prediction_error: float) -> str:
    """Explain the predicted times term by term.

    Args:
        report: The report.
        prediction_error: The factor by which predictions may be off.

    Returns:
        A table. For every product as planned it shows the sizes, and each term of the prediction as an expression of the sizes with its time in us.
    """
    terms = Table()
    for title in ("layer", "product", "as planned", "term"):
        terms.add_column(title, overflow="fold")
    for title in ("us", "exact: us"):
        terms.add_column(title, justify="right", no_wrap=True)
    for site in report.sites:
        if site.break_even is not None:
            off = f"{prediction_error:g} or 1/{prediction_error:g}"
            terms.add_row(site.name, "", "", f"break-even ratio {site.break_even.range}, if sampling takes {off} times as long as predicted")
        for p in site.products.values():
            exact = f"{p.time_exact_us:.3g}" if p.time_exact_us is not None else ""
            terms.add_row(site.name, p.name, p.decision, _sizes(p.sizes), "" if p.time_sampled_us is None else f"{p.time_sampled_us:.3g}", exact)
            for term, time in p.terms:
                terms.add_row("", "", "", term, f"{time:.3g}", "")
    return printed(terms)


def _sizes(sizes: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name} = {size:g}" for name, size in sizes)
