"""Which ops of a backward graph keep tokens apart, and where their results hold them: the batching rules of rows, applied for every factor of the axis.

An op is allowed only if it is known here how its operands of the forward pass meet the gradient: entry by entry (broadcast), or along the axis that a matrix
product sums over. Everything else ends a region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import MM, PERMUTES, VIEWS, op_name
from approx_compile.reasons.rows import BATCH_ELSEWHERE, BATCH_MEAN, NOT_LINEAR, PART_OF_BATCH, TOKENS_MIXED, UNKNOWN_OP
from approx_compile.rows.batch_dim import BatchDimState, Blocked, SampleLayout
from approx_compile.rows.batching_rules.registry import rule_of
from approx_compile.rows.linearity import is_linear
from approx_compile.rows.tokens.token_axis import Factor, TokenLayout, fits, view_layout

aten = torch.ops.aten
prims = torch.ops.prims

SIZED_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
REARRANGING = VIEWS | PERMUTES | {aten.clone.default}
"""Ops with the same entries in their results as in their operands: a region's entering gradient is what lies above them."""
_PARTS = {aten.slice.Tensor, aten.select.int}
_ALONE = {aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default}
_ALONE |= {aten.expand.default, aten.cat.default, aten.constant_pad_nd.default, *_PARTS}
"""Ops that read gradients only."""
_ENTRYWISE = {prims.convert_element_type.default, aten._to_copy.default}
_ENTRYWISE_NAMES = {"_softmax_backward_data", "_log_softmax_backward_data"}
"""Ops that combine entries of the gradient with the same entries of tensors of the forward pass, beside those that torch tags as pointwise."""


@dataclass(frozen=True)
class Read:
    """How a member of a region reads a tensor of the forward pass: the tokens of it at a layout.

    `sizes` are given where the tensor holds only some factors, such as a mask for each sample: it is expanded to these sizes before.
    """

    layout: TokenLayout
    sizes: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Placement:
    """What the rules say of a node: its layout (None: a sum over all tokens), and how it reads its operands of the forward pass."""

    layout: TokenLayout | None
    reads: Mapping[fx.Node, Read]


def place(n: fx.Node, factors: tuple[Any, ...], layouts: Mapping[fx.Node, TokenLayout], gradients: set[fx.Node]) -> Placement:
    """Apply the batching rules to a node.

    Args:
        n: The node.
        factors: The factors of the token axis.
        layouts: The layouts of the gradients that it reads, all of which hold tokens.
        gradients: All gradients of the graph.

    Raises:
        Blocked: The node mixes tokens, or that is not known, or it is not linear in the gradients.
        Refined: A view splits a factor.
    """
    operands = [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor | tuple | list)]
    mine = {a for a in operands if a in gradients}
    if _torch.is_random(n) or not is_linear(n, mine):
        raise Blocked(NOT_LINEAR(op=op_name(n)))
    value = _torch.value(n)
    if n.target in SIZED_VIEWS:
        (a,) = operands
        return Placement(view_layout(layouts[a], factors, _torch.value(a).shape, value.shape), {})
    forward = [a for a in operands if a not in gradients]
    if not forward and n.target not in _ALONE | REARRANGING | _ENTRYWISE and not _torch.is_pointwise(n):
        raise Blocked(UNKNOWN_OP(op=op_name(n)))
    reads = _reads(n, value, factors, layouts, forward, mine)
    rule = rule_of(n)
    if rule is None:
        raise Blocked(UNKNOWN_OP(op=op_name(n)))
    found: list[SampleLayout | None] = []
    for i, f in enumerate(factors):
        state = BatchDimState(Factor(f))
        state.layout.update({a: layouts[a][i] for a in mine} | {a: r.layout[i] for a, r in reads.items() if r.sizes is None})
        p = rule(n, value, state)
        assert not isinstance(p, tuple)  # no op with several results is among those allowed
        found.append(p)
    layout = _together(n, found, factors, value)
    if n.target in _PARTS and any(_cuts(n, p) for p in layout or ()):
        raise Blocked(PART_OF_BATCH())
    if layout is None and n.target is aten.mean.dim:
        raise Blocked(BATCH_MEAN())
    return Placement(layout, reads)


def _together(n: fx.Node, found: list[SampleLayout | None], factors: tuple[Any, ...], value: Any) -> TokenLayout | None:
    """The layout of all factors; None where all of them are summed over."""
    layout = tuple(p.at_dim(p.dim) for p in found if p is not None)
    if not layout:
        return None
    if len(layout) < len(factors) or not isinstance(value, torch.Tensor) or not fits(layout, factors, value.shape):
        raise Blocked(TOKENS_MIXED(op=op_name(n)))
    return layout


