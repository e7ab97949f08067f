"""Symbolic sizes in a graph: nodes for expressions over the symbols of its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.reasons.rows import VIEW_DYNAMIC
from approx_compile.rows.batch_dim import Blocked

aten = torch.ops.aten


class SizeNodes:
    """Makes nodes for expressions of sizes, with the symbols taken from the graph's placeholders."""

    def __init__(self, graph: fx.Graph, emit: Callable[..., fx.Node]) -> None:
        self._emit = emit
        self._symbols: dict[Any, fx.Node | tuple[fx.Node, int]] = {}
        for n in graph.find_nodes(op="placeholder"):
            value = n.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._symbols[_torch.size_expr(value)] = n
        for n in graph.find_nodes(op="placeholder"):
            value = n.meta.get("val")
            for d, s in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                self._symbols.setdefault(_torch.size_expr(s), (n, d))

    def add(self, expression: Any, n: fx.Node) -> None:
        """Let a node stand for a symbol."""
        self._symbols[expression] = n

    def number(self, e: Any) -> int | fx.Node:
        """Return a number, or a node whose value is the expression.

        Raises:
            Blocked: The expression is no product, power or sum of sizes at hand.
        """
        e = sympy.sympify(e)
        if e.is_Integer:
            return int(e)
        if e in self._symbols:
            known = self._symbols[e]
            return self._emit(aten.sym_size.int, *known) if isinstance(known, tuple) else known
        if isinstance(e, sympy.Mul | sympy.Add) or (isinstance(e, sympy.Pow) and e.exp.is_Integer and e.exp > 1):
            first, *rest = (self.number(a) for a in ([e.base] * int(e.exp) if isinstance(e, sympy.Pow) else e.args))
            for r in rest:
                first = self._emit(operator.add if isinstance(e, sympy.Add) else operator.mul, first, r)
            return first
        raise Blocked(VIEW_DYNAMIC())

    def numbers(self, sizes: Any) -> list[int | fx.Node]:
        """Return a number or node for each of several expressions."""
        return [self.number(e) for e in sizes]
