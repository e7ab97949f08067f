"""The stages of a backward graph: the data classes of its partition, and the assignment of every gradient node to a stage.

Level 0 keeps all rows; levels 1, 2, .. keep fewer and fewer. A cut is the point where a level begins: rows are selected by the norms of the gradients that
enter there. Below the last level comes a stage that runs on all rows again: the blocked nodes and all that depend on them. Where blocked nodes are near the
outputs, they and all above them are part of level 0 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import BMM, CONV, MM, PERMUTES, VIEWS, is_zero
from approx_compile.passes.rewrite.custom_ops import CUSTOM_CONV, CUSTOM_MM
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import ROWS_END_ABOVE
from approx_compile.reasons.rows import FEW_FLOPS_ON_ROWS, NO_ROW_PRODUCT
from approx_compile.rows.batch_dim import REDUCED_GRAD, ROW_GRAD, BatchDimState, BatchSize, SampleLayout, ValueLayout
from approx_compile.rows.batch_dim_analysis import analyze_batch_dim
from approx_compile.rows.row_cost import RowWork
from approx_compile.rows.source_place import source_place

aten = torch.ops.aten

PRODUCT_OPS = MM | BMM | CONV | CUSTOM_MM | CUSTOM_CONV | {aten.convolution_backward.default}
"""Ops at which a level may begin."""

ALL_ROWS = 0
"""The level that keeps all rows; 1, 2, .. keep fewer."""

EXCLUDED = -1
"""Stands for the level of a product that a rule keeps exact. Unlike `ALL_ROWS`, which only says that no selection begins at a product, all gradients that it is
computed from keep all rows, too."""


@dataclass(frozen=True)
class StageInput:
    """A value that a stage reads from outside."""

    name: str
    source: int
    """The stage that computes it, or SAVED."""
    layout: SampleLayout | None
    gradient: bool
    """Whether it is a gradient with rows: these are multiplied by their weights at the cut."""
    size: tuple[Any, ...] = ()
    stride: tuple[Any, ...] = ()
    """Size and stride as expressions in the symbols, the batch's among them."""
    number: Any = None
    """For a symbolic size: its expression. It is passed as a number; with a `dtype` as a scalar tensor that keeps the value for the whole batch."""
    dtype: torch.dtype | None = None


SAVED = -1


@dataclass(frozen=True)
class Stage:
    """One piece of the backward graph, compiled on its own: `entries` in the order of its placeholders, `outputs` by name.

    `level` is ALL_ROWS or the number of the cut that it begins at.
    """

    level: int
    entries: tuple[StageInput, ...]
    outputs: tuple[str, ...]
    gm: fx.GraphModule


@dataclass(frozen=True)
class BackwardOutput:
    """One output of the backward graph: a value of a stage, and its layout if its rows must be put back among all rows.

    With `name` None the output is `constant`.
    """

    name: str | None
    source: int
    layout: SampleLayout | None
    size: tuple[Any, ...] = ()
    constant: Any = None
    summed: bool = False
    """Whether it is a gradient summed over the samples, as those of parameters are."""


@dataclass(frozen=True)
class CoverageEstimate:
    """How many of the FLOPs of a backward pass's gradients can run on selected rows, and the reasons why the rest cannot."""

    flops_all: int
    flops_on_rows: int
    blocked: tuple[Reason, ...]
    work: RowWork
    """The work of running on rows: an estimate if it comes from the joint graph, exact if it comes from the partition."""

    def rejection_reason(self, least_share: float) -> Reason | None:
        """Return why running on rows is not worth it, or None if at least `least_share` of the FLOPs can run on them."""
        if not self.flops_on_rows:
            return join(self.blocked) if self.blocked else NO_ROW_PRODUCT()
        share = self.flops_on_rows / self.flops_all
        if share >= least_share:
            return None
        few = FEW_FLOPS_ON_ROWS(share=share)
        return join((few, join(self.blocked)), ": ") if self.blocked else few


@dataclass(frozen=True)
class Partition:
    """A backward graph as stages in order, and its outputs."""

    batch: BatchSize
    stages: tuple[Stage, ...]
    results: tuple[BackwardOutput, ...]
    coverage: CoverageEstimate
    products: Mapping[str, int]
    """The level of every product that runs on selected rows, by node name."""


@dataclass
class PartitionState:
    """What is known while a graph is partitioned."""

    batch_dims: BatchDimState
    stage: dict[fx.Node, int] = field(default_factory=dict)
    """The stage of every node that is computed from the output gradients."""
    post: int = 0
    """The stage of what is blocked, one more than the last level."""
    blocked: dict[Reason, Reason] = field(default_factory=dict)
    """The reasons why rows end, each with the place of the first op that it concerns."""
    dense: dict[fx.Node, Any] = field(default_factory=dict)
    """Values passed between stages in which several entries share memory: fake contiguous tensors in their place."""

    def add_blocked(self, n: fx.Node, reason: Reason) -> None:
        """Note the reason why rows end at a node, unless the same reason is known from another node."""
        if reason not in self.blocked:
            self.blocked[reason] = reason.at(source_place(n))