def _cuts(n: fx.Node, p: SampleLayout) -> bool:
    """Whether a slice or a part is taken along the dim of a factor, rather than the whole of it."""
    before, after = _torch.value(n.args[0]), n.meta["val"]
    return before.dim() == after.dim() and not _torch.known_equal(before.shape[p.dim], after.shape[p.dim])


def _reads(
    n: fx.Node, value: Any, factors: tuple[Any, ...], layouts: Mapping[fx.Node, TokenLayout], forward: list[fx.Node], mine: set[fx.Node]
) -> dict[fx.Node, Read]:
    """How a node reads its operands of the forward pass."""
    if not forward:
        return {}
    if n.target in MM and len(n.args) == 2:
        return _reads_of_product(n, factors, layouts)
    entrywise = _torch.is_pointwise(n) or n.target in _ENTRYWISE or op_name(n) in _ENTRYWISE_NAMES
    if not entrywise or not isinstance(value, torch.Tensor):
        raise Blocked(UNKNOWN_OP(op=op_name(n)))
    rank = value.dim()
    in_result = {tuple(p.at_dim(p.dim + rank - _torch.value(a).dim()) for p in layouts[a]) for a in mine}
    if len(in_result) != 1:
        raise Blocked(BATCH_ELSEWHERE())
    (layout,) = in_result
    return {a: r for a in forward if (r := read_broadcast(_torch.value(a).shape, layout, factors, value.shape)) is not None}


def read_broadcast(sizes: Any, layout: TokenLayout, factors: tuple[Any, ...], result: Any) -> Read | None:
    """How an entrywise op reads an operand that is broadcast to a result with a layout; None if it holds no tokens."""
    shift = len(result) - len(sizes)
    held = [p.dim >= shift and not _torch.known_equal(sizes[p.dim - shift], 1) for p in layout]
    if not any(held):
        return None
    if all(held):
        own = tuple(p.at_dim(p.dim - shift) for p in layout)
        if not fits(own, factors, sizes):
            raise Blocked(BATCH_ELSEWHERE())
        return Read(own)
    dims = {p.dim for p in layout}
    return Read(layout, tuple(_torch.size_expr(result[d] if d in dims else sizes[d - shift] if d >= shift else 1) for d in range(len(result))))


def _reads_of_product(n: fx.Node, factors: tuple[Any, ...], layouts: Mapping[fx.Node, TokenLayout]) -> dict[fx.Node, Read]:
    """A product that sums over the tokens of a gradient reads the same tokens of its other operand."""
    left, right = n.args
    if left in layouts and right in layouts:
        raise Blocked(NOT_LINEAR(op=op_name(n)))
    of_left = left in layouts
    gradient, other = (left, right) if of_left else (right, left)
    contracted, theirs = (1, 0) if of_left else (0, 1)
    dims = {p.dim for p in layouts[gradient]}  # type: ignore[index]
    if dims == {1 - contracted}:
        return {}
    own = tuple(p.at_dim(theirs) for p in layouts[gradient])  # type: ignore[index]
    if dims != {contracted} or not fits(own, factors, _torch.value(other).shape):
        raise Blocked(TOKENS_MIXED(op=op_name(n)))
    return {other: Read(own)}  # type: ignore[dict-item]


def above(n: fx.Node, layout: TokenLayout, factors: tuple[Any, ...]) -> tuple[fx.Node, TokenLayout] | None:
    """Return what a rearranging op reads, and its layout, given the layout of the result; None for any other op."""
    if n.target not in REARRANGING or n.op != "call_function":
        return None
    a = n.args[0]
    assert isinstance(a, fx.Node)
    if n.target in SIZED_VIEWS:
        return a, view_layout(layout, factors, _torch.value(n).shape, _torch.value(a).shape)
    if n.target not in PERMUTES:
        return a, layout
    rank = _torch.value(a).dim()
    from_dim = _permutation(n, rank)
    return a, tuple(p.at_dim(from_dim[p.dim]) for p in layout)


def _permutation(n: fx.Node, rank: int) -> list[int]:
    """For every dim of a permuted tensor, the dim that it was."""
    if n.target is aten.permute.default:
        return [int(d) % rank for d in n.args[1]]  # type: ignore[union-attr,arg-type]
    dims = list(range(rank))
    i, j = (int(d) % rank for d in n.args[1:3]) if n.target is aten.transpose.int else (0, rank - 1)  # type: ignore[arg-type]
    dims[i], dims[j] = dims[j], dims[i]
    return dims
