"""What was decided: the plan of a graph, its sites and their products, as reports show it and `rewrite` carries it out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gradient_replacements import Replacement

BY_SETTINGS = "exact by the settings"


@dataclass(frozen=True)
class ProductPlan:
    """The decision for one product: "sampled" along its own axis, "coupled" to the output's choice, run on the "rows" kept, "replaced", or "exact". `k` of
    `size` entries are kept (of a replaced one, those of the output gradient that count). `node`: its name in the joint graph; `bytes_exact`:
    of the exact product's operands and result, each counted once; `lowering`: the code that runs it. Times are predictions in us (None where nothing
    was to be decided by time); `terms` says term by term what the time as planned is made of, `sizes` what the symbols in them stand for (see `passes.cost`).

    `skips`: the site whose dropped entries make this product's output gradient zero, or are all that will be read of this output; computing nothing there
    changes no value. `skips_by`: the code that leaves these out; of two axes a kernel of ours steps over one, the other is gathered.
    `shares`: the site whose indices it uses: an output that is sampled at the entries chosen there (see `passes.shared`), a gradient put back with that site's.
    """

    name: str
    decision: str
    reason: str
    method: str
    ratio: float
    k: int
    size: int
    flops_exact: int
    flops_sampled: int
    how: Estimator | None = None
    skips: str | None = None
    skips_by: str = "inductor"
    shares: str | None = None
    node: str = ""
    replacement: Replacement | None = None
    lowering: str = "inductor"
    bytes_exact: int = 0
    time_exact_us: float | None = None
    time_sampled_us: float | None = None
    terms: tuple[tuple[str, float], ...] = ()
    sizes: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class SitePlan:
    """The decision for one site. `k` and `size` are the output product's, or the first approximated one's; FLOPs are summed. Sizes that are symbols stand in
    `shape` as such, and in `traced` with what they were traced with; FLOPs and times are those of these sizes. `break_even`: where predicted time decided.
    `shrinks`: the sites that make only what this one keeps of its activation. `lowerings`: the code that may run its products, by the settings and by what the
    machine's profile knows. `notes`: what `reason` says in its end of what other sites' choices do to it."""

    name: str
    module: str
    kind: str
    op: str
    shape: str
    dtype: str
    decision: str
    reason: str
    products: tuple[ProductPlan, ...]
    reads: tuple[str, ...]
    traced: tuple[tuple[str, int], ...] = ()
    break_even: BreakEven | None = None
    shrinks: tuple[str, ...] = ()
    lowerings: tuple[str, ...] = ("inductor",)
    notes: tuple[str, ...] = ()

    def noted(self, note: str) -> SitePlan:
        return replace(self, reason=f"{self.reason}; {note}", notes=(*self.notes, note))

    @property
    def own_reason(self) -> str:
        """The reason without the notes."""
        return self.reason.removesuffix("".join(f"; {n}" for n in self.notes))

    @property
    def shown(self) -> ProductPlan:
        output = self.products[0]
        if output.decision != "exact":
            return output
        return next((p for p in self.products if p.decision != "exact"), output)

    @property
    def flops_exact(self) -> int:
        return sum(p.flops_exact for p in self.products)

    @property
    def flops_sampled(self) -> int:
        return sum(p.flops_sampled for p in self.products)

    @property
    def time_exact_us(self) -> float | None:
        return total(p.time_exact_us for p in self.products)

    @property
    def time_sampled_us(self) -> float | None:
        return total(p.time_sampled_us for p in self.products)


@dataclass(frozen=True)
class Plan:
    """The decisions for one graph, in execution order, the patterns of its rules that matched no site, where rows of the batch are chosen, and remarks: in what
    the graph differs from the one that a tuned plan was made for, for which layers no rule can hold."""

    sites: tuple[SitePlan, ...]
    unmatched: tuple[str, ...] = ()
    cuts: tuple[RowCut, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sampled(self) -> int:
        return sum(s.decision == "sampled" for s in self.sites)

    def joined(self, other: Plan) -> Plan:
        """The plan of two graphs; a pattern is unmatched if it is so in both (a graph without sites has nothing to say)."""
        remarks = tuple(dict.fromkeys(self.remarks + other.remarks))
        if not self.sites or not other.sites:
            return replace(self if self.sites else other, remarks=remarks)
        unmatched = tuple(p for p in self.unmatched if p in other.unmatched)
        return Plan(self.sites + other.sites, unmatched, self.cuts + other.cuts, remarks)

    def with_cuts(self, cuts: Sequence[RowCut]) -> Plan:
        """The plan once it is known which gradient products run on rows kept."""
        on_rows = {name: cut for cut in cuts for name in cut.products if cut.decision == "rows"}
        sites = tuple(_on_rows(s, on_rows) for s in self.sites)
        stops = "; ".join(dict.fromkeys(c.reason for c in cuts if c.stops))
        return replace(self, sites=sites).without_rows(stops or BY_SETTINGS, cuts)

    def without_rows(self, reason: str, cuts: Sequence[RowCut] = ()) -> Plan:
        """The plan with the reason at every site that would have had sampled rows, and the cuts there are or might have been."""
        sites = tuple(replace(s, reason="; ".join((reason, *s.notes))) if s.decision == "exact" and s.own_reason == BY_SETTINGS else s for s in self.sites)
        return replace(self, sites=sites, cuts=tuple(cuts))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _on_rows(site: SitePlan, cuts: Mapping[str, RowCut]) -> SitePlan:
    products = list(site.products)
    for i, p in enumerate(products):
        cut = cuts.get(p.node) if p.name != "output" and p.decision == "exact" else None
        if cut is not None:
            share = cut.ratio if cut.ratio is not None else 1.0
            k = round(share * cut.rows)
            products[i] = replace(
                p,
                decision="rows",
                reason="on the rows kept",
                method=cut.method,
                ratio=share,
                k=k,
                size=cut.rows,
                flops_sampled=round(share * p.flops_sampled),  # which skips what it may
                time_sampled_us=share * p.time_sampled_us if p.time_sampled_us is not None else None,
            )
    if all(p.decision != "rows" for p in products):
        return site
    cut = next(cuts[p.node] for p in site.products if p.node in cuts)
    kept = f"{cut.ratio:g} of the rows" if cut.ratio is not None else "as many rows as the variance asks for"
    reason = f"backward on {kept}" if site.decision == "exact" else f"{site.reason}; backward on {kept}"
    return replace(site, products=tuple(products), decision="sampled", reason=reason)


Candidates = list[tuple[ProductPlan, ...]]
"""Ways to carry out a site's products."""


@dataclass(frozen=True)
class RowCut:
    """Where rows are chosen, and what became of it. `level` counts from the loss; `reason` says why nothing is cut, or what stops it further down
    (`stops`: whether anything does)."""

    method: str
    ratio: float | None
    rows: int
    decision: str
    reason: str
    flops_all: int
    flops_on_rows: int
    products: tuple[str, ...] = ()
    level: int = 1
    stops: bool = True


def total(times: Iterable[float | None]) -> float | None:
    found = list(times)
    return None if None in found else math.fsum(t for t in found if t is not None)


@dataclass(frozen=True)
class BreakEven:
    """The largest ratio at which sampling takes no longer than the exact products: as predicted, and if sampling takes `OFF` times as long, or 1 / `OFF` times.
    0 where no ratio does, 1 where every ratio does."""

    ratio: float
    slower: float
    faster: float

    def __str__(self) -> str:
        return "no ratio breaks even" if self.ratio == 0 else "every ratio breaks even" if self.ratio == 1 else f"break-even {self.ratio:.2f}"

    @property
    def range(self) -> str:
        """ "0.41 (0.33 to 0.49)"."""
        return f"{self.ratio:.2f} ({self.slower:.2f} to {self.faster:.2f})"
