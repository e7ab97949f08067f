"""Estimate which share of a backward pass can run on selected rows, and the work that selecting and moving these rows takes.

`estimate_coverage` reads the joint graph, before partitioning; `planned_work` reads a partition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.reasons.rows import CROSS_SAMPLE
from approx_compile.rows.batch_dim import FORWARD, ROW_GRAD, BatchSize
from approx_compile.rows.batch_dim_analysis import analyze_batch_dim
from approx_compile.rows.row_cost import ProductWork, RowTraffic, RowWork, product_work, row_traffic
from approx_compile.rows.stages import (
    ALL_ROWS,
    PRODUCT_OPS,
    CoverageEstimate,
    PartitionState,
    Stage,
    assign_stages,
    flops_on_rows,
    output_layouts,
    stage_of_row_nodes,
    tangent_layouts,
)


def estimate_coverage(graph: fx.Graph, batch: BatchSize, default: int, levels: Mapping[str, int], approximate_batch_norm: bool) -> CoverageEstimate:
    """Estimate from the joint graph what `partition_backward` will find.

    Args:
        graph: The joint graph.
        batch: The batch's size.
        default: The level that begins at the output gradients, ALL_ROWS for none.
        levels: The levels that begin at products, by node name.
        approximate_batch_norm: Whether sums over the batch that go back to its rows will be approximated (see `batch_norm`).
    """
    tangents = [n for n in graph.nodes if _torch.is_tangent(n)]
    state = PartitionState(analyze_batch_dim(graph, batch, tangent_layouts(graph, output_layouts(graph, batch)), tangents))
    if approximate_batch_norm:  # the partition will try it, and may fail
        for n in [n for n, why in state.batch_dims.blocked.items() if CROSS_SAMPLE.explains(why)]:
            del state.batch_dims.blocked[n]
    assign_stages(graph, state, tangents, default, levels)
    total = sum(_torch.flops(n) for n in graph.nodes if n in state.stage)
    return CoverageEstimate(total, flops_on_rows(state), tuple(state.blocked.values()), _expected(graph, state))


def _row_products(state: PartitionState) -> tuple[ProductWork, ...]:
    return tuple(t for n, s in stage_of_row_nodes(state).items() if (t := product_work(n, s, state.batch_dims.batch)) is not None)


def _rows_at_hand(graph: fx.Graph, batch: BatchSize) -> int:
    sizes = (s for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor) for s in v.shape if _torch.size_expr(s) == batch.symbol)
    return _torch.hint(next(sizes, 1)) // batch.group


def _entering(state: PartitionState) -> tuple[RowTraffic, ...]:
    """The gradients by whose norms rows are selected."""
    known, gradients = state.batch_dims, dict[tuple[fx.Node, int], None]()
    for n, s in stage_of_row_nodes(state).items():
        gradients |= {(a, s): None for a in n.all_input_nodes if known.kind.get(a) == ROW_GRAD and state.stage.get(a, ALL_ROWS) < s}
    return tuple(m for a, s in gradients for m in row_traffic(a.meta.get("val"), known.layout_of(a), s))


def _put_back(graph: fx.Graph, state: PartitionState) -> tuple[RowTraffic, ...]:
    """The gradients of selected rows that must be put back among all rows: for the caller, or for blocked nodes."""
    known, on_rows = state.batch_dims, stage_of_row_nodes(state)
    blocked = [n for n, s in state.stage.items() if s == state.post]
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    wanted = dict.fromkeys(a for n in (*blocked, output) for a in n.all_input_nodes if a in on_rows and known.kind.get(a) == ROW_GRAD)
    return tuple(m for a in wanted for m in row_traffic(a.meta.get("val"), known.layout_of(a), on_rows[a]))


def _expected(graph: fx.Graph, state: PartitionState) -> RowWork:
    """The work as far as the joint graph shows it. Nothing is saved yet: every value of the forward pass that a product on rows reads counts as gathered."""
    known, read = state.batch_dims, dict[tuple[fx.Node, int], None]()
    for n, s in stage_of_row_nodes(state).items():
        if n.target in PRODUCT_OPS:
            read |= {(a, s): None for a in n.all_input_nodes if known.kind.get(a) == FORWARD}
    saved = tuple(m for a, s in read for m in row_traffic(a.meta.get("val"), known.layout_of(a), s))
    entering = _entering(state)
    return RowWork(_rows_at_hand(graph, known.batch), _row_products(state), entering, (*entering, *saved), _put_back(graph, state))


def planned_work(graph: fx.Graph, state: PartitionState, stages: Sequence[Stage]) -> RowWork:
    """Return the work of a partition: everything that its stages on selected rows read is gathered."""
    gathered = [
        m
        for stage in stages
        if stage.level != ALL_ROWS
        for e, n in zip(stage.entries, (n for n in stage.gm.graph.nodes if n.op == "placeholder"), strict=True)
        for m in row_traffic(n.meta.get("val"), e.layout, stage.level)
    ]
    return RowWork(_rows_at_hand(graph, state.batch_dims.batch), _row_products(state), _entering(state), tuple(gathered), _put_back(graph, state))
