"""A graph with symbolic sizes -> the same graph for one size of each: numbers where the symbols were.

Code for sizes that are known is the faster one: strides are constants, and loops have ends that the compiler sees. A short sequence's transformer block
loses 4% of its step to the symbol of its batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from approx_compile import _torch


def specialize_sizes(gm: fx.GraphModule, example_inputs: Sequence[Any], sizes: Mapping[sympy.Symbol, int]) -> tuple[fx.GraphModule, list[Any]] | None:
    """A copy of the graph, and inputs like these to compile it with. It takes what the original takes, symbolic sizes included, but they are not read.
    None where something is left symbolic: a symbol that `sizes` does not have, or a graph inside the graph.
    """
    if any(n.op == "get_attr" and isinstance(getattr(gm, str(n.target), None), fx.GraphModule) for n in gm.graph.nodes):
        return None
    inputs = [_number(v, sizes) if isinstance(v, _torch.SYMBOLIC) else _fixed(v, sizes) if isinstance(v, Tensor) else v for v in example_inputs]
    numbers = {n.name: _number(v, sizes) for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), _torch.SYMBOLIC)}
    if any(v is None for v in inputs) or any(v is None for v in numbers.values()):
        return None
    new = copy.deepcopy(gm)
    for n in new.graph.nodes:
        n.args, n.kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: numbers.get(a.name, a))
    for n in reversed(list(new.graph.nodes)):
        if n.name in numbers and n.op != "placeholder":
            new.graph.erase_node(n)
    for n, value in zip(new.graph.find_nodes(op="placeholder"), inputs, strict=True):
        n.meta["val"] = value  # those of the other nodes are made anew by whoever compiles
    new.recompile()
    return new, inputs


def _number(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """The number that a symbolic size is; None if it is still none."""
    if not isinstance(value, _torch.SYMBOLIC):
        return value
    found = _torch.size_expr(value).subs(sizes)
    if isinstance(value, torch.SymBool):
        return bool(found) if found in (sympy.true, sympy.false) else None
    return None if found.free_symbols else int(found) if isinstance(value, torch.SymInt) else float(found)


def _fixed(value: Tensor, sizes: Mapping[sympy.Symbol, int]) -> Tensor | None:
    """A tensor of the same mode (fake, as a rule) and layout."""
    numbers = [_number(s, sizes) for s in (*value.shape, *value.stride(), value.storage_offset())]
    if any(n is None for n in numbers):
        return None
    size, stride, offset = numbers[: value.dim()], numbers[value.dim() : -1], numbers[-1]
    return _torch.fake_like(value, size, stride, offset)
