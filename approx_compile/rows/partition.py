"""Cut a backward graph into stages that run on fewer and fewer rows of the batch.

Stage 0 runs on all rows: the nodes above the first cut (a loss inside the graph), and what a subset of the rows cannot compute (random numbers). Stages 1,
2, .. each begin at a cut: rows are selected there by the norms of the gradients that enter, gathered and multiplied by their weights, and all nodes below
run on them. Blocked nodes (see `batch_dim_analysis`), and all that depend on them, run in a last stage on all rows again, in which the gradients of the
dropped rows are zero.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.rows.batch_dim import LOSS_GRAD, REDUCED_GRAD, ROW_GRAD, BatchSize, ValueLayout
from approx_compile.rows.batch_dim_analysis import analyze_batch_dim
from approx_compile.rows.batch_norm import decouple_batch_norm
from approx_compile.rows.batching_rules.indexing import index_position
from approx_compile.rows.coverage import planned_work
from approx_compile.rows.stages import (
    ALL_ROWS,
    PRODUCT_OPS,
    SAVED,
    BackwardOutput,
    CoverageEstimate,
    Partition,
    PartitionState,
    Stage,
    StageInput,
    assign_stages,
    flops_on_rows,
)

aten = torch.ops.aten


def partition_backward(
    gm: fx.GraphModule, batch: BatchSize, known: Mapping[str, ValueLayout], default: int, levels: Mapping[str, int], approximate_batch_norm: bool
) -> Partition:
    """Partition a backward graph.

    Args:
        gm: The backward graph. The approximation of BatchNorm edits it.
        batch: The batch's size.
        known: Layouts of placeholders by name, from the forward graph.
        default: The level that begins at the output gradients, ALL_ROWS for none.
        levels: The levels that begin at products, by node name.
        approximate_batch_norm: Whether to approximate sums over the batch that go back to its rows (see `batch_norm`).

    Returns:
        The stages, each with a graph of its own, in the order in which they run.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    tangents = [n for n in placeholders if _torch.is_tangent(n)]
    state = PartitionState(analyze_batch_dim(gm.graph, batch, known, tangents))
    if approximate_batch_norm and decouple_batch_norm(gm, state.batch_dims):
        state = PartitionState(analyze_batch_dim(gm.graph, batch, known, tangents))
    assign_stages(gm.graph, state, tangents, default, levels)
    members, wanted = _members(gm.graph, state)
    stages = []
    for s in sorted(members):
        level = ALL_ROWS if s == 0 or s == state.post else s
        stages.append(_stage(gm, state, s, level, members[s], [n for n in wanted.get(s, {}) if n in members[s]]))
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    results = [_result(o, state) for o in output.args[0]]
    total = sum(_torch.flops(n) for n in state.stage)
    levels_of = {n.name: s for n, s in state.stage.items() if n.target in PRODUCT_OPS and 0 < s != state.post}
    coverage = CoverageEstimate(total, flops_on_rows(state), tuple(state.blocked.values()), planned_work(gm.graph, state, stages))
    return Partition(batch, tuple(stages), tuple(results), coverage, levels_of)


def _members(graph: fx.Graph, state: PartitionState) -> tuple[dict[int, dict[fx.Node, None]], dict[int, dict[fx.Node, None]]]:
    """The nodes that each stage computes, and those of them that later stages or the caller read."""
    members: dict[int, dict[fx.Node, None]] = {}
    wanted: dict[int, dict[fx.Node, None]] = {}
    known = state.batch_dims

    def home(n: fx.Node, stage: int) -> int:
        """The stage that computes `n` for `stage`: its own stage for a gradient; else `stage` itself, or 0 if `n` takes the whole batch."""
        if n.op == "placeholder" or _is_symbol(n):
            return SAVED
        if n.target is operator.getitem and isinstance(n.args[0], fx.Node):
            return home(n.args[0], stage)
        if n in state.stage:
            return state.stage[n]
        if known.kind.get(n) == LOSS_GRAD or n in known.blocked or n in known.unlocated or n in known.whole_batch_only:
            return 0
        return stage

    todo: list[tuple[fx.Node, int]] = []

    def want(n: fx.Node, stage: int) -> None:
        source = home(n, stage)
        if source == SAVED:
            return
        if source != stage:
            wanted.setdefault(source, {}).setdefault(n)
        todo.append((n, source))

    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    for o in output.args[0]:  # type: ignore[union-attr]
        if isinstance(o, fx.Node):
            stage = home(o, 0)
            wanted.setdefault(max(stage, 0), {}).setdefault(o)
            want(o, max(stage, 0))
    while todo:
        n, stage = todo.pop()
        if n in members.setdefault(stage, {}):
            continue
        members[stage][n] = None
        for a in n.all_input_nodes:
            want(a, stage)
    order = {n: i for i, n in enumerate(graph.nodes)}
    return {s: dict.fromkeys(sorted(nodes, key=order.__getitem__)) for s, nodes in members.items()}, wanted


