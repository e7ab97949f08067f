"""Find the regions of a backward graph that can run on some of the tokens.

A region begins at gradients that products of linear layers read (`entering`) and contains the nodes below that keep tokens apart and read no gradient from
outside. It ends where tokens are mixed, and where a gradient is added that bypasses the region. In a transformer block the MLP with its normalisation is a
region, the output projection is one, and the projections to queries, keys and values, with theirs, are one.

`find_regions` decides what may run on tokens; whether it pays is decided elsewhere. `str(region)` says what a region holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import MM, PERMUTES, VIEWS, op_name, source_behind
from approx_compile.passes.rewrite.graph_edit import BY_SAMPLE_KEY
from approx_compile.reasons import Reason
from approx_compile.reasons.rows import NOT_LINEAR
from approx_compile.rows.batch_dim import Blocked
from approx_compile.rows.linearity import is_linear
from approx_compile.rows.tokens.token_axis import Refined, TokenLayout, fits, merged_layout
from approx_compile.rows.tokens.token_rules import REARRANGING, Placement, Read, above, place

_MOST_REFINEMENTS = 16
"""How often the analysis of an axis starts again. Each time a view has split a factor; real graphs have two or three."""


@dataclass
class Region:
    """A part of a backward graph that keeps tokens apart and is linear in the gradients that enter it.

    Attributes:
        tokens: The number of tokens, an int or a symbolic size.
        factors: The sizes of the factors of the token axis, as expressions, whose product is the number of tokens.
        entering: The gradients that enter, with their layouts. One choice of tokens, by their norms together, holds for all.
        members: The nodes of the region in graph order, with the layouts of their values (None: a sum over all tokens).
        views: Rearranged entering gradients, with their layouts, which are made anew for the members that read them.
        reads: How members read tensors of the forward pass, by (member, tensor).
        products: The matrix products among the members.
    """

    tokens: Any
    factors: tuple[Any, ...]
    entering: dict[fx.Node, TokenLayout] = field(default_factory=dict)
    members: dict[fx.Node, TokenLayout | None] = field(default_factory=dict)
    views: dict[fx.Node, TokenLayout] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, fx.Node], Read] = field(default_factory=dict)
    products: dict[fx.Node, None] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """The FLOPs of the products, on all tokens."""
        return sum(map(_torch.flops, self.products))

    def layout(self, n: fx.Node) -> TokenLayout | None:
        """Return where a node's value holds the tokens; None if it does not, or is not of the region."""
        return self.entering.get(n) or self.views.get(n) or self.members.get(n)

    def results(self) -> list[fx.Node]:
        """Return the members that nodes outside of the region read."""
        return [n for n in self.members if any(u not in self.members for u in n.users)]

    def drop_last_views(self) -> None:
        """Leave out members that only rearrange a result for nodes outside: on all tokens they cost nothing, and rows are put back where they lie together."""
        for n in reversed(list(self.members)):
            if n.target in REARRANGING and self.members[n] is not None and not any(u in self.members for u in n.users):
                del self.members[n]

    def take(self, other: Region) -> None:
        """Add all that another region holds."""
        for name in ("entering", "members", "views", "reads", "products"):
            getattr(self, name).update(getattr(other, name))

    def __str__(self) -> str:
        entering, products = (", ".join(n.name for n in nodes) for nodes in (self.entering, self.products))
        results = ", ".join(n.name for n in self.results())
        return f"{' x '.join(map(str, self.factors))} tokens of {entering}: {products}, {len(self.members)} nodes; results {results}"


