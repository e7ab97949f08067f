"""The content of a report on a model (its sites, where rows are chosen, FLOPs and times), and its form as tables and as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import networkx as nx

from approx_compile.kernels.unit_selection import UnitChoice
from approx_compile.passes.planning.plan import BreakEven, ProductPlan, RowCut, SitePlan
from approx_compile.reasons import Reason

A_QUARTER = 0.25
"""The share of the rows that "possible" FLOPs assume under the policy "adaptive"."""


@dataclass(frozen=True)
class SiteReport:
    """One site: a forward product (linear, convolution or matmul) with the products of its gradients, and what is decided for them.

    One product stands for the site in `method`, `ratio`, `k` and `size`: the output, or the first approximated product if the output is exact. FLOPs and times
    are summed over all products of the site.

    Attributes:
        name: The name of the site.
        op: The name of the op.
        kind: "linear", "conv" or "matmul".
        shape: The sizes of the operands; a dynamic size, such as that of the batch, stands as a symbol.
        dtype: The name of the dtype.
        decision: What is done with the site.
        reason: Why this is done.
        method: How the entries are chosen.
        ratio: The share of the entries that is kept.
        k: The number of entries that are kept.
        size: The number of all entries.
        flops_exact: FLOPs of the exact products.
        flops_sampled: FLOPs of the products as planned, including those of the sampling.
        time_exact_us: Time of the exact products in us; None if it is not known.
        time_sampled_us: Time of the products as planned in us; None if it is not known.
        products: The plan of every product, by its name.
        reads: The sites whose outputs this one reads through no other product.
        traced: The symbols in `shape`, and the sizes that they were traced with.
        break_even: The ratio at which sampling stops to pay, and where it would be if sampling took 1.2 times as long as predicted, or 1 / 1.2 times.
        units: How the units are chosen that the layer computes; None if it computes all.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> report = approx_compile.explain(model, torch.randn(256, 64), config={"ratio": 0.5, "policy": "always"})
        >>> site = report.sites[0]
        >>> site.decision, site.k, site.size
        ('sampled', 32, 64)
    """

    name: str
    op: str
    kind: str
    shape: str
    dtype: str
    decision: str
    reason: Reason
    method: str
    ratio: float
    k: int
    size: int
    flops_exact: int
    flops_sampled: int
    time_exact_us: float | None
    time_sampled_us: float | None
    products: Mapping[str, ProductPlan]
    reads: tuple[str, ...]
    traced: tuple[tuple[str, int], ...]
    break_even: BreakEven | None
    units: UnitChoice | None = None

    @staticmethod
    def of(plan: SitePlan) -> SiteReport:
        """Make the report of a site from its plan.

        Args:
            plan: The plan of the site.

        Returns:
            The report of the site.
        """
        copied = {f.name: getattr(plan, f.name) for f in fields(SiteReport) if f.name not in (*_SHOWN, "products", "reason")}
        shown = {name: getattr(plan.shown, name) for name in _SHOWN}
        if plan.units is not None:
            made = plan.units.estimator
            shown = {"method": made.method, "ratio": made.k / made.size, "k": made.k, "size": made.size}
        return SiteReport(**copied, **shown, reason=plan.reason_with_notes, products={p.name: p for p in plan.products})


@dataclass(frozen=True)
class AdaptiveShares:
    """What the policy "adaptive" has chosen for a model so far, and the least that it may choose.

    Attributes:
        rows: The share of the rows that is kept now, by the level of the cut; 1 for cuts that are not listed.
        least_rows: The smallest share of the rows that may be kept.
        min_rows: The smallest number of rows that may be kept.
        outputs: The ratio of sampled outputs now; None if their ratio is not found during the run.
        least_outputs: The smallest ratio of sampled outputs. The plans of the report have this ratio.
        steps: The steps that were trained.
        history: (step, share of the rows) of every change, starting with (0, 1), for every control by what it decides about.
    """

    rows: Mapping[int, float]
    least_rows: float
    min_rows: int
    outputs: float | None
    least_outputs: float
    steps: int
    history: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)


_SHOWN = ("method", "ratio", "k", "size")
"""The fields that a site takes from the product that stands for it."""


@dataclass
class ReportData:
    """What `explain` found out about a model.

    FLOPs are those of the sites' products in one training step, 2 for each multiply-add. `flops_sampled` includes those of the sampling itself.

    Attributes:
        sites: The sites, in execution order.
        cuts: Where rows of the batch are chosen in the backward pass, or why they are not.
        chains: The chains of layers of which each reads only the units that the one before makes.
        before: The joint graphs before the rewrite as readable code, one for each compiled graph.
        after: The same graphs after the rewrite.
        unmatched: The patterns of rules that match no site of any graph.
        remarks: The layers for which no rule can hold, and how the model differs from the one that a tuned plan was made for.
        assignments: How many assignments the settings go through during a run. The report shows the first; `explain(..., config=config.at(step, phase))`
            shows another.
        adaptive: What the policy "adaptive" has chosen so far; None under settings that choose nothing during the run.
        gradient_bytes: Bytes of the gradients of all parameters.
        kept_bytes: Bytes of the slices of them that a data-parallel training has to exchange with `approx_compile.distributed.register`.
        device: The type of the device that the model is on.
        verbose: Whether `str(report)` has a line for every layer, with its op, shape, dtype and kept entries.
    """

    sites: list[SiteReport] = field(default_factory=list)
    cuts: list[RowCut] = field(default_factory=list)
    chains: list[tuple[str, ...]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    assignments: int = 1
    adaptive: AdaptiveShares | None = None
    gradient_bytes: int = 0
    kept_bytes: int = 0
    device: str = "cpu"
    verbose: bool = False

    @property
    def flops_exact(self) -> int:
        """FLOPs of all sites in an exact training step."""
        return sum(s.flops_exact for s in self.sites)

    @property
    def flops_sampled(self) -> int:
        """FLOPs of all sites in a step as planned, the sampling included."""
        return sum(s.flops_sampled for s in self.sites)

    @property
    def keys(self) -> list[str]:
        """A unique name for every site, which is its own or, if several graphs have a site of that name, `name (2)` and so on."""
        seen: Counter[str] = Counter()
        keys = []
        for site in self.sites:
            seen[site.name] += 1
            keys.append(site.name if seen[site.name] == 1 else f"{site.name} ({seen[site.name]})")
        return keys

    def to_networkx(self) -> nx.DiGraph[str]:
        """Build the graph of sites, with an edge from each site to every site that reads its output through no other product.

        Returns:
            The graph. Its nodes are named as in `keys` and have the fields of `SiteReport` as attributes.
        """
        graph: nx.DiGraph[str] = nx.DiGraph()
        latest: dict[str, str] = {}  # a site reads only sites of its own graph, in which names are unique
        for key, site in zip(self.keys, self.sites, strict=True):
            graph.add_node(key, **{k: v for k, v in vars(site).items() if k not in ("name", "reads")})
            graph.add_edges_from((latest[source], key) for source in site.reads)
            latest[site.name] = key
        return graph

    # --- what the policy "adaptive" has chosen, and may choose ---

    def chooses_rows(self, product: ProductPlan) -> bool:
        """Tell whether the number of rows that a product runs on is found during the run."""
        return product.decision == "rows" and product.ratio == 1.0

    def unit(self, product: ProductPlan) -> str:
        """Return what a product on rows keeps some of: "rows" of the batch, or "tokens" of a region."""
        return next((cut.axis for cut in self.cuts if product.node in cut.products), "rows")

    def chooses_ratio(self, product: ProductPlan) -> bool:
        """Tell whether the ratio at which a product is sampled, or coupled to one that is, is found during the run."""
        adaptive = self.adaptive
        return adaptive is not None and adaptive.outputs is not None and product.decision in ("sampled", "coupled") and product.ratio == adaptive.least_outputs

    @property
    def least_rows(self) -> float:
        """The smallest share of the rows that may be kept."""
        return self.adaptive.least_rows if self.adaptive is not None else 1.0

    def rows_now(self, product: ProductPlan) -> float:
        """Return the share of the rows that a product runs on now."""
        shares = self.adaptive.rows if self.adaptive is not None else {}
        return next((shares[cut.level] for cut in self.cuts if product.node in cut.products and cut.level in shares), 1.0)

    def rows_at(self, share: float, size: int) -> int:
        """Return how many of `size` rows are kept at a share."""
        least = self.adaptive.min_rows if self.adaptive is not None else 1
        return min(size, max(least, int(share * size + 0.5)))

    def now(self, site: SiteReport) -> int:
        """Return the FLOPs of a site in the next step."""
        outputs = self.adaptive.outputs if self.adaptive is not None else None
        return round(sum(self._flops(p, self.rows_now(p), outputs) for p in site.products.values()))

    def possible(self, site: SiteReport) -> int:
        """Return the FLOPs of a site with a quarter of the rows, or as few as now, and the smallest ratio of outputs, where these are found during the run."""
        outputs = self.adaptive.least_outputs if self.adaptive is not None else None
        return round(sum(self._flops(p, min(A_QUARTER, self.rows_now(p)), outputs) for p in site.products.values()))

    def _flops(self, product: ProductPlan, rows: float, outputs: float | None) -> float:
        if self.chooses_rows(product):
            return self.rows_at(rows, product.size) / max(1, product.size) * product.flops_sampled
        if self.chooses_ratio(product) and outputs is not None:
            part = (outputs - product.ratio) / (1 - product.ratio)  # between the smallest ratio and 1, FLOPs are linear in it but for the selection
            return product.flops_sampled + part * (product.flops_exact - product.flops_sampled)
        return product.flops_sampled

    @property
    def flops_now(self) -> int:
        """FLOPs of all sites in the next step."""
        return sum(map(self.now, self.sites))

    @property
    def flops_possible(self) -> int:
        """FLOPs of all sites as in `possible`."""
        return sum(map(self.possible, self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Return the sites with their products, the cuts, chains, unmatched patterns, remarks and totals as plain values, for JSON.

        Returns:
            Dicts, lists, numbers and strings. The code of the graphs is left out. Beside each `reason` stand the ids of the reasons in it (`reason_ids`), which
            `docs/reference/reasons.md` explains, and what the user can do (`advice`).
        """
        content = {f.name: [asdict(item, dict_factory=_with_advice) for item in getattr(self, f.name)] for f in fields(self) if f.name in ("sites", "cuts")}
        totals: dict[str, Any] = {"graphs": len(self.before), "flops_exact": self.flops_exact, "flops_sampled": self.flops_sampled}
        totals |= {"flops_now": self.flops_now, "flops_possible": self.flops_possible}
        totals |= {"gradient_bytes": self.gradient_bytes, "kept_bytes": self.kept_bytes}
        adaptive = asdict(self.adaptive) if self.adaptive is not None else None
        return (
            content
            | totals
            | {"chains": self.chains, "unmatched": self.unmatched, "remarks": self.remarks, "assignments": self.assignments, "adaptive": adaptive}
        )

    def advice(self) -> dict[str, str]:
        """Return what the user can do about the reasons of sites and cuts.

        Returns:
            The advice by the id of the reason. Reasons without anything to do are left out.
        """
        reasons = [*(s.reason for s in self.sites), *(c.reason for c in self.cuts)]
        return {c.id: c.advice for reason in reasons for c in reason.causes if c.actionable}

    def traced(self) -> str:
        """List the symbols in shapes and the sizes that they were traced with.

        Returns:
            Text such as "s77 = 64, s12 = 128"; empty if no shape has symbols.
        """
        return ", ".join(dict.fromkeys(f"{symbol} = {size}" for s in self.sites for symbol, size in s.traced))


def _with_advice(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A data class as a dict, with the ids and the advice of its reason."""
    by_name = dict(fields)
    reason = by_name.get("reason")
    return by_name | {"reason_ids": list(reason.ids), "advice": list(reason.advice)} if isinstance(reason, Reason) else by_name
