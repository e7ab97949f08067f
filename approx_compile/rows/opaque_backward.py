"""Represent a backward pass on rows as one op of a graph, for compiled autograd.

Compiled autograd does not call the backward pass that was compiled with a model. It copies the model's backward graph, which computes the exact gradients,
into a larger graph. This module replaces that backward graph by a single op that runs the `RowBackward`.
"""

from __future__ import annotations

import operator
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.rows.gather_rows import copy_keeping_strides, with_strides
from approx_compile.rows.nonlinear_below import first_nonlinear, is_nonlinear_below, note_hooks
from approx_compile.rows.row_backward import RowBackward

ROW_BACKWARD_ATTRIBUTE = "approx_compile_rows"
"""The attribute of a compiled backward pass that holds the `RowBackward` it calls."""


@dataclass(frozen=True)
class _Output:
    """One output of the op: the position `place` among the results of the backward pass, and the tensor's properties, with sizes as expressions."""

    place: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class _OpaqueBackward:
    """What the op needs to run. `symbols` says for each symbol which input holds its value, and in which dim (None for an input that is a number)."""

    backward: RowBackward
    symbols: Sequence[tuple[sympy.Symbol, int, int | None]]
    outputs: Sequence[_Output]

    def values(self, numbers: Sequence[Any], tensors: Sequence[Tensor]) -> dict[sympy.Symbol, Any]:
        """The values of the symbols in one call."""
        args = [*numbers, *tensors]
        return {s: _torch.size_at(args, i, d) for s, i, d in self.symbols}


_known: weakref.WeakValueDictionary[int, _OpaqueBackward] = weakref.WeakValueDictionary()
"""The backward passes by key. Keys are random numbers because they are constants in graphs, whose code is cached on disk for other processes."""

_library = torch.library.Library("approx_compile_rows", "FRAGMENT")
_library.define("backward(int key, SymInt[] numbers, Tensor[] tensors) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(key: int, numbers: list[int], tensors: list[Tensor]) -> list[Tensor]:
    op = _known[key]
    values = op.values(numbers, tensors)
    results = op.backward([*numbers, *tensors], keep=True)
    seen = {t.untyped_storage().data_ptr() for t in tensors}
    new = []
    for o in op.outputs:  # an op's outputs share no memory with each other, nor with its inputs
        value = with_strides(results[o.place], _numbers(o.stride, values))
        value = copy_keeping_strides(value) if value.untyped_storage().data_ptr() in seen else value
        seen.add(value.untyped_storage().data_ptr())
        new.append(value)
    return new


@torch.library.register_fake("approx_compile_rows::backward", lib=_library)  # type: ignore[untyped-decorator]
def _fake(key: int, numbers: list[Any], tensors: list[Tensor]) -> list[Tensor]:
    op = _known[key]
    values = op.values(numbers, tensors)
    return [torch.empty_strided(_numbers(o.size, values), _numbers(o.stride, values), dtype=o.dtype, device=o.device) for o in op.outputs]


def _numbers(expressions: Sequence[Any], values: Mapping[sympy.Symbol, Any]) -> list[Any]:
    return [_torch.evaluate_expr(e, values) for e in expressions]


def expose_to_compiled_autograd(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled model so that compiled autograd finds the op in place of its backward graph.

    The graph is replaced after the first call with gradients, when it can be reached from the outputs.

    Args:
        compiled: The compiled model.

    Returns:
        A function that calls it.
    """
    done = False

    def call(*args: Any) -> Any:
        nonlocal done
        out = compiled(*args)
        note_hooks(args, out)
        done = done or _show(out)
        return out

    return call


def _show(out: Any) -> bool:
    """Replace the backward graph that is reached from a model's outputs; return whether there was one that runs on rows."""
    for value in _torch.tree_leaves(out):
        for node in _torch.compiled_nodes(value) if isinstance(value, Tensor) else ():
            backward, gm = getattr(_torch.compiled_backward(node), ROW_BACKWARD_ATTRIBUTE, None), _torch.backward_graph(node)
            if backward is not None and gm is not None and not is_nonlinear_below(node):
                first_nonlinear(node)  # what is known of the graph is kept
                _replace(gm, backward)
                return True
    return False


def _replace(gm: fx.GraphModule, backward: RowBackward) -> None:
    """Replace the nodes of a backward graph by the op, unless its inputs are not symbolic sizes followed by tensors."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [n.meta.get("val") for n in placeholders]
    numbers = [n for n, v in zip(placeholders, values, strict=True) if isinstance(v, _torch.SYMBOLIC)]
    if [*numbers, *(n for n, v in zip(placeholders, values, strict=True) if isinstance(v, Tensor))] != placeholders:
        return  # the op takes sizes first and tensors after them, nothing else: the graph stays as it is
    graph = fx.Graph()
    new = {n: graph.placeholder(n.name) for n in placeholders}
    results = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    made = {r: i for i, r in enumerate(results) if isinstance(r, fx.Node) and r not in new}
    outputs = [
        _Output(i, tuple(map(_torch.size_expr, v.shape)), tuple(map(_torch.size_expr, v.stride())), v.dtype, v.device)
        for i, v in ((i, _torch.value(r)) for r, i in made.items())
    ]
    key = secrets.randbits(62)
    backward.as_one_op = _known[key] = _OpaqueBackward(backward, _torch.symbol_sources(values), outputs)
    tensors = [new[n] for n in placeholders if n not in numbers]
    op = graph.call_function(torch.ops.approx_compile_rows.backward.default, (key, [new[n] for n in numbers], tensors))
    for place, r in enumerate(made):
        new[r] = graph.call_function(operator.getitem, (op, place))
    graph.output(tuple(new[r] if isinstance(r, fx.Node) else r for r in results))
    gm.graph = graph
    gm.recompile()