def _is_number(n: fx.Node) -> bool:
    return isinstance(n.meta.get("val"), _torch.SYMBOLIC)


def _is_symbol(n: fx.Node) -> bool:
    """Whether the node is a size that is exactly one symbol: every stage gets its value as an input."""
    return _is_number(n) and bool(_torch.size_expr(n.meta["val"]).is_Symbol)


def _stage(gm: fx.GraphModule, state: PartitionState, s: int, level: int, members: Mapping[fx.Node, None], outputs: Sequence[fx.Node]) -> Stage:
    """Build a stage with a graph of its own, in which symbolic sizes are the first placeholders, as in any backward graph."""
    known = state.batch_dims
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in outputs:
        if _is_expanded(n.meta.get("val")) and n not in state.dense:
            with _torch.fake_mode_of(n):
                state.dense[n] = torch.empty_like(n.meta["val"], memory_format=torch.contiguous_format)
    needed: dict[fx.Node, None] = {}
    for n in members:
        for a in n.all_input_nodes:
            if a not in members:
                needed.setdefault(a)
    entries = []
    for symbol, value in _missing_symbols(gm, members, needed).items():
        name = f"size_{symbol}"
        graph.placeholder(name).meta = {"val": value}
        entries.append(StageInput(name, SAVED, None, False, number=symbol))
    constants: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    whole = [(a, _number_dtype(n)) for n in members if level != ALL_ROWS and n in known.batch_size_factors for a in _torch.symbolic_scalar_arguments(n)]
    for a in sorted(needed, key=lambda a: not _is_number(a)):
        new = graph.placeholder(a.name)
        new.meta = dict(a.meta) | ({"val": state.dense[a]} if a in state.dense else {})
        env[a] = new
        entries.append(_stage_input(a, state))
    for a, dtype in dict.fromkeys(whole):  # the batch's size as a factor: passed as a tensor, so that it stays that of the whole batch
        name = f"{a.name}_whole_{str(dtype).removeprefix('torch.')}"
        new = constants[a, dtype] = graph.placeholder(name)
        new.meta = {"val": _torch.fake_scalar(a, dtype)}
        entries.append(StageInput(name, SAVED, None, False, number=_torch.size_expr(a.meta["val"]), dtype=dtype))
    for n in members:
        new = env[n] = graph.node_copy(n, env.__getitem__)
        if level != ALL_ROWS and n in known.batch_size_factors:
            dtype = _number_dtype(n)
            new.args = tuple(constants.get((o, dtype), m) if isinstance(o, fx.Node) else m for o, m in zip(n.args, new.args, strict=True))
        if level != ALL_ROWS and n in known.indexed_by_sample:
            _renumber_samples(new, *known.indexed_by_sample[n])
    for n in outputs:
        if n in state.dense:  # rows of an expanded tensor share memory; weights need memory for each row
            env[n] = graph.call_function(aten.clone.default, (env[n],), {"memory_format": torch.contiguous_format})
            env[n].meta["val"] = state.dense[n]
    out = graph.output(tuple(env[n] for n in outputs))
    out.meta["user_visible_output_idxs"] = list(range(len(outputs)))  # the next stage relies on the strides
    graph.eliminate_dead_code()
    graph.lint()
    return Stage(level, tuple(entries), tuple(n.name for n in outputs), fx.GraphModule(gm, graph))


