"""Symbolic sizes: their hints, their expressions, and the guards that compiled code has put on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile._torch.fake_tensors import graph_fake_mode, value

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def hint(size: Any) -> int:
    """Return an int for a size that may be symbolic, without adding a guard: its hint, or 1024 if it has none."""
    known = known_hint(size)
    return known if known is not None else 1024


def known_hint(size: Any) -> int | None:
    """Return an int for a size that may be symbolic, without adding a guard; None for a symbol without a hint, whose value only running tells."""
    if isinstance(size, int):
        return size
    node_hint = getattr(getattr(size, "node", None), "hint", None)
    return int(node_hint) if node_hint is not None else None


def numel(n: fx.Node) -> int:
    """Return the number of entries of a node's value; symbolic sizes count with their hints."""
    return numel_of(value(n))


def numel_of(tensor: Any) -> int:
    """Return the number of entries of a tensor; symbolic sizes count with their hints."""
    return math.prod(hint(size) for size in tensor.shape)


def size_expr(size: Any) -> Any:
    """Return a size as a sympy expression."""
    return size.node.expr if isinstance(size, SYMBOLIC) else sympy.sympify(size)


def has_symbol(size: Any, symbol: sympy.Symbol) -> bool:
    """Return whether a size depends on a symbol."""
    return not isinstance(size, int) and symbol in size_expr(size).free_symbols


def has_symbols(gm: fx.GraphModule) -> bool:
    """Return whether any input of a Dynamo graph has a symbolic size."""
    values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    return any(isinstance(v, SYMBOLIC) or (isinstance(v, torch.Tensor) and any(not size_expr(s).is_Integer for s in v.shape)) for v in values)


def known_equal(a: Any, b: Any) -> bool:
    """Return whether two sizes that may be symbolic are equal for all values of their symbols, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return bool(a == b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def symbol_sources(inputs: Sequence[Any]) -> list[tuple[sympy.Symbol, int, int | None]]:
    """Find where the values of symbols can be read from the inputs of a graph.

    Args:
        inputs: The inputs: tensors, symbolic numbers and others.

    Returns:
        (symbol, position of an input, its dim or None if the input itself is the number), one for each symbol.
    """
    sources: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for i, given in enumerate(inputs):
        sizes = list(enumerate(given.shape)) if isinstance(given, torch.Tensor) else [(None, given)] if isinstance(given, torch.SymInt) else []
        for d, s in sizes:
            if (e := size_expr(s)).is_Symbol:
                sources.setdefault(e, (i, d))  # type: ignore[arg-type]
    return [(s, i, d) for s, (i, d) in sources.items()]


def size_at(values: Sequence[Any], i: int, d: int | None) -> Any:
    """Read a symbol's value where `symbol_sources` says.

    Args:
        values: The inputs.
        i: Position of the input.
        d: Its dim; None if the input itself is the number.

    Returns:
        The value.
    """
    return values[i] if d is None else values[i].shape[d]


def evaluate_expr(expression: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """Evaluate an expression of sizes.

    Args:
        expression: A sympy expression.
        values: The values of its symbols, which may be symbolic sizes of another graph.

    Returns:
        The value.
    """
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return values[expression]
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, dict(values), expression)


def symbol_replacer(graph: fx.Graph) -> Callable[[Any], Any]:
    """Return a function that replaces symbols in expressions by what they stand for by now.

    Compiled code may have specialised a symbol to a number, or found two symbols to be equal.

    Args:
        graph: The graph whose symbols these are.

    Returns:
        A function of expressions.
    """
    env = graph_fake_mode(graph).shape_env
    return lambda e: env.replace(sympy.sympify(e))


def guards_on_symbol(symbol: sympy.Symbol, gm: fx.GraphModule) -> list[Any]:
    """List what compiled code has assumed of a symbolic size.

    Args:
        symbol: The symbol.
        gm: The graph.

    Returns:
        Expressions that must hold for every value with which the code is called.
    """
    env = graph_fake_mode(gm.graph).shape_env
    known = {env.replace(g.expr) for g in env.guards}  # two sizes that were found equal become one symbol
    return [e for e in known if symbol in e.free_symbols]


_new_sizes = itertools.count()


def new_size(graph: fx.Graph, hint: int) -> torch.SymInt:
    """Make a symbolic size of 2 or more for a graph, which no tensor of the user's has.

    Args:
        graph: The graph.
        hint: The value that decides where code depends on it. What is assumed is a guard on the symbol, see `take_guards`.

    Returns:
        The size.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env = graph_fake_mode(graph).shape_env
    source = ConstantSource(f"approx_compile_size_{next(_new_sizes)}")
    symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC)
    made: torch.SymInt = env.create_symintnode(symbol, hint=hint, source=source)
    return made


