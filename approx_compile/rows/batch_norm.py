"""Approximate the backward pass of BatchNorm on selected rows: replace each sum over the batch that goes back to its rows by one sum per row.

The backward pass of BatchNorm gives row i the gradient dz_i = (dy_i - m - x_i q) / s, where m and q are the means over the batch of dy and dy x. On kept
rows only, with weights w_i = 1/p_i on the incoming gradients, T = sum_kept w_j dy_j estimates the sum. But when the result for row i is multiplied by w_i,
the term of row i itself is counted w_i times too often. With T_i = w_i T - (w_i - 1) w_i dy_i in place of T the result is unbiased (its expectation is that
of w_i dz_i) where rows are drawn independently. Through several layers a bias of order 1 / batch may remain. The approximation costs one more sum per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import VIEWS
from approx_compile.reasons.rows import CROSS_SAMPLE
from approx_compile.rows.batch_dim import DECOUPLED, REDUCED_GRAD, BatchDimState, SampleLayout

aten = torch.ops.aten

WEIGHTS = "row_weights"
"""The name of the placeholder that holds the weights w, one per kept row."""


def decouple_batch_norm(gm: fx.GraphModule, known: BatchDimState) -> bool:
    """Replace the sums over the batch in every elementwise op that combines them with rows, where their terms can be found.

    Args:
        gm: The backward graph. It is edited: it gets `WEIGHTS` as its last placeholder if anything is replaced.
        known: The analysis of the graph.

    Returns:
        Whether anything was replaced.
    """
    todo = [n for n in gm.graph.nodes if CROSS_SAMPLE.explains(known.blocked.get(n))]
    rows = next((n for n in gm.graph.nodes if known.layout_of(n) == SampleLayout(0)), None)
    if not todo or rows is None:
        return False
    work = _Rewriter(gm.graph, known, _torch.value(rows).shape[0])
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
        work.weights = gm.graph.placeholder(WEIGHTS)
    with _torch.fake_mode_of(rows):
        dtype = torch.float64 if _torch.value(rows).dtype == torch.float64 else torch.float32
        work.weights.meta["val"] = torch.empty(work.size, dtype=dtype, device=_torch.value(rows).device)
        done = [work.recombine(n) for n in todo]
    gm.graph.eliminate_dead_code()  # remove the nodes of recombinations that failed halfway
    if not any(done):
        gm.graph.erase_node(work.weights)
    gm.graph.lint()
    gm.recompile()
    return any(done)


class _Rewriter:
    """The edits of one graph. `each` caches the terms of every sum, None for a sum whose terms cannot be found."""

    def __init__(self, graph: fx.Graph, known: BatchDimState, size: Any) -> None:
        self.graph = graph
        self.known = known
        self.size = size
        self.weights: Any = None
        self.each: dict[fx.Node, fx.Node | None] = {}

    def recombine(self, n: fx.Node) -> bool:
        """Let an elementwise op that combines rows with sums over the batch read one sum per row instead; return whether that was possible."""
        rank = _torch.value(n).dim()
        if not _torch.is_pointwise(n):
            return False
        new: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(n):
            for a in n.all_input_nodes:
                if self.known.kind.get(a) == REDUCED_GRAD:
                    by_row = self._sum_per_row(a, rank)
                    if by_row is None:
                        return False
                    new[a] = by_row
        n.args = fx.map_arg(n.args, lambda a: new.get(a, a))
        return True

    def _sum_per_row(self, total: fx.Node, rank: int) -> fx.Node | None:
        """The sum for every row, w_i T - (w_i - 1) t_i with the term t_i of row i, in a shape that broadcasts against rows in dim 0."""
        each = self._each(total)
        shape = [1] * (rank - _torch.value(total).dim()) + list(_torch.value(total).shape)
        if each is None or shape[0] != 1:
            return None
        w = self._view(self.weights, [self.size, *[1] * (rank - 1)])
        scaled = self._emit(aten.mul.Tensor, w, self._view(total, shape))
        scaled.meta[DECOUPLED] = True
        counted_twice = self._emit(aten.mul.Tensor, self._emit(aten.sub.Tensor, w, 1), self._view(each, [self.size, *shape[1:]]))
        result = self._emit(aten.sub.Tensor, scaled, counted_twice)
        return self._emit(torch.ops.prims.convert_element_type.default, result, _torch.value(total).dtype)

    def _each(self, total: fx.Node) -> fx.Node | None:
        """The terms of a sum over the batch, with shape (rows, *shape of the sum), or None if they cannot be found.

        The sum may have passed through linear ops since: these are applied to every term.
        """
        if total not in self.each:
            self.each[total] = self._terms(total)
        return self.each[total]

    def _terms(self, t: fx.Node) -> fx.Node | None:
        """Build the terms of one sum, or of one op that is applied to a sum."""
        shape = [self.size, *_torch.value(t).shape]
        source = t.args[0]
        if t.target is aten.sum.dim_IntList and isinstance(source, fx.Node) and self.known.layout_of(source) == SampleLayout(0):
            rest = [d for d in t.args[1] if int(d) % _torch.value(source).dim() != 0]  # type: ignore[union-attr,arg-type]
            return self._view(self._emit(aten.sum.dim_IntList, source, rest) if rest else source, shape)
        inner = [a for a in t.all_input_nodes if self.known.kind.get(a) == REDUCED_GRAD]
        each = self._each(inner[0]) if len(inner) == 1 else None
        if each is None:
            return None
        if t.target in VIEWS or t.target in (aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim):
            return self._view(each, shape)
        if _torch.is_pointwise(t) and _torch.value(inner[0]).shape == _torch.value(t).shape:
            return self._emit(t.target, *(each if a is inner[0] else a for a in t.args))
        return None

    def _view(self, x: fx.Node, shape: list[Any]) -> fx.Node:
        return self._emit(aten.reshape.default, x, [self._emit(aten.sym_size.int, self.weights, 0) if s is self.size else s for s in shape])

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        """Insert a call with its fake value in the meta."""
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda a: a.meta["val"]))
        return node
