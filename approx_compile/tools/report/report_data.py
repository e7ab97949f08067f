"""The content of a report on a model (its sites, where rows are chosen, FLOPs and times), and its form as tables and as plain values."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import networkx as nx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from approx_compile.passes.planning.plan import BreakEven, ProductPlan, RowCut, SitePlan
from approx_compile.passes.planning.selection import PREDICTION_ERROR
from approx_compile.reasons import Reason


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
        return SiteReport(**copied, **shown, reason=plan.reason_with_notes, products={p.name: p for p in plan.products})


_SHOWN = ("method", "ratio", "k", "size")
"""The fields that a site takes from the product that stands for it."""


@dataclass
class ReportData:
    """What `explain` found out about a model. `str(report)` is a table.

    FLOPs are those of the sites' products in one training step, 2 for each multiply-add. `flops_sampled` includes those of the sampling itself.

    Attributes:
        sites: The sites, in execution order.
        cuts: Where rows of the batch are chosen in the backward pass, or why they are not.
        before: The joint graphs before the rewrite as readable code, one for each compiled graph.
        after: The same graphs after the rewrite.
        unmatched: The patterns of rules that match no site of any graph.
        remarks: The layers for which no rule can hold, and how the model differs from the one that a tuned plan was made for.
        assignments: How many assignments the settings go through during a run. The report shows the first; `explain(..., config=config.at(step, phase))`
            shows another.
    """

    sites: list[SiteReport] = field(default_factory=list)
    cuts: list[RowCut] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    assignments: int = 1

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
        """A unique name for every site: its own, or `name (2)` and so on if several graphs have a site of that name."""
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

    def costs(self) -> str:
        """Explain the predicted times term by term.

        Returns:
            A table. For every product as planned it shows the sizes, and each term of the prediction as an expression of the sizes with its time in us.
        """
        table = Table()
        for title in ("site", "product", "as planned", "term"):
            table.add_column(title, overflow="fold")
        for title in ("us", "exact: us"):
            table.add_column(title, justify="right", no_wrap=True)
        for site in self.sites:
            if site.break_even is not None:
                off = f"{PREDICTION_ERROR:g} or 1/{PREDICTION_ERROR:g}"
                table.add_row(site.name, "", "", f"break-even ratio {site.break_even.range}, if sampling takes {off} times as long as predicted")
            for p in site.products.values():
                exact = f"{p.time_exact_us:.3g}" if p.time_exact_us is not None else ""
                sizes = ", ".join(f"{name} = {size:g}" for name, size in p.sizes)
                table.add_row(site.name, p.name, p.decision, sizes, "" if p.time_sampled_us is None else f"{p.time_sampled_us:.3g}", exact)
                for term, time in p.terms:
                    table.add_row("", "", "", term, f"{time:.3g}", "")
        out = io.StringIO()
        Console(file=out, width=160).print(table, highlight=False)
        return out.getvalue().rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Return the sites with their products, the cuts, unmatched patterns, remarks and totals as plain values, for JSON.

        Returns:
            Dicts, lists, numbers and strings. The code of the graphs is left out. Beside each `reason` stand the ids of the reasons in it (`reason_ids`), which
            `docs/reference/reasons.md` explains, and what the user can do (`advice`).
        """
        content = {f.name: [asdict(item, dict_factory=_with_advice) for item in getattr(self, f.name)] for f in fields(self) if f.name in ("sites", "cuts")}
        totals = {"graphs": len(self.before), "flops_exact": self.flops_exact, "flops_sampled": self.flops_sampled}
        return content | totals | {"unmatched": self.unmatched, "remarks": self.remarks, "assignments": self.assignments}

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=160)
        console.print(self._table() if self.sites else "no matrix product or convolution found", highlight=False)
        sampled = sum(s.decision == "sampled" for s in self.sites)
        if self.flops_exact:
            share = self.flops_sampled / self.flops_exact
            graphs = f" in {len(self.before)} graphs" if len(self.before) > 1 else ""
            console.print(
                f"{sampled} of {len(self.sites)} sites sampled{graphs}; FLOPs of a training step {si(self.flops_exact)} -> {si(self.flops_sampled)} "
                f"({share:.0%}), the sampling included",
                highlight=False,
            )
        if sizes := self.traced():
            console.print(f"{sizes} as traced, which FLOPs and times are for", highlight=False)
        for cut in self.cuts:
            kept = f"{cut.ratio:g} of" if cut.ratio is not None else "as many as needed of"
            what = f"{cut.method}, {kept} {cut.rows} rows, {cut.flops_on_rows / max(1, cut.flops_all):.0%} of the backward FLOPs"
            console.print(f"rows, level {cut.level}: {what if cut.decision == 'rows' else 'all'}; {cut.reason}", highlight=False, markup=False)
        for reason_id, advice in self.advice().items():
            console.print(f"{reason_id}: {advice}", highlight=False, markup=False)
        if self.assignments > 1:
            console.print(
                f"the settings of step 0, the first of {self.assignments} assignments over the run; explain(..., config=config.at(step, phase)) shows another",
                highlight=False,
            )
        for pattern in self.unmatched:
            console.print(f"rule pattern {pattern!r} matches no site", highlight=False, markup=False)
        for remark in self.remarks:
            console.print(remark, highlight=False, markup=False)
        return out.getvalue().rstrip()

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

    def _table(self) -> Table:
        table = Table()
        for title in ("site", "op", "shape", "dtype", "decision"):
            table.add_column(title, overflow="fold")
        table.add_column("k of K", justify="right", no_wrap=True)
        table.add_column("FLOPs before", justify="right", no_wrap=True)
        table.add_column("after", justify="right", no_wrap=True)
        table.add_column("reason", overflow="fold")
        for s in self.sites:
            kept = f"{s.k} of {s.size}"
            table.add_row(escape(s.name), s.op, s.shape, s.dtype, s.decision, kept, si(s.flops_exact), si(s.flops_sampled), escape(s.reason))
        return table


def _with_advice(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A data class as a dict, with the ids and the advice of its reason."""
    by_name = dict(fields)
    reason = by_name.get("reason")
    return by_name | {"reason_ids": list(reason.ids), "advice": list(reason.advice)} if isinstance(reason, Reason) else by_name


def si(number: float) -> str:
    """Write a number with three significant digits and the letter of its order of magnitude.

    Args:
        number: The number.

    Returns:
        Text such as "1.23M".
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"