def take_guards(symbols: Sequence[sympy.Symbol], graph: fx.Graph) -> list[Any]:
    """Return what compiled code has assumed of symbols that `new_size` made, and take these guards out of the graph's environment.

    Dynamo would else look for the symbols among the user's inputs.

    Args:
        symbols: The symbols.
        graph: The graph.

    Returns:
        Expressions that must hold for every value with which the code is called.
    """
    env = graph_fake_mode(graph).shape_env
    mine = [g for g in env.guards if not g.expr.free_symbols.isdisjoint(symbols)]
    env.guards[:] = [g for g in env.guards if g not in mine]
    return list({env.replace(g.expr) for g in mine})


def guard_holds(guard: Any, values: Mapping[sympy.Symbol, int]) -> bool:
    """Return whether a guard holds for these values of its symbols. It does not where evaluating it divides by zero, as s // (s // 4) with s = 2."""
    try:
        return bool(guard.subs(values) == sympy.true)
    except ZeroDivisionError:
        return False


def divisor_of(symbol: sympy.Symbol, graph: fx.Graph) -> int:
    """Return the number that a size is divided by where the sizes of a graph's tensors are a part of it, as in x.view(2, -1).

    Args:
        symbol: The symbol of the size.
        graph: The graph.

    Returns:
        The least common multiple of all divisors; 1 if there is none, or if the size at hand is no multiple of it.
    """
    from torch.utils._sympy.functions import FloorDiv

    values = [n.meta.get("val") for n in graph.nodes]
    tensors = [v for given in values for v in (given if isinstance(given, tuple | list) else (given,)) if isinstance(v, torch.Tensor)]
    sizes = {size_expr(s): s for v in tensors for s in v.shape if has_symbol(s, symbol)}
    divisors = {int(d.args[1]) for e in sizes for d in e.atoms(FloorDiv) if symbol in d.args[0].free_symbols and d.args[1].is_Integer}
    found = math.lcm(*divisors)
    return found if symbol in sizes and hint(sizes[symbol]) % found == 0 else 1


def unify_symbols(symbols: Sequence[sympy.Symbol], graph: fx.Graph) -> sympy.Symbol:
    """Guard that sizes, which have equal hints, are equal.

    Args:
        symbols: The symbols of the sizes.
        graph: The graph that they belong to.

    Returns:
        The symbol that stands for all of them from now on.
    """
    env = graph_fake_mode(graph).shape_env
    for other in symbols[1:]:
        equal = sympy.Eq(symbols[0], other)
        env.evaluate_expr(equal)
        if env.replace(symbols[0]) != env.replace(other):  # it follows from another guard, such as a + b == 2 a, from which no symbol was replaced
            env._maybe_guard_rel(equal)
    unified: sympy.Symbol = env.replace(symbols[0])
    return unified


def are_compared(a: sympy.Symbol, b: sympy.Symbol, graph: fx.Graph) -> bool:
    """Return whether a guard relates two symbols of a graph."""
    return any({a, b} <= g.expr.free_symbols for g in graph_fake_mode(graph).shape_env.guards)