def gradients_of(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values are computed from output gradients, with these."""
    found = {n for n in graph.nodes if n.op == "placeholder" and _torch.is_tangent(n)}
    for n in graph.nodes:
        if n.op == "call_function" and not isinstance(n.meta.get("val"), _torch.SYMBOLIC) and not found.isdisjoint(n.all_input_nodes):
            found.add(n)
    return found


def find_regions(graph: fx.Graph, products: Mapping[fx.Node, str], blocked: dict[Reason, fx.Node] | None = None) -> list[Region]:
    """Find all regions of a backward graph.

    Args:
        graph: The backward graph.
        products: The gradients of linear layers that may run on tokens, "grad_input" or "grad_weight" for each.
        blocked: Takes up the reasons why a node below a product is not part of its region, each with the first such node.

    Returns:
        The regions, in graph order. No two share a node, and their choices do not wait for each other in a circle.
    """
    if any(getattr(n.target, "_schema", None) is not None and n.target._schema.is_mutable for n in graph.nodes):
        return []  # what reads a tensor must not move past what writes to it
    gradients = gradients_of(graph)
    starts = {n: s for n, kind in products.items() if (s := _start(n, kind, gradients)) is not None}
    regions: list[Region] = []
    sizes = {_torch.size_expr(tokens): tokens for _, _, tokens in starts.values()}
    for size, tokens in sorted(sizes.items(), key=lambda item: -_torch.hint(item[1])):  # tokens before samples
        mine = {n: (kind, a) for n, (kind, a, n_tokens) in starts.items() if _torch.size_expr(n_tokens) == size}
        taken = {n for r in regions for n in (*r.members, *r.views)}
        factors: tuple[Any, ...] = (size,)
        for _ in range(_MOST_REFINEMENTS):
            try:
                regions += _Search(graph, tokens, factors, mine, gradients, taken, {} if blocked is None else blocked).run()
                break
            except Refined as e:
                factors = e.factors
    order = {n: i for i, n in enumerate(graph.nodes)}
    regions.sort(key=lambda r: min(order[n] for n in r.members))
    return _without_circles(graph, _above_linear_ops(graph, regions, gradients, blocked))


def _start(n: fx.Node, kind: str, gradients: set[fx.Node]) -> tuple[str, fx.Node, Any] | None:
    """The gradient operand of a product of a linear layer, and its number of tokens; None if another op computes it."""
    if n.target not in MM or len(n.args) != 2:
        return None
    mine = [(i, a) for i, a in enumerate(n.args) if a in gradients]
    if len(mine) != 1:
        return None
    ((i, a),) = mine
    assert isinstance(a, fx.Node)
    if kind == "grad_input":
        return (kind, a, _torch.value(a).shape[0]) if i == 0 else None
    return kind, a, _torch.value(a).shape[1 - i]


class _Search:
    """One walk over a graph with known factors of the token axis."""

    def __init__(
        self,
        graph: fx.Graph,
        tokens: Any,
        factors: tuple[Any, ...],
        products: Mapping[fx.Node, tuple[str, fx.Node]],
        gradients: set[fx.Node],
        taken: Collection[fx.Node],
        blocked: dict[Reason, fx.Node],
    ) -> None:
        self.graph, self.tokens, self.factors, self.products = graph, tokens, factors, products
        self.gradients, self.taken, self.blocked = gradients, taken, blocked
        self.region: dict[fx.Node, Region] = {}
        self.ancestors = _ancestors(graph)
        self.bit = {n: 1 << i for i, n in enumerate(graph.nodes)}
        self.by_input: dict[Any, Region] = {}

    def run(self) -> list[Region]:
        """Walk over the graph in order and return the regions that hold a product."""
        sources = dict(s for n, (kind, a) in self.products.items() if (s := self._source(n, kind, a)) is not None)
        entering: dict[fx.Node, tuple[TokenLayout, list[fx.Node]]] = {}
        for n, (source, layout) in sources.items():
            known = entering.setdefault(source, (layout, []))
            if known[0] == layout:
                known[1].append(n)
        for n in self.graph.nodes:
            if n.op == "call_function" and n in self.gradients and n not in self.taken:
                self._visit(n)
            if n in entering and n not in self.region:
                self._enter(n, *entering[n])
        regions = {id(r): r for r in self.region.values() if r.products}
        for r in regions.values():
            r.members = {n: r.members[n] for n in self.graph.nodes if n in r.members}
            r.drop_last_views()
        return list(regions.values())

    def _source(self, n: fx.Node, kind: str, a: fx.Node) -> tuple[fx.Node, tuple[fx.Node, TokenLayout]] | None:
        """The gradient that a product reads, above all that only rearranges it, with its layout."""
        dim = 0 if kind == "grad_input" else 1 - list(n.args).index(a)
        layout = merged_layout(self.factors, dim)
        if not fits(layout, self.factors, _torch.value(a).shape):
            return None
        try:
            while a in self.gradients and (up := above(a, layout, self.factors)) is not None:
                a, layout = up
        except Blocked:
            pass
        return n, (a, layout)

    def _enter(self, source: fx.Node, layout: TokenLayout, products: Iterable[fx.Node]) -> None:
        """Begin a region at a gradient, or let it enter the region whose products read the same input as its own, as queries, keys and values do."""
        inputs = {source_behind(o, VIEWS | PERMUTES) for n in products if self.products[n][0] == "grad_weight" for o in n.args if o not in self.gradients}
        region = Region(self.tokens, self.factors, {source: layout})
        self.region[source] = region
        for x in inputs:
            if x in self.by_input and self._may_join(self.by_input[x], self.region[source]):
                self._join(self.by_input[x], self.region[source])
            self.by_input[x] = self.region[source]

    def _may_join(self, a: Region, b: Region) -> bool:
        """Whether one choice may hold for two regions: no gradient that enters one is computed from a member of the other."""
        if a is b:
            return True
        members = sum(self.bit[n] for r in (a, b) for n in r.members)
        return not any(self.ancestors[e] & members for r in (a, b) for e in r.entering)

    def _join(self, a: Region, b: Region) -> None:
        if a is b:
            return
        a.take(b)
        for n in (*b.entering, *b.views, *b.members):
            self.region[n] = a
        self.by_input = {x: a if r is b else r for x, r in self.by_input.items()}

    def _visit(self, n: fx.Node) -> None:
        """Make a node a member of the region of the gradients that it reads, if it may be one."""
        operands = [a for a in n.all_input_nodes if a in self.gradients]
        layouts: dict[fx.Node, TokenLayout] = {}
        for a in operands:
            layout = self.region[a].layout(a) if a in self.region else None
            if layout is None:
                return
            layouts[a] = layout
        members = all(a in self.region[a].members for a in operands)
        entering_only = not any(a in self.region[a].members for a in operands)
        if not members and not entering_only:
            return  # a gradient bypasses the region
        try:
            placement = place(n, self.factors, layouts, self.gradients)
        except Blocked as e:
            if members:
                self.blocked.setdefault(e.reason, n)
            return
        if n.target in MM and (n not in self.products or (self.products[n][0] == "grad_weight") != (placement.layout is None)):
            return
        first, *rest = [self.region[a] for a in operands]
        if not all(self._may_join(first, r) for r in rest):
            return
        for r in rest:
            self._join(first, r)
        if entering_only and n not in self.products and placement.layout is not None:
            if n.target in REARRANGING:
                first.views[n] = placement.layout
                self.region[n] = first
            return
        if entering_only and n not in self.products and placement.layout is None and any(self._read_by_exact(a) for a in operands):
            return  # the bias gradient of a layer that stays exact
        self._add(n, placement, first)

    def _read_by_exact(self, gradient: fx.Node) -> bool:
        """Whether a gradient, or a view of it, is read by a product that is in no region."""
        return any(self._read_by_exact(u) if u.target in REARRANGING else u.target in MM and u not in self.products for u in gradient.users)

    def _add(self, n: fx.Node, placement: Placement, region: Region) -> None:
        region.members[n] = placement.layout
        region.reads.update({(n, a): r for a, r in placement.reads.items()})
        self.region[n] = region
        if n in self.products:
            region.products[n] = None


def _ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """The nodes that each node is computed from, itself included, as bits by the position in the graph."""
    found: dict[fx.Node, int] = {}
    for i, n in enumerate(graph.nodes):
        bits = 1 << i
        for a in n.all_input_nodes:
            bits |= found[a]
        found[n] = bits
    return found


def _above_linear_ops(graph: fx.Graph, regions: list[Region], gradients: set[fx.Node], blocked: dict[Reason, fx.Node] | None) -> list[Region]:
    """Leave out regions whose results reach an op that is not linear in them: it would turn their variance into a bias."""
    ancestors, bit = _ancestors(graph), {n: 1 << i for i, n in enumerate(graph.nodes)}
    nonlinear = {
        n: ancestors[n]
        for n in graph.nodes
        if n.op == "call_function" and n in gradients and BY_SAMPLE_KEY not in n.meta and not is_linear(n, gradients.intersection(n.all_input_nodes))
    }
    kept = []
    for region in regions:
        members = sum(bit[n] for n in region.members)
        first = next((n for n, above in nonlinear.items() if above & members), None)
        if first is None:
            kept.append(region)
        elif blocked is not None:
            blocked.setdefault(NOT_LINEAR(op=op_name(first)), first)
    return kept


def _without_circles(graph: fx.Graph, regions: list[Region]) -> list[Region]:
    """Leave out regions whose choices wait for each other: a region runs only after all gradients that enter it are known. The smallest is left out first."""
    ancestors, bit = _ancestors(graph), {n: 1 << i for i, n in enumerate(graph.nodes)}
    members = [sum(bit[n] for n in r.members) for r in regions]
    waits = [{j for j, m in enumerate(members) if any(ancestors[e] & m for e in r.entering)} for r in regions]
    left = set(range(len(regions)))
    while True:
        free = set(left)
        while ready := {i for i in free if not waits[i] & free}:
            free -= ready
        if not free:
            return [regions[i] for i in sorted(left)]
        left.discard(min(free, key=lambda i: regions[i].flops))