def _renumber_samples(n: fx.Node, dim: int, place: int) -> None:
    """Replace the sample indices of x[arange(batch), i] by 0, 1, .. of the rows present: index `dim` of the op, which has the batch in its dim `place`."""
    graph, x, position = n.graph, n.args[0], index_position(n)
    indices: list[Any] = list(n.args[position])  # type: ignore[arg-type]
    number = _torch.value(indices[dim])

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta["val"] = target(*fx.map_arg(args, lambda a: a.meta["val"]), **kwargs)
        return new

    with graph.inserting_before(n), _torch.fake_mode_of(n):
        size = emit(aten.sym_size.int, x, dim)
        counted = emit(torch.ops.prims.iota.default, size, start=0, step=1, dtype=number.dtype, device=number.device, requires_grad=False)
        indices[dim] = emit(aten.reshape.default, counted, [size if d == place else 1 for d in range(number.dim())])
    n.update_arg(position, indices)


def _missing_symbols(gm: fx.GraphModule, members: Iterable[fx.Node], needed: Iterable[fx.Node]) -> dict[sympy.Symbol, Any]:
    """The symbols that occur in the stage's sizes without being inputs by themselves.

    Inductor has to find each (a tensor's size may be 5 s, or s - 1), and its cache, which looks at no tensors, checks among the inputs what was assumed of a
    symbol.
    """
    inputs = [n.meta["val"] for n in needed]
    used = {s for v in (*inputs, *(n.meta.get("val") for n in members)) for e in _symbolic_numbers(v) for s in _torch.size_expr(e).free_symbols}
    given_alone = {_torch.size_expr(v) for v in inputs if isinstance(v, torch.SymInt)}
    given = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    known = {s: _torch.size_at(given, i, d) for s, i, d in _torch.symbol_sources(given)}
    return {s: known[s] for s in sorted(used - given_alone, key=str) if s in known}


def _symbolic_numbers(value: Any) -> list[Any]:
    """All symbolic numbers in a value."""
    if isinstance(value, torch.Tensor):
        return [*value.shape, *value.stride(), value.storage_offset()]
    return [value] if isinstance(value, _torch.SYMBOLIC) else []


def _stage_input(a: fx.Node, state: PartitionState) -> StageInput:
    if _is_number(a):
        return StageInput(a.name, SAVED, None, False, number=_torch.size_expr(a.meta["val"]))
    known, value = state.batch_dims, state.dense.get(a, _torch.value(a))
    source = SAVED if a.op == "placeholder" else state.stage.get(a, 0)
    layout = known.layout_of(a)
    return StageInput(a.name, source, layout, known.kind.get(a) == ROW_GRAD, *_expressions(value))


def _expressions(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if not isinstance(value, torch.Tensor):
        return (), ()
    return tuple(map(_torch.size_expr, value.shape)), tuple(map(_torch.size_expr, value.stride()))


def _is_expanded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(
        _torch.known_equal(t, 0) and not _torch.known_equal(s, 1) for s, t in zip(value.shape, value.stride(), strict=True)
    )


def _number_dtype(n: fx.Node) -> torch.dtype:
    """The dtype in which a number is passed: beside a tensor with dims float64 acts as a Python number; beside a scalar it would change the result's dtype."""
    value = _torch.value(n)
    return value.dtype if value.dim() == 0 else torch.float64


def _result(o: Any, state: PartitionState) -> BackwardOutput:
    if not isinstance(o, fx.Node):
        return BackwardOutput(None, SAVED, None, constant=o)
    if o.op == "placeholder":
        return BackwardOutput(o.name, SAVED, None)
    source = state.stage.get(o, 0)
    on_rows = 0 < source != state.post and state.batch_dims.kind[o] == ROW_GRAD
    layout, summed = state.batch_dims.layout_of(o) if on_rows else None, state.batch_dims.kind.get(o) == REDUCED_GRAD
    return BackwardOutput(o.name, source, layout, _expressions(_torch.value(o))[0], summed=summed)
