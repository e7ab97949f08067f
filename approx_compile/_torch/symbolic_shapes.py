"""Symbolic sizes: their hints, their expressions, and the guards that compiled code has put on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile._torch.fake_tensors import graph_fake_mode, value

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def hint(size: Any) -> int:
    """An int for a size that may be symbolic, without adding a guard."""
    found = known_hint(size)
    return found if found is not None else 1024


def known_hint(size: Any) -> int | None:
    """`hint`, but None for a size that only running tells."""
    if isinstance(size, int):
        return size
    node_hint = getattr(getattr(size, "node", None), "hint", None)
    return int(node_hint) if node_hint is not None else None


def numel(n: fx.Node) -> int:
    return numel_of(value(n))


def numel_of(tensor: Any) -> int:
    return math.prod(hint(size) for size in tensor.shape)


def size_expr(size: Any) -> Any:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, SYMBOLIC) else sympy.sympify(size)


def has_symbol(size: Any, symbol: sympy.Symbol) -> bool:
    return not isinstance(size, int) and symbol in size_expr(size).free_symbols


def has_symbols(gm: fx.GraphModule) -> bool:
    """Whether any input of a Dynamo graph has a symbolic size."""
    values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    return any(isinstance(v, SYMBOLIC) or (isinstance(v, torch.Tensor) and any(not size_expr(s).is_Integer for s in v.shape)) for v in values)


def known_equal(a: Any, b: Any) -> bool:
    """a == b for sizes that may be symbolic, True only where it holds for every value, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return bool(a == b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def symbol_sources(inputs: Sequence[Any]) -> list[tuple[sympy.Symbol, int, int | None]]:
    """For every symbol an input, and the dim of it, that has its value."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for i, given in enumerate(inputs):
        sizes = list(enumerate(given.shape)) if isinstance(given, torch.Tensor) else [(None, given)] if isinstance(given, torch.SymInt) else []
        for d, s in sizes:
            if (e := size_expr(s)).is_Symbol:
                found.setdefault(e, (i, d))  # type: ignore[arg-type]
    return [(s, i, d) for s, (i, d) in found.items()]


def size_at(values: Sequence[Any], i: int, d: int | None) -> Any:
    """What a source of a symbol has for it: value i, or its dim d."""
    return values[i] if d is None else values[i].shape[d]


def evaluate_expr(expression: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression's value, where some symbols' values may be symbolic sizes of another graph."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return values[expression]
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, dict(values), expression)


def symbol_replacer(graph: fx.Graph) -> Callable[[Any], Any]:
    """What expressions have become by now: compiled code may have fixed a symbol to a number, or found two to be equal."""
    env = graph_fake_mode(graph).shape_env
    return lambda e: env.replace(sympy.sympify(e))


def guards_on_symbol(symbol: sympy.Symbol, gm: fx.GraphModule) -> list[Any]:
    """What compiled code has assumed of a symbolic size: expressions that must hold for any value it is called with."""
    env = graph_fake_mode(gm.graph).shape_env
    known = {env.replace(g.expr) for g in env.guards}  # sizes found equal are one symbol then
    return [e for e in known if symbol in e.free_symbols]


def unify_symbols(symbols: Sequence[sympy.Symbol], graph: fx.Graph) -> sympy.Symbol:
    """Guard that these sizes are equal, as they are now, and give the symbol that stands for all of them from now on."""
    env = graph_fake_mode(graph).shape_env
    for other in symbols[1:]:
        env.evaluate_expr(sympy.Eq(symbols[0], other))
    found: sympy.Symbol = env.replace(symbols[0])
    return found


def are_compared(a: sympy.Symbol, b: sympy.Symbol, graph: fx.Graph) -> bool:
    """Whether code assumes something of two sizes together."""
    return any({a, b} <= g.expr.free_symbols for g in graph_fake_mode(graph).shape_env.guards)