def output_layouts(graph: fx.Graph, batch: BatchSize) -> dict[str, ValueLayout]:
    """Return the layouts of a forward graph's outputs by name (a saved tensor has that name in the backward graph, too) and by description."""
    batch_dims = analyze_batch_dim(graph, batch)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    named = {n.name: n for n in output.all_input_nodes} | _torch.outputs_by_description(output)
    return {name: batch_dims.layout[n] for name, n in named.items() if n not in batch_dims.unlocated and isinstance(n.meta.get("val"), torch.Tensor)}


def zero_outputs(graph: fx.Graph) -> set[str]:
    """Return the names of the outputs of a forward graph that are tensors of zeros."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return {n.name for n in output.all_input_nodes if is_zero(n)}


def tangent_layouts(graph: fx.Graph, known: Mapping[str, ValueLayout]) -> dict[str, ValueLayout]:
    """Return the layouts of the output gradients, which are those of the outputs."""
    return {n.name: known[d] for n in graph.nodes if n.op == "placeholder" and (d := _torch.tangent_output_description(n) or "") in known}


def stage_of_row_nodes(state: PartitionState) -> dict[fx.Node, int]:
    """Return the level of every node that runs on selected rows."""
    return {n: s for n, s in state.stage.items() if 0 < s != state.post}


def flops_on_rows(state: PartitionState) -> int:
    """Return the FLOPs of the nodes that read gradients by sample and run on selected rows. What reads only sums over samples does not get less by it."""
    return sum(flops_of_rows(n, state.batch_dims) for n in stage_of_row_nodes(state))


def flops_of_rows(n: fx.Node, known: BatchDimState) -> int:
    """Return the FLOPs of a node, 0 for one that reads no gradient by sample."""
    return _torch.flops(n) if any(known.kind.get(a) == ROW_GRAD for a in n.all_input_nodes) else 0


def assign_stages(graph: fx.Graph, state: PartitionState, tangents: Sequence[fx.Node], default: int, levels: Mapping[str, int]) -> None:
    """Set the stage of every node that is computed from the output gradients.

    Args:
        graph: The joint or the backward graph.
        state: The state to fill in; it holds the analysis of the graph.
        tangents: The placeholders that are output gradients.
        default: The level that begins at the tangents, ALL_ROWS for none.
        levels: The levels that begin at products, by node name.
    """
    known = state.batch_dims
    by_rows = {t for t in tangents if known.kind.get(t) == ROW_GRAD and t not in known.unlocated}
    start = ALL_ROWS if any(levels.get(n.name, default) <= ALL_ROWS for n in _first_products(by_rows)) else default
    excluded = {n for n in graph.nodes if levels.get(n.name) == EXCLUDED and known.kind.get(n) in (ROW_GRAD, REDUCED_GRAD)}
    exact = _with_all_above(excluded | set(known.nonlinear), graph, known)
    post = max([default, *levels.values()]) + 1

    beginning = {n: levels.get(n.name, default) for n in graph.nodes if n.op == "call_function"} | dict.fromkeys(by_rows, start)
    found = _assign(graph, known, beginning, post, exact)
    if kept := _blocked_above_rows(known, found):
        above = _with_all_above(kept, graph, known)
        other = _assign(graph, known, beginning | dict.fromkeys(above & by_rows, ALL_ROWS), post, exact | above, above)
        found = max(found, other, key=lambda assignment: assignment.flops_on_rows(known))
    state.stage, state.post = found.stage, post
    for n, reason in found.ends:
        state.add_blocked(n, reason)


@dataclass
class _Assignment:
    """The stage of every gradient node, the last of them being `post`, and the nodes at which rows end or above which they cannot begin, with the reasons."""

    post: int
    stage: dict[fx.Node, int] = field(default_factory=dict)
    ends: list[tuple[fx.Node, Reason]] = field(default_factory=list)

    def flops_on_rows(self, known: BatchDimState) -> int:
        return sum(flops_of_rows(n, known) for n, s in self.stage.items() if ALL_ROWS < s < self.post)


def _assign(
    graph: fx.Graph, known: BatchDimState, beginning: Mapping[fx.Node, int], post: int, exact: Collection[fx.Node], above: Set[fx.Node] = frozenset()
) -> _Assignment:
    """Assign the gradient nodes to stages.

    Args:
        graph: The joint or the backward graph.
        known: The analysis of the graph.
        beginning: The level that begins at a product, or is that of an output gradient.
        post: The stage of blocked nodes below a cut.
        exact: The nodes that keep all rows.
        above: Those of them that keep all rows so that rows can begin below blocked nodes. No level begins at a sum over the rows of such a gradient.
    """
    found, above = _Assignment(post), set(above)
    for n in graph.nodes:
        if n.op != "call_function" or known.kind.get(n) not in (ROW_GRAD, REDUCED_GRAD):
            continue
        gradients = [a for a in n.all_input_nodes if known.kind.get(a) in (ROW_GRAD, REDUCED_GRAD)]
        stage = max([ALL_ROWS, *(found.stage.get(a, beginning.get(a, ALL_ROWS) if a.op == "placeholder" else ALL_ROWS) for a in gradients)])
        if n in exact:
            stage = ALL_ROWS
            if (why := known.nonlinear.get(n) or (known.blocked.get(n) if n in above else None)) is not None:
                found.ends.append((n, ROWS_END_ABOVE(why=why)))
        elif n.target in PRODUCT_OPS or "attention" in str(n.target):
            level = max(stage, beginning[n])
            if level != ALL_ROWS and stage == ALL_ROWS and n in known.blocked:  # a loss that compares samples: rows begin below it
                found.ends.append((n, ROWS_END_ABOVE(why=known.blocked[n])))
            elif stage != ALL_ROWS or above.isdisjoint(gradients):
                stage = level
        elif n.target in VIEWS | PERMUTES and not above.isdisjoint(gradients):
            above.add(n)  # a weight gradient reads it transposed
        elif gradients == [] and known.kind.get(n) == ROW_GRAD:
            stage = ALL_ROWS  # the loss is inside the graph, and its gradient is expanded to the rows here
        if stage not in (ALL_ROWS, post) and n in known.blocked:
            found.ends.append((n, known.blocked[n]))
            stage = post
        found.stage[n] = stage
    return found


def _blocked_above_rows(known: BatchDimState, found: _Assignment) -> set[fx.Node]:
    """Return the blocked nodes that should keep all rows, with all that they are computed from, so that rows begin below them.

    Rows that begin at the output gradients end at the first blocked node. Where that is near the outputs, such as BatchNorm in a head or a loss that compares
    samples, much more can run on rows below it. Of the blocked nodes b_0, b_1, .. in graph order the first p keep all rows, for the p with the most FLOPs on
    rows: the products that are neither above one of b_0 .. b_(p-1) nor below one of the others.
    """
    blocked = [n for n, stage in found.stage.items() if stage == found.post and n in known.blocked]
    return set(blocked[: most_between([*found.stage], blocked, _torch.flops)[0]])


def most_between(nodes: Sequence[fx.Node], marked: Sequence[fx.Node], weight: Callable[[fx.Node], int]) -> tuple[int, int]:
    """Find where to divide marked nodes of a graph so that the most weight lies behind the first of them and before the others.

    Args:
        nodes: The nodes that count, in graph order.
        marked: Some of them, in graph order.
        weight: The weight of a node.

    Returns:
        p and a weight: that of the nodes which none of the first p marked nodes is computed from and which are computed from none of the others. p is the
        least number with the most weight.
    """
    number = {n: i for i, n in enumerate(marked)}
    last_above: dict[fx.Node, int] = {}
    for n in nodes:
        last_above[n] = max([number.get(n, -1), *(last_above[a] for a in n.all_input_nodes if a in last_above)])
    first_below: dict[fx.Node, int] = {}
    for n in reversed(nodes):
        first_below[n] = min([number.get(n, len(marked)), *(first_below[u] for u in n.users if u in first_below)])
    weights, between = {n: weight(n) for n in nodes}, [0] * (len(marked) + 1)
    for n in nodes:
        for p in range(last_above[n] + 1, first_below[n] + 1):
            between[p] += weights[n]
    best = max(range(len(between)), key=between.__getitem__)
    return best, between[best]


def _with_all_above(nodes: Iterable[fx.Node], graph: fx.Graph, known: BatchDimState) -> set[fx.Node]:
    """Nodes that must be computed from all rows, and all gradients that they are computed from.

    These are nodes that a rule excludes, and those that are not linear: the expectation of a nonlinear function over random rows is not the function of the
    expectation. Below them rows may be selected as at an output gradient.
    """
    exact = set(nodes)
    for n in reversed(graph.nodes):
        if n in exact:
            exact.update(a for a in n.all_input_nodes if known.kind.get(a) in (ROW_GRAD, REDUCED_GRAD))
    return exact


def _first_products(tangents: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The products that output gradients reach through no other product: if one of them is to keep all rows, the cut is below it."""
    seen: set[fx.Node] = set()
    todo = list(tangents)
    while todo:
        n = todo.pop()
        for u in n.users:
            if u.op == "call_function" and u not in seen:
                seen.add(u)
                if u.target in PRODUCT_OPS:
                    yield u
                else:
                    todo.append(u)
