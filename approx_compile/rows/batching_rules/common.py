"""The type of a batching rule, and what rules of several families share.

A rule gets a node, the node's value and the state of the analysis. It returns the layout of the result, or raises `Blocked` with the reason why the op may
not run on a subset of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import op_name
from approx_compile.reasons.rows import ALONG_BATCH, BATCH_ELSEWHERE, NOT_FIRST_AXIS
from approx_compile.rows.batch_dim import BatchDimState, Blocked, SampleLayout, ValueLayout, holds_batch

Rule = Callable[[fx.Node, Any, BatchDimState], ValueLayout]


def common_layout(*layouts: SampleLayout | None) -> SampleLayout | None:
    """Return the one layout of all operands that hold samples; None if no operand does.

    Args:
        layouts: The operands' layouts, with dims counted in the result.

    Raises:
        Blocked: Two operands hold the samples at different positions. A uniform operand fits every position within its dim.
    """
    common: SampleLayout | None = None
    for layout in layouts:
        if layout is None:
            continue
        if common is None or (common.uniform and layout.dim == common.dim):
            common = layout
        elif layout.dim != common.dim or not (layout.uniform or layout == common):
            raise Blocked(BATCH_ELSEWHERE())
    return common


def broadcast_layout(operand: Any, rank: int, state: BatchDimState) -> SampleLayout | None:
    """Return an operand's layout, with its dim counted in a result of `rank` dims that the operand is broadcast to; None without samples."""
    layout = state.layout_of(operand)
    return layout.at_dim(layout.dim + rank - _torch.value(operand).dim()) if layout is not None else None


def same_as_operand(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to ops whose result has the shape of the first operand."""
    return state.layout_of(n.args[0])


def along_dim(position: int) -> Rule:
    """Make the rule of ops that combine all entries along some dims, such as softmax and cumsum: these dims must not hold the batch.

    Args:
        position: The position among the op's arguments of the dim, or of the list of dims.
    """

    def rule(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
        rank = _torch.value(n.args[0]).dim()
        dim = n.args[position] if len(n.args) > position else n.kwargs.get("dim", -1)
        layout = common_layout(*(state.layout_of(a) for a in n.all_input_nodes))
        dims = dim if isinstance(dim, list | tuple) else [dim]
        if layout is not None and any(int(d) % rank == layout.dim for d in dims):  # type: ignore[arg-type]
            raise Blocked(ALONG_BATCH(op=op_name(n)))
        return layout

    return rule


def batch_first(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to ops that treat dim 0 as the batch, one problem for each of its entries: every operand holds the samples there, or none.

    A sample may have several entries, such as its frames.
    """
    layout = common_layout(*(state.layout_of(a) for a in n.all_input_nodes))
    if layout is None or layout.dim != 0:
        raise Blocked(NOT_FIRST_AXIS(op=op_name(n)))
    if isinstance(value, tuple | list):
        return tuple(layout if holds_batch(v, state.batch) else None for v in value)
    return layout
