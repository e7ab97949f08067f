"""Batching rules of elementwise ops and of reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.rows.batch_dim import BatchDimState, ValueLayout
from approx_compile.rows.batching_rules.common import broadcast_layout, common_layout

aten = torch.ops.aten


def pointwise(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to elementwise ops: operands are broadcast, and all that hold samples must hold them at the same position."""
    rank = len(value[0].shape if isinstance(value, tuple | list) else value.shape)
    return common_layout(*(broadcast_layout(a, rank, state) for a in n.all_input_nodes))


def copy(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to `copy`, whose result is its second argument, broadcast to the shape of the first, whose values are not read."""
    return broadcast_layout(n.args[1], value.dim(), state)


def reduction(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to reductions. The result of a reduction over the batch holds no samples; `batch_dim_analysis` checks whether it is allowed."""
    layout = state.layout_of(n.args[0])
    rank = _torch.value(n.args[0]).dim()
    dim = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    dims = range(rank) if dim is None or dim == [] else dim if isinstance(dim, list | tuple) else [dim]
    reduced = {int(d) % rank for d in dims} if rank else set()  # type: ignore[arg-type]
    if layout is None or layout.dim in reduced:
        return None
    keep = (n.args[2] if len(n.args) > 2 else n.kwargs.get("keepdim", False)) if n.target not in (aten.sum.default, aten.mean.default) else False
    return layout if keep else layout.at_dim(layout.dim - sum(d < layout.dim for d in reduced))
