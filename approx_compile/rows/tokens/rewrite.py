"""Rewrite a backward graph in place, so that its regions run on the tokens that are chosen where they begin.

For each region, the norms of the entering gradients are computed for every token, tokens are chosen (`choose_op`), the entering gradients and what the region
reads of the forward pass are gathered, the members are computed again on the tokens kept, and their results are put back among all tokens, with zeros for the
tokens left out. Inductor sees one graph: it fuses gathers and what is put back with their neighbours.

A member on some tokens is the same op on smaller tensors: the tokens kept take the place of the first factor of the token axis, and the other factors have
size 1. Dims keep their meaning, so that only the sizes of views and expansions change.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import PERMUTES
from approx_compile.rows.batch_dim import Blocked
from approx_compile.rows.tokens import choose_op  # noqa: F401 - registers the op
from approx_compile.rows.tokens.regions import Region
from approx_compile.rows.tokens.sizes import SizeNodes
from approx_compile.rows.tokens.token_axis import Refined, TokenLayout, sizes_on_tokens, unfold
from approx_compile.rows.tokens.token_rules import SIZED_VIEWS, Read, above, read_broadcast

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Count:
    """The number of tokens that a region keeps: the placeholder of the graph, and its symbol."""

    node: fx.Node
    symbol: Any


class _Chosen(NamedTuple):
    """The nodes of a region's choice: see `choose_op.choose_tokens`."""

    idx: fx.Node
    weight: fx.Node
    place: fx.Node


def rewrite(graph: fx.Graph, regions: Sequence[Region], counts: Sequence[Count], seeds: fx.Node, methods: Sequence[str]) -> list[fx.Node]:
    """Let regions run on some of their tokens.

    Args:
        graph: The backward graph, which is edited.
        regions: The regions.
        counts: The number of tokens for each.
        seeds: The placeholder of the seeds, one for each region.
        methods: The method by which each region's tokens are chosen.

    Returns:
        For each region the node of the squared gradient norms of all its tokens (N,).
    """
    norms = []
    for i, region in enumerate(regions):
        rewriter = _RegionRewriter(graph, region, i, counts[i], seeds, methods[i])
        norms.append(rewriter.run())
        for other in regions:  # a region of another axis may begin where this one ends
            other.entering = {rewriter.replaced.get(n, n): layout for n, layout in other.entering.items()}
    _sort(graph)
    return norms


