"""The plan of a graph: data classes for what is decided about its sites and their products. Reports show it, and `rewrite` carries it out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gradient_replacements import Replacement
from approx_compile.kernels.unit_selection import UnitChoice
from approx_compile.passes.cost.estimates import Estimate
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import BACKWARD_ON_ROWS, ON_ROWS, ON_TOKENS
from approx_compile.reasons.products import BY_SETTINGS
from approx_compile.reasons.rows import OUTSIDE_REGIONS


def total(times: Iterable[float | None]) -> float | None:
    """Return the sum of times in us, or None if one of them is not known."""
    known = list(times)
    return None if None in known else math.fsum(t for t in known if t is not None)


@dataclass(frozen=True)
class BreakEven:
    """The largest ratio at which sampling takes no longer than the exact products.

    Attributes:
        ratio: The ratio according to the predicted times; 0 if no ratio breaks even, 1 if every ratio does.
        slower: The ratio if sampling takes `selection.PREDICTION_ERROR` times as long as predicted.
        faster: The ratio if sampling takes 1 / `selection.PREDICTION_ERROR` times as long.
    """

    ratio: float
    slower: float
    faster: float

    def __str__(self) -> str:
        return "no ratio breaks even" if self.ratio == 0 else "every ratio breaks even" if self.ratio == 1 else f"break-even {self.ratio:.2f}"

    @property
    def range(self) -> str:
        """The ratio with its range as text, such as "0.41 (0.33 to 0.49)"."""
        return f"{self.ratio:.2f} ({self.slower:.2f} to {self.faster:.2f})"


@dataclass(frozen=True)
class RowCut:
    """A place in the backward pass where rows of the batch are chosen, or would be.

    Attributes:
        method: Method by which rows are chosen.
        ratio: Share of the rows kept; None where the measured variance decides.
        rows: Rows of the batch.
        decision: "rows" or "exact".
        reason: Why rows are not chosen here, or what ends the sampled region further down.
        flops_all: FLOPs of the backward pass from here on, on all rows.
        flops_on_rows: Those of them that run on the rows kept.
        products: Names of the nodes that run on the rows kept.
        level: Number of the cut, counted from the loss.
        stops: Whether anything ends the sampled region.
        saved_us: Predicted time in us that products save at the share kept, or at half of the rows where the variance decides; None where rows are not chosen
            or no prediction decides about them. Every cut of a graph has the total of the graph, as in `cost_us`.
        cost_us: Predicted time in us to select and move rows.
        axis: "rows" for samples of the batch, "tokens" for the tokens of regions.
    """

    method: str
    ratio: float | None
    rows: int
    decision: str
    reason: Reason
    flops_all: int
    flops_on_rows: int
    products: tuple[str, ...] = ()
    level: int = 1
    stops: bool = True
    saved_us: float | None = None
    cost_us: float | None = None
    axis: str = "rows"


@dataclass(frozen=True)
class ProductPlan:
    """The decision for one product. Times are predictions; they are None where time decided nothing.

    Attributes:
        name: "output", "grad_input" or "grad_weight" (a second gradient of one name has a number appended).
        decision: "exact", "sampled" along its own contraction axis, "coupled" to the entries that the output kept, run on the "rows" kept, or "replaced".
        reason: Why, in words for the user.
        method: Method of the estimator or replacement, or "exact".
        ratio: Share of the entries that was asked for.
        k: Entries kept; of a replaced product, entries of the output gradient that count.
        size: Entries that these are chosen from.
        flops_exact: FLOPs of the exact product.
        flops_sampled: FLOPs as planned, sampling included.
        how: The estimator by which it is sampled or, of a coupled gradient, that of the output.
        skips: The site whose dropped entries make the output gradient of this product zero, or whose kept entries are all that is read of this output;
            leaving out the rest changes no value.
        skips_by: The code that leaves these entries out. A custom kernel steps over one axis; a second axis is gathered.
        shares: The site whose indices it uses: an output that is sampled at the entries selected there (see `index_sharing`), or a gradient that is put
            back in place together with that site's.
        node: Name of the product's node in the joint graph.
        replacement: What a "replaced" product is replaced with.
        lowering: The code that runs the product.
        bytes_exact: Bytes of the exact product's operands and result, each counted once.
        time_exact_us: Time of the exact product, in us.
        time_sampled_us: Time as planned, in us.
        terms: The time as planned by term, in us.
        sizes: The values of the symbols in `terms` (see `passes.cost.expressions`).
    """

    name: str
    decision: str
    reason: Reason
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

    def with_estimate(self, estimate: Estimate) -> ProductPlan:
        """Return the plan with FLOPs, time, terms and sizes of an estimate of the product as it is now planned."""
        return replace(self, flops_sampled=estimate.flops, time_sampled_us=estimate.time_us, terms=estimate.terms, sizes=estimate.sizes)


Candidates = list[tuple[ProductPlan, ...]]
"""Ways to carry out the products of one site, each with a plan for every product."""


@dataclass(frozen=True)
class SitePlan:
    """The decision for one site: a forward product with its gradients.

    Attributes:
        name: Unique name of the site in its graph.
        module: Name of the module that the site belongs to.
        kind: "linear", "conv" or "matmul".
        op: Name of the op.
        shape: Sizes of the operands in words; dynamic sizes stand as symbols.
        dtype: Name of the dtype.
        decision: "exact" or "sampled".
        reason: Why, in words for the user.
        products: The plans of its products, the output first.
        reads: The sites whose outputs it reads through no other product.
        traced: The symbols in `shape` and the values that they were traced with. FLOPs and times are those of these sizes.
        break_even: The ratio at which sampling stops to pay, where predicted time decided.
        shrinks: The sites that make only the channels which this one keeps of its activation.
        lowerings: The code that may run its products, by the settings and by the rates in the machine's profile.
        notes: What other sites' choices do to this one.
        units: How the units are chosen that the site makes, for the one site that reads them; None if it makes all.
    """

    name: str
    module: str
    kind: str
    op: str
    shape: str
    dtype: str
    decision: str
    reason: Reason
    products: tuple[ProductPlan, ...]
    reads: tuple[str, ...]
    traced: tuple[tuple[str, int], ...] = ()
    break_even: BreakEven | None = None
    shrinks: tuple[str, ...] = ()
    lowerings: tuple[str, ...] = ("inductor",)
    notes: tuple[Reason, ...] = ()
    units: UnitChoice | None = None

    def with_note(self, note: Reason) -> SitePlan:
        """Return the plan with one more note."""
        return replace(self, notes=(*self.notes, note))

    @property
    def reason_with_notes(self) -> Reason:
        """The reason and the notes, for reports."""
        return join((self.reason, *self.notes))

    @property
    def shown(self) -> ProductPlan:
        """The product that stands for the site in a report: the output, or if that is exact the first product that is not."""
        output = self.products[0]
        if output.decision != "exact":
            return output
        return next((p for p in self.products if p.decision != "exact"), output)

    @property
    def flops_exact(self) -> int:
        """FLOPs of the exact products."""
        return sum(p.flops_exact for p in self.products)

    @property
    def flops_sampled(self) -> int:
        """FLOPs of the products as planned."""
        return sum(p.flops_sampled for p in self.products)

    @property
    def time_exact_us(self) -> float | None:
        """Time of the exact products in us, if known."""
        return total(p.time_exact_us for p in self.products)

    @property
    def time_sampled_us(self) -> float | None:
        """Time of the products as planned in us, if known."""
        return total(p.time_sampled_us for p in self.products)


@dataclass(frozen=True)
class KeptChannels:
    """A parameter whose gradient is zero outside the channels that a site keeps, by a choice that depends on weights alone.

    Attributes:
        input: The position of the parameter among the inputs of Dynamo's graph.
        dim: The dim of the parameter that holds the channels.
        site: The site whose choice it is.
        unit: Contiguous channels that one index of the choice stands for.
        size: All channels.
        kept: The channels kept.
    """

    input: int
    dim: int
    site: str
    unit: int
    size: int
    kept: int


@dataclass(frozen=True)
class Plan:
    """The decisions for one graph.

    Attributes:
        sites: The plans of its sites, in execution order.
        unmatched: The patterns of rules that match no site.
        cuts: Where rows of the batch are chosen in the backward pass.
        remarks: How the graph differs from the one that a tuned plan was made for, and for which layers no rule can hold.
        kept: Where gradients of parameters are known to be zero on every rank of a data-parallel training.
        gradient_bytes: The bytes of the gradients of all parameters.
        kept_bytes: Those of the gradients' slices outside of which they are known to be zero on every rank.
    """

    sites: tuple[SitePlan, ...]
    unmatched: tuple[str, ...] = ()
    cuts: tuple[RowCut, ...] = ()
    remarks: tuple[str, ...] = ()
    kept: tuple[KeptChannels, ...] = ()
    gradient_bytes: int = 0
    kept_bytes: int = 0

    @property
    def sampled(self) -> int:
        """Number of sites that are sampled."""
        return sum(s.decision == "sampled" for s in self.sites)

    def chains(self) -> list[tuple[str, ...]]:
        """Return the chains of sites that choose their units: each reads only what the one before has made. The last of a chain makes all its outputs."""
        reader = {s.shrinks[0]: s.name for s in self.sites if len(s.shrinks) == 1}
        choosing = [s.name for s in self.sites if s.units is not None]
        chains = []
        for name in choosing:
            if any(reader.get(other) == name for other in choosing):
                continue
            chain = [name]
            while chain[-1] in choosing:
                chain.append(reader[chain[-1]])
            chains.append(tuple(chain))
        return chains

    @property
    def draws_in_forward(self) -> bool:
        """Whether a forward product draws random numbers, which a recomputation would have to draw again."""
        return any(p.decision == "sampled" and p.how is not None and p.how.scaled for s in self.sites for p in s.products[:1])

    def joined(self, other: Plan) -> Plan:
        """Return the plan of two graphs. A pattern is unmatched if it is unmatched in both; a graph without sites does not count."""
        remarks = tuple(dict.fromkeys(self.remarks + other.remarks))
        whole, kept = self.gradient_bytes + other.gradient_bytes, self.kept_bytes + other.kept_bytes
        if not self.sites or not other.sites:
            return replace(self if self.sites else other, remarks=remarks, gradient_bytes=whole, kept_bytes=kept)
        unmatched = tuple(p for p in self.unmatched if p in other.unmatched)
        return Plan(self.sites + other.sites, unmatched, self.cuts + other.cuts, remarks, gradient_bytes=whole, kept_bytes=kept)

    def with_cuts(self, cuts: Sequence[RowCut]) -> Plan:
        """Return the plan once the rows to be kept are known.

        Args:
            cuts: The places where rows are chosen, with the products that run on the rows kept.
        """
        on_rows = {name: cut for cut in cuts for name in cut.products if cut.decision == "rows"}
        sites = tuple(_on_rows(s, on_rows) for s in self.sites)
        stops = list(dict.fromkeys(c.reason for c in cuts if c.stops))
        outside = OUTSIDE_REGIONS() if any(cut.axis == "tokens" for cut in on_rows.values()) else BY_SETTINGS()
        return replace(self, sites=sites).without_rows(join(stops) if stops else outside, cuts)

    def without_rows(self, reason: Reason, cuts: Sequence[RowCut] = ()) -> Plan:
        """Return the plan with a reason why no rows are chosen at every site that the settings leave exact.

        Args:
            reason: Why.
            cuts: The places where rows are chosen, or might have been.
        """
        sites = tuple(replace(s, reason=reason) if s.decision == "exact" and s.reason == BY_SETTINGS() else s for s in self.sites)
        return replace(self, sites=sites, cuts=tuple(cuts))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
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
                reason=ON_TOKENS() if cut.axis == "tokens" else ON_ROWS(),
                method=cut.method,
                ratio=share,
                k=k,
                size=cut.rows,
                flops_sampled=round(share * p.flops_sampled),  # these already leave out known zeros
                time_sampled_us=share * p.time_sampled_us if p.time_sampled_us is not None else None,
            )
    if all(p.decision != "rows" for p in products):
        return site
    cut = next(cuts[p.node] for p in site.products if p.node in cuts)
    kept = f"{cut.ratio:g} of the {cut.axis}" if cut.ratio is not None else f"as many {cut.axis} as the variance asks for"
    on_rows = BACKWARD_ON_ROWS(kept=kept)
    reason = on_rows if site.decision == "exact" else join((site.reason, on_rows))
    return replace(site, products=tuple(products), decision="sampled", reason=reason)
