"""Specialise a graph with symbolic sizes to one value of each symbol, by putting numbers in place of the symbols.

Code for known sizes is faster, because strides are constants and the compiler knows the bounds of loops. A transformer block on short sequences loses 4% of
its step's time if the batch's size is symbolic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import copy_of


def specialize_sizes(gm: fx.GraphModule, example_inputs: Sequence[Any], sizes: Mapping[sympy.Symbol, int]) -> tuple[fx.GraphModule, list[Any]] | None:
    """Return a copy of a graph for fixed sizes.

    Args:
        gm: The graph. It is not edited.
        example_inputs: Its fake inputs, with symbolic sizes.
        sizes: The value of each symbol.

    Returns:
        The copy, and inputs to compile it with. It takes the inputs of the original, including symbolic sizes, which it does not read. None where something
        would stay symbolic: a symbol that `sizes` lacks, or a graph inside the graph.
    """
    if any(n.op == "get_attr" and isinstance(getattr(gm, str(n.target), None), fx.GraphModule) for n in gm.graph.nodes):
        return None
    inputs = [_number(v, sizes) if isinstance(v, _torch.SYMBOLIC) else _fixed(v, sizes) if isinstance(v, Tensor) else v for v in example_inputs]
    numbers = {n.name: _number(v, sizes) for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), _torch.SYMBOLIC)}
    if any(v is None for v in inputs) or any(v is None for v in numbers.values()):
        return None
    new = copy_of(gm)
    for n in new.graph.nodes:
        n.args, n.kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: numbers.get(a.name, a))
    for n in reversed(list(new.graph.nodes)):
        if n.name in numbers and n.op != "placeholder":
            new.graph.erase_node(n)
    for n, value in zip(new.graph.find_nodes(op="placeholder"), inputs, strict=True):
        n.meta["val"] = value  # the compiler recomputes the values of the other nodes
    new.recompile()
    return new, inputs


def _number(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """The value of a symbolic number; None if a symbol is left in it."""
    if not isinstance(value, _torch.SYMBOLIC):
        return value
    number = _torch.size_expr(value).subs(sizes)
    if isinstance(value, torch.SymBool):
        return bool(number) if number in (sympy.true, sympy.false) else None
    return None if number.free_symbols else int(number) if isinstance(value, torch.SymInt) else float(number)


def _fixed(value: Tensor, sizes: Mapping[sympy.Symbol, int]) -> Tensor | None:
    """A tensor like a given one, usually fake and of the same fake mode, with fixed size, stride and offset; None if a symbol is left in them."""
    numbers = [_number(s, sizes) for s in (*value.shape, *value.stride(), value.storage_offset())]
    if any(n is None for n in numbers):
        return None
    size, stride, offset = numbers[: value.dim()], numbers[value.dim() : -1], numbers[-1]
    return _torch.fake_like(value, size, stride, offset)