class _RegionRewriter:
    """Rewrites one region."""

    def __init__(self, graph: fx.Graph, region: Region, index: int, count: Count, seeds: fx.Node, method: str) -> None:
        self.graph, self.region, self.index, self.count, self.seeds, self.method = graph, region, index, count, seeds, method
        self.mode = _torch.graph_fake_mode(graph)
        self.sizes = SizeNodes(graph, self.emit)
        self.sizes.add(count.symbol, count.node)
        self.new: dict[Any, fx.Node] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        """The results of the region, with what has taken their place."""
        self.like: fx.Node | None = None

    def run(self) -> fx.Node:
        """Edit the graph and return the node of the norms."""
        region = self.region
        last = list(region.members)[-1]
        with self.graph.inserting_before(last):
            norms, chosen = self._choose()
            self.chosen = chosen
        for n, layout in region.members.items():
            with self.graph.inserting_before(n):
                self.new[n] = self._member(n, layout)
        for n in region.results():
            self.like = n
            layout = region.members[n]
            with self.graph.inserting_before(n):
                new = self.new[n] if layout is None else self._put_back(self.new[n], layout, _torch.value(n))
            self.replaced[n] = new
            n.replace_all_uses_with(new, delete_user_cb=lambda u: u not in region.members)
        for n in reversed(list(region.members)):
            if not n.users:
                self.graph.erase_node(n)
        return norms

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a node and compute its fake value."""
        new = self.graph.call_function(target, args, kwargs)
        given, named = fx.map_arg((args, kwargs), lambda a: a.meta["val"])
        with self.mode, torch.no_grad():
            new.meta["val"] = target(*given, **named)
        if self.like is not None:
            new.meta = {k: v for k, v in self.like.meta.items() if k in _PROVENANCE} | new.meta
        return new

    # --- the choice ---

    def _choose(self) -> tuple[fx.Node, _Chosen]:
        total: fx.Node | None = None
        for n, layout in self.region.entering.items():
            norms = self._norms_sq(n, layout)
            total = norms if total is None else self.emit(aten.add.Tensor, total, norms)
        assert total is not None
        chosen = self.emit(torch.ops.approx_compile.choose_tokens_v1.default, total, self.seeds, self.index, self.count.node, self.method)
        return total, _Chosen(*(self._result(chosen, i) for i in range(3)))

    def _result(self, n: fx.Node, i: int) -> fx.Node:
        new = self.graph.call_function(operator.getitem, (n, i))
        new.meta["val"] = n.meta["val"][i]
        return new

    def _norms_sq(self, n: fx.Node, layout: TokenLayout) -> fx.Node:
        """The squared norms of a gradient's tokens (N,), in fp32 (fp64 for fp64)."""
        value = _torch.value(n)
        if value.dtype not in (torch.float32, torch.float64):
            n = self.emit(prims.convert_element_type.default, n, torch.float32)
        flat = unfold(layout, self.region.factors, value.shape)
        new = self._view(n, flat.sizes)
        new = self.emit(aten.mul.Tensor, new, new)
        rest = [d for d in range(len(flat.sizes)) if d not in flat.dims]
        new = self.emit(aten.sum.dim_IntList, new, rest) if rest else new
        order = [flat.ranks.index(i) for i in range(len(flat.dims))]
        if order != sorted(order):
            new = self.emit(aten.permute.default, new, order)
        return self._view(new, [sympy.Mul(*self.region.factors)])

    # --- gathering ---

    def _gather(self, n: fx.Node, layout: TokenLayout, weighted: bool = False) -> fx.Node:
        """The chosen tokens of a tensor, at the first factor's place; a gradient's are multiplied by their weights."""
        value, factors = _torch.value(n), self.region.factors
        flat = unfold(layout, factors, value.shape)
        if flat.in_order and (merged := self._try_view(n, flat.merged)) is not None:
            new, goal = self.emit(aten._unsafe_index.Tensor, merged, [*[None] * flat.dims[0], self.chosen.idx]), flat.dims[0]
        else:
            parts: list[fx.Node | None] = [None] * len(flat.sizes)
            for i, d in enumerate(flat.dims):
                parts[d] = self._part_of_index(i)
            new = self.emit(aten._unsafe_index.Tensor, self._view(n, flat.sizes), parts)
            adjacent = max(flat.dims) - min(flat.dims) == len(flat.dims) - 1
            at, goal = min(flat.dims) if adjacent else 0, flat.others_before  # where indexing has left the tokens, and where they belong
            if at != goal:
                dims = [d for d in range(_torch.value(new).dim()) if d != at]
                new = self.emit(aten.permute.default, new, [*dims[:goal], at, *dims[goal:]])
        if weighted:  # in the weights' dtype: large ones are beyond the range of float16
            weight = self._view(self.chosen.weight, [self.count.symbol, *[1] * (_torch.value(new).dim() - 1 - goal)])
            new = self.emit(aten.mul.Tensor, new, weight)
            if _torch.value(new).dtype != value.dtype:
                new = self.emit(prims.convert_element_type.default, new, value.dtype)
        return self._view(new, sizes_on_tokens(layout, factors, value.shape, self.count.symbol))

    def _part_of_index(self, i: int) -> fx.Node:
        """The index along factor `i` of each token kept."""
        key = ("part", i)
        if key not in self.new:
            factors = self.region.factors
            new, inner = self.chosen.idx, sympy.Mul(*factors[i + 1 :])
            if inner != 1:
                new = self.emit(aten.div.Tensor_mode, new, self.sizes.number(inner), rounding_mode="floor")
            if i:
                new = self.emit(aten.remainder.Scalar, new, self.sizes.number(factors[i]))
            self.new[key] = new
        return self.new[key]

    def _put_back(self, n: fx.Node, layout: TokenLayout, like: torch.Tensor) -> fx.Node:
        """A tensor of all tokens: a region's result at the tokens kept, and zeros elsewhere."""
        factors, place = self.region.factors, self.chosen.place
        flat = unfold(layout, factors, like.shape)
        kept, goal = flat.others, flat.others_before
        if not flat.in_order:  # the grid of places with the factors in the order of their dims
            place = self.emit(aten.permute.default, self._view(place, factors), flat.ranks)
            place = self.emit(aten.clone.default, place, memory_format=torch.contiguous_format)  # an index's strides go over to what it selects
        grid = _torch.value(place).dim()
        rows = self._view(n, [*kept[:goal], self.count.symbol, *kept[goal:]])
        found = self.emit(aten.clamp_min.default, place, 0)
        new = self.emit(aten._unsafe_index.Tensor, rows, [*[None] * goal, found])
        held = self._view(self.emit(aten.ge.Scalar, place, 0), [*map(_torch.size_expr, _torch.value(place).shape), *[1] * (len(kept) - goal)])
        zero = self.emit(aten.full.default, [], 0, dtype=like.dtype, layout=torch.strided, device=like.device, pin_memory=False)
        new = self.emit(aten.where.self, held, new, zero)
        if grid > 1:
            at = {flat.dims[i]: goal + j for j, i in enumerate(flat.ranks)}
            others = iter([*range(goal), *range(goal + grid, len(kept) + grid)])
            order = [at[d] if d in at else next(others) for d in range(len(flat.sizes))]
            new = self.emit(aten.permute.default, new, order) if order != sorted(order) else new
        return self._strided(self._view(new, map(_torch.size_expr, like.shape)), like)

    def _strided(self, n: fx.Node, like: torch.Tensor) -> fx.Node:
        """A tensor with the strides of a dense one of its sizes: the views that read it were made for these."""
        value = _torch.value(n)
        if 0 in like.stride() or all(_torch.known_equal(a, b) for s, a, b in zip(like.shape, value.stride(), like.stride(), strict=True) if s != 1):
            return n
        order = sorted(range(like.dim()), key=lambda d: -_torch.hint(like.stride(d)))
        new = self.emit(aten.clone.default, self.emit(aten.permute.default, n, order), memory_format=torch.contiguous_format)
        return self.emit(aten.permute.default, new, [order.index(d) for d in range(like.dim())])

    # --- members ---

    def _member(self, n: fx.Node, layout: TokenLayout | None) -> fx.Node:
        """A member computed again on the tokens kept."""
        self.like = n
        return self._again(n, layout, {a: self._operand(n, a) for a in n.all_input_nodes})

    def _again(self, n: fx.Node, layout: TokenLayout | None, operands: dict[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: operands.get(a, a))
        value = _torch.value(n)
        if n.target in SIZED_VIEWS and layout is not None:
            (viewed,) = n.all_input_nodes[:1]
            return self._view(operands[viewed], sizes_on_tokens(layout, self.region.factors, value.shape, self.count.symbol))
        if n.target is aten.expand.default and layout is not None:
            args = (args[0], self.sizes.numbers(sizes_on_tokens(layout, self.region.factors, value.shape, self.count.symbol)), *args[2:])
        if n.target is aten.squeeze.default:  # factors that have size 1 only now must stay
            given = _torch.value(n.args[0]).shape
            return self.emit(aten.squeeze.dims, args[0], [d for d, s in enumerate(given) if _torch.known_equal(s, 1)])
        return self.emit(n.target, *args, **kwargs)

    def _operand(self, n: fx.Node, a: fx.Node) -> fx.Node:
        """An operand of a member on the tokens kept."""
        region = self.region
        if a in region.members or a in region.views or a in region.entering:
            return self._gradient(a)
        read = region.reads.get((n, a))
        return a if read is None else self._forward(a, read)

    def _gradient(self, a: fx.Node) -> fx.Node:
        if a in self.new:
            return self.new[a]
        layout = self.region.layout(a)
        assert layout is not None
        if a in self.region.views:
            self.new[a] = self._again(a, layout, {b: self._gradient(b) for b in a.all_input_nodes if self.region.layout(b) is not None})
            return self.new[a]
        self.new[a] = self._gather(a, layout, weighted=True)
        return self.new[a]

    def _forward(self, a: fx.Node, read: Read) -> fx.Node:
        """The tokens of a tensor of the forward pass. What is computed entry by entry is computed again, from the tokens of what is saved."""
        key = (a, read)
        if key in self.new:
            return self.new[key]
        if read.sizes is not None:
            a = self.emit(aten.expand.default, a, self.sizes.numbers(read.sizes))
            self.new[key] = self._gather(a, read.layout)
        else:
            self.new[key] = self._recomputed(a, read.layout) or self._gather(a, read.layout)
        return self.new[key]

    def _recomputed(self, a: fx.Node, layout: TokenLayout) -> fx.Node | None:
        """A value of the forward pass computed again on the tokens kept; None where that is not an op on single entries."""
        if a.op != "call_function" or _torch.is_random(a):
            return None
        factors, value = self.region.factors, _torch.value(a)
        if a.target in SIZED_VIEWS | PERMUTES:
            try:
                up = above(a, layout, factors)
            except (Blocked, Refined):
                return None
            assert up is not None
            return self._again(a, layout, {up[0]: self._forward(up[0], Read(up[1]))})
        if not (_torch.is_pointwise(a) or a.target is prims.convert_element_type.default):
            return None
        try:
            reads = {b: read_broadcast(_torch.value(b).shape, layout, factors, value.shape) for b in a.all_input_nodes if _is_tensor(b)}
        except Blocked:
            return None
        return self._again(a, layout, {b: b if r is None else self._forward(b, r) for b, r in reads.items()})

    # --- views ---

    def _view(self, n: fx.Node, sizes: Any) -> fx.Node:
        """A tensor with other sizes; a copy where its strides do not allow a view."""
        wanted = list(sizes)
        if [_torch.size_expr(s) for s in _torch.value(n).shape] == wanted:
            return n
        return self._try_view(n, wanted) or self.emit(
            aten.view.default, self.emit(aten.clone.default, n, memory_format=torch.contiguous_format), self.sizes.numbers(wanted)
        )

    def _try_view(self, n: fx.Node, sizes: Sequence[Any]) -> fx.Node | None:
        """A view of a tensor; None where its strides do not allow one."""
        if [_torch.size_expr(s) for s in _torch.value(n).shape] == list(sizes):
            return n
        numbers = self.sizes.numbers(sizes)
        with self.mode, torch.no_grad():
            try:
                value = _torch.value(n).view(fx.map_arg(numbers, lambda a: a.meta["val"]))
            except (RuntimeError, ValueError):
                return None
        new = self.graph.call_function(aten.view.default, (n, numbers))
        new.meta["val"] = value
        return new


_PROVENANCE = ("seq_nr", "stack_trace", "nn_module_stack", "fwd_nn_module_stack", "original_aten", "from_node", "partitioner_tag")
"""The keys of a node's metadata that say where in the user's code it comes from."""


def _is_tensor(n: fx.Node) -> bool:
    return isinstance(n.meta.get("val"), torch.Tensor)


def _sort(graph: fx.Graph) -> None:
    """Move nodes so that each comes after what it reads, and otherwise keep their order."""
    nodes = list(graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    missing = {n: len(n.all_input_nodes) for n in nodes}
    ready = [i for i, n in enumerate(nodes) if not missing[n]]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        n = nodes[heapq.heappop(ready)]
        order.append(n)
        for u in n.users:
            missing[u] -= 1
            if not missing[u]:
                heapq.heappush(ready, at[u])
    assert len(order) == len(nodes), "the graph has a circle"
    for a, b in itertools.pairwise(order):
        a.append(b)
