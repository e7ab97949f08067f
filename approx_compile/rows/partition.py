"""A backward graph split into stages that run on fewer and fewer rows of the batch.

Stage 0 runs on all rows: what lies above the first cut (a loss inside the graph), and what no subset of rows can give (random numbers). Stages 1, 2,
.. begin at a cut each: rows are chosen there by the norms of the gradients that enter, gathered and scaled, and everything behind runs on them.
What is blocked (`rows`), and all behind it, runs on all rows again in a last stage, the dropped rows' gradients being zero.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import BMM, CONV, MM
from approx_compile.passes.rewrite.custom_ops import CUSTOM_CONV, CUSTOM_MM
from approx_compile.rows.batch_dim import CROSS_SAMPLE, FORWARD, LOSS_GRAD, REDUCED_GRAD, ROW_GRAD, BatchDimState, SampleLayout, ValueLayout
from approx_compile.rows.batch_dim_analysis import analyze_batch_dim
from approx_compile.rows.batch_norm import decouple_batch_norm
from approx_compile.rows.reasons import describe_reason
from approx_compile.rows.row_cost import ProductWork, RowTraffic, RowWork, product_work, row_traffic

aten = torch.ops.aten

HEAVY = MM | BMM | CONV | CUSTOM_MM | CUSTOM_CONV | {aten.convolution_backward.default}
ALL = 0
"""The level of work that keeps all rows; 1, 2, .. keep fewer."""


@dataclass(frozen=True)
class StageInput:
    """A value that comes into a stage. `source`: the stage that made it, or SAVED. `layout`: where its rows are; `gradient`: they are scaled at the
    cut. `size`, `stride`: expressions that hold the batch's symbol."""

    name: str
    source: int
    layout: SampleLayout | None
    gradient: bool
    size: tuple[Any, ...] = ()
    stride: tuple[Any, ...] = ()
    number: Any = None
    """The expression of a symbolic size, which has no tensor; with a `dtype` it is handed over as one, and stays that of the whole batch."""
    dtype: torch.dtype | None = None


SAVED = -1


@dataclass(frozen=True)
class Stage:
    """One compiled piece: `entries` in the order of its placeholders, `outputs` by name. `level`: ALL, or the number of the cut it starts at."""

    level: int
    entries: tuple[StageInput, ...]
    outputs: tuple[str, ...]
    gm: fx.GraphModule
    flops: int


@dataclass(frozen=True)
class BackwardOutput:
    """One output of the backward graph: which value of which stage, and its rows if they must be put back among all."""

    name: str | None
    source: int
    layout: SampleLayout | None
    size: tuple[Any, ...] = ()
    constant: Any = None


@dataclass(frozen=True)
class CoverageEstimate:
    """The FLOPs of a backward pass's gradients, those of them that can run on rows kept, and what was blocked and why."""

    flops_all: int
    flops_on_rows: int
    blocked: tuple[str, ...]
    work: RowWork
    """What running on rows would have to do: from the joint graph an estimate, from the split as it is."""

    def why_not(self, least_share: float) -> str | None:
        """Why it is not worth it, if it is not."""
        if not self.flops_on_rows:
            return "; ".join(self.blocked) or "no product of the backward pass depends on rows of the output's gradient"
        share = self.flops_on_rows / self.flops_all
        if share >= least_share:
            return None
        return f"only {share:.0%} of the backward pass's FLOPs could run on some of the rows" + (f": {'; '.join(self.blocked)}" if self.blocked else "")


@dataclass(frozen=True)
class Partition:
    """The stages in order and the backward graph's outputs."""

    batch: sympy.Symbol
    stages: tuple[Stage, ...]
    results: tuple[BackwardOutput, ...]
    outlook: CoverageEstimate
    products: Mapping[str, int]
    """The products that run on rows kept, by node name: their level."""


@dataclass
class PartitionState:
    followed: BatchDimState
    stage: dict[fx.Node, int] = field(default_factory=dict)
    post: int = 0
    blocked: dict[str, str] = field(default_factory=dict)
    """The reasons for which rows end, and what the user is told of the first op of each."""
    dense: dict[fx.Node, Any] = field(default_factory=dict)
    """Values that go from stage to stage and are views with one memory for many entries: what they are as tensors of their own."""

    def stopped(self, n: fx.Node, reason: str) -> None:
        if reason not in self.blocked:
            self.blocked[reason] = describe_reason(n, reason)


def output_layouts(graph: fx.Graph, batch: sympy.Symbol) -> dict[str, ValueLayout]:
    """Where the rows of a forward graph's outputs are, by name (a saved tensor has the same name in the backward graph) and by description."""
    found = analyze_batch_dim(graph, batch)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    named = {n.name: n for n in output.all_input_nodes} | _torch.outputs_by_description(output)
    return {name: found.layout[n] for name, n in named.items() if n not in found.unlocated and isinstance(n.meta.get("val"), torch.Tensor)}


def tangent_layouts(graph: fx.Graph, known: Mapping[str, ValueLayout]) -> dict[str, ValueLayout]:
    """Where the rows of the output's gradients are: where those of the outputs were."""
    return {n.name: known[d] for n in graph.nodes if n.op == "placeholder" and (d := _torch.tangent_output_description(n) or "") in known}


def estimate_coverage(graph: fx.Graph, batch: sympy.Symbol, default: int, levels: Mapping[str, int], approximate_batch_norm: bool) -> CoverageEstimate:
    """What `partition_backward` will find, told from the joint graph."""
    tangents = [n for n in graph.nodes if _torch.is_tangent(n)]
    work = PartitionState(analyze_batch_dim(graph, batch, tangent_layouts(graph, output_layouts(graph, batch)), tangents))
    if approximate_batch_norm:  # it will be tried, at least
        for n in [n for n, why in work.followed.blocked.items() if why == CROSS_SAMPLE]:
            del work.followed.blocked[n]
    _assign(graph, work, tangents, default, levels)
    backward = [n for n in graph.nodes if n in work.stage]
    on_rows = sum(_torch.flops(n) for n in backward if 0 < work.stage[n] != work.post)
    return CoverageEstimate(sum(_torch.flops(n) for n in backward), on_rows, tuple(work.blocked.values()), _expected(graph, work))


def partition_backward(
    gm: fx.GraphModule, batch: sympy.Symbol, known: Mapping[str, ValueLayout], default: int, levels: Mapping[str, int], approximate_batch_norm: bool
) -> Partition:
    """`default`: the level at the tangents (ALL: none); `levels`: that of products by node name. The approximation of BatchNorm edits `gm`."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    tangents = [n for n in placeholders if _torch.is_tangent(n)]
    work = PartitionState(analyze_batch_dim(gm.graph, batch, known, tangents))
    if approximate_batch_norm and decouple_batch_norm(gm, work.followed):
        work = PartitionState(analyze_batch_dim(gm.graph, batch, known, tangents))
    _assign(gm.graph, work, tangents, default, levels)
    members, wanted = _members(gm.graph, work)
    stages = []
    for s in sorted(members):
        level = ALL if s == 0 or s == work.post else s
        stages.append(_stage(gm, work, s, level, members[s], [n for n in wanted.get(s, {}) if n in members[s]]))
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    results = [_result(o, work) for o in output.args[0]]
    total, on_rows = sum(_torch.flops(n) for n in work.stage), sum(s.flops for s in stages if s.level != ALL)
    levels_of = {n.name: s for n, s in work.stage.items() if n.target in HEAVY and 0 < s != work.post}
    found = CoverageEstimate(total, on_rows, tuple(work.blocked.values()), _planned(gm.graph, work, stages))
    return Partition(batch, tuple(stages), tuple(results), found, levels_of)


def _on_rows(work: PartitionState) -> dict[fx.Node, int]:
    """The nodes that run on some rows: their level."""
    return {n: s for n, s in work.stage.items() if 0 < s != work.post}


def _row_products(work: PartitionState) -> tuple[ProductWork, ...]:
    return tuple(t for n, s in _on_rows(work).items() if (t := product_work(n, s, work.followed.batch)) is not None)


def _rows_at_hand(graph: fx.Graph, batch: sympy.Symbol) -> int:
    sizes = (s for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor) for s in v.shape if _torch.size_expr(s) == batch)
    return _torch.hint(next(sizes, 1))


def _entering(work: PartitionState) -> tuple[RowTraffic, ...]:
    """The gradients by whose norms rows are chosen."""
    known, found = work.followed, dict[tuple[fx.Node, int], None]()
    for n, s in _on_rows(work).items():
        found |= {(a, s): None for a in n.all_input_nodes if known.kind.get(a) == ROW_GRAD and work.stage.get(a, ALL) < s}
    return tuple(m for a, s in found for m in row_traffic(a.meta.get("val"), known.layout_of(a), s))


def _put_back(graph: fx.Graph, work: PartitionState) -> tuple[RowTraffic, ...]:
    """The gradients of rows that are wanted of all rows: by the caller, or by what is blocked."""
    known, on_rows = work.followed, _on_rows(work)
    blocked = [n for n, s in work.stage.items() if s == work.post]
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    wanted = dict.fromkeys(a for n in (*blocked, output) for a in n.all_input_nodes if a in on_rows and known.kind.get(a) == ROW_GRAD)
    return tuple(m for a in wanted for m in row_traffic(a.meta.get("val"), known.layout_of(a), on_rows[a]))


def _expected(graph: fx.Graph, work: PartitionState) -> RowWork:
    """Told from the joint graph, where nothing is saved yet: every value of the forward pass that a product on rows reads."""
    known, read = work.followed, dict[tuple[fx.Node, int], None]()
    for n, s in _on_rows(work).items():
        if n.target in HEAVY:
            read |= {(a, s): None for a in n.all_input_nodes if known.kind.get(a) == FORWARD}
    saved = tuple(m for a, s in read for m in row_traffic(a.meta.get("val"), known.layout_of(a), s))
    entering = _entering(work)
    return RowWork(_rows_at_hand(graph, known.batch), _row_products(work), entering, (*entering, *saved), _put_back(graph, work))


def _planned(graph: fx.Graph, work: PartitionState, stages: Sequence[Stage]) -> RowWork:
    """As split: everything that stages on rows are given."""
    gathered = [
        m
        for stage in stages
        if stage.level != ALL
        for e, n in zip(stage.entries, (n for n in stage.gm.graph.nodes if n.op == "placeholder"), strict=True)
        for m in row_traffic(n.meta.get("val"), e.layout, stage.level)
    ]
    return RowWork(_rows_at_hand(graph, work.followed.batch), _row_products(work), _entering(work), tuple(gathered), _put_back(graph, work))


def _assign(graph: fx.Graph, work: PartitionState, tangents: Sequence[fx.Node], default: int, levels: Mapping[str, int]) -> None:
    """The stage of every node that is linear in the gradients; `post` is one more than the last level."""
    known = work.followed
    by_rows = {t for t in tangents if known.kind.get(t) == ROW_GRAD}
    start = ALL if any(levels.get(n.name, default) == ALL for n in _first_products(by_rows)) else default
    raw: dict[fx.Node, int] = {}
    exact = _read_by_nonlinear(graph, known)
    post = max([default, *levels.values()]) + 1
    for n in graph.nodes:
        if n.op != "call_function" or known.kind.get(n) not in (ROW_GRAD, REDUCED_GRAD):
            continue
        above = [raw.get(a, start if a in by_rows else ALL) for a in n.all_input_nodes if known.kind.get(a) in (ROW_GRAD, REDUCED_GRAD)]
        stage = max([ALL, *above])
        if n in exact:
            stage = ALL
            if n in known.nonlinear:
                work.stopped(n, f"{known.nonlinear[n]}, so that all above it runs on all rows")
        elif n.target in HEAVY or "attention" in str(n.target):
            stage = max(stage, levels.get(n.name, default))
        elif above == [] and known.kind.get(n) == ROW_GRAD:
            stage = ALL  # a loss inside the graph: its gradient spreads over the rows here
        if stage != ALL and stage != post and n in known.blocked:
            work.stopped(n, known.blocked[n])
            stage = post
        raw[n] = stage
    work.stage, work.post = raw, post


def _read_by_nonlinear(graph: fx.Graph, known: BatchDimState) -> set[fx.Node]:
    """The nodes whose gradients must be exact, since a node that is not linear in them makes something of them: the mean of that over choices of rows
    would not be what it makes of the mean. With that node itself, which is a choice's beginning as good as an output's gradient."""
    found = set(known.nonlinear)
    for n in reversed(graph.nodes):
        if n in found:
            found.update(a for a in n.all_input_nodes if known.kind.get(a) in (ROW_GRAD, REDUCED_GRAD))
    return found


def _first_products(tangents: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The products that gradients of outputs reach through no other: if one is to have all rows, the cut is below it."""
    seen: set[fx.Node] = set()
    todo = list(tangents)
    while todo:
        n = todo.pop()
        for u in n.users:
            if u.op == "call_function" and u not in seen:
                seen.add(u)
                if u.target in HEAVY:
                    yield u
                else:
                    todo.append(u)


def _members(graph: fx.Graph, work: PartitionState) -> tuple[dict[int, dict[fx.Node, None]], dict[int, dict[fx.Node, None]]]:
    """The nodes every stage computes, and which of them later stages or the caller want."""
    members: dict[int, dict[fx.Node, None]] = {}
    wanted: dict[int, dict[fx.Node, None]] = {}
    known = work.followed

    def home(n: fx.Node, stage: int) -> int:
        """The stage that gives `n` to `stage`: its own for gradients; for the rest that stage itself, or 0 if only all rows can give it."""
        if n.op == "placeholder" or _is_symbol(n):
            return SAVED
        if n.target is operator.getitem and isinstance(n.args[0], fx.Node):
            return home(n.args[0], stage)
        if n in work.stage:
            return work.stage[n]
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
    return {s: dict.fromkeys(sorted(found, key=order.__getitem__)) for s, found in members.items()}, wanted


def _is_number(n: fx.Node) -> bool:
    return isinstance(n.meta.get("val"), _torch.SYMBOLIC)


def _is_symbol(n: fx.Node) -> bool:
    """A size that is a symbol and nothing else: every stage is given its value."""
    return _is_number(n) and bool(_torch.size_expr(n.meta["val"]).is_Symbol)


def _stage(gm: fx.GraphModule, work: PartitionState, s: int, level: int, members: Mapping[fx.Node, None], outputs: Sequence[fx.Node]) -> Stage:
    """The stage's own graph: symbolic sizes first among its placeholders, as in any backward graph."""
    known = work.followed
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in outputs:
        if _expanded(n.meta.get("val")) and n not in work.dense:
            with _torch.fake_mode_of(n):
                work.dense[n] = torch.empty_like(n.meta["val"], memory_format=torch.contiguous_format)
    needed: dict[fx.Node, None] = {}
    for n in members:
        for a in n.all_input_nodes:
            if a not in members:
                needed.setdefault(a)
    entries = []
    for symbol, value in _symbols_beside(gm, members, needed).items():
        name = f"size_{symbol}"
        graph.placeholder(name).meta = {"val": value}
        entries.append(StageInput(name, SAVED, None, False, number=symbol))
    constants: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    whole = [(a, _number_dtype(n)) for n in members if level != ALL and n in known.batch_size_factors for a in _torch.symbolic_scalar_arguments(n)]
    for a in sorted(needed, key=lambda a: not _is_number(a)):
        new = graph.placeholder(a.name)
        new.meta = dict(a.meta) | ({"val": work.dense[a]} if a in work.dense else {})
        env[a] = new
        entries.append(_entry(a, work))
    for a, dtype in dict.fromkeys(whole):  # the batch's size as a number: a tensor made outside, so that it stays what it is
        name = f"{a.name}_whole_{str(dtype).removeprefix('torch.')}"
        new = constants[a, dtype] = graph.placeholder(name)
        new.meta = {"val": _torch.fake_scalar(a, dtype)}
        entries.append(StageInput(name, SAVED, None, False, number=_torch.size_expr(a.meta["val"]), dtype=dtype))
    for n in members:
        new = env[n] = graph.node_copy(n, env.__getitem__)
        if level != ALL and n in known.batch_size_factors:
            dtype = _number_dtype(n)
            new.args = tuple(constants.get((o, dtype), m) if isinstance(o, fx.Node) else m for o, m in zip(n.args, new.args, strict=True))
        if level != ALL and n in known.indexed_by_sample:
            _count_anew(new, *known.indexed_by_sample[n])
    for n in outputs:
        if n in work.dense:  # rows of an expanded tensor share their memory: a place of its own for each
            env[n] = graph.call_function(aten.clone.default, (env[n],), {"memory_format": torch.contiguous_format})
            env[n].meta["val"] = work.dense[n]
    out = graph.output(tuple(env[n] for n in outputs))
    out.meta["user_visible_output_idxs"] = list(range(len(outputs)))  # the next stage counts on the strides
    graph.eliminate_dead_code()
    graph.lint()
    return Stage(level, tuple(entries), tuple(n.name for n in outputs), fx.GraphModule(gm, graph), sum(_torch.flops(n) for n in members))


def _count_anew(n: fx.Node, dim: int, place: int) -> None:
    """Number the samples that are there, for an op that finds each sample's entries by its number: index `dim`, which has the batch in its dim `place`."""
    graph, x = n.graph, n.args[0]
    indices: list[Any] = list(n.args[1])  # type: ignore[arg-type]
    number = _torch.value(indices[dim])

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta["val"] = target(*fx.map_arg(args, lambda a: a.meta["val"]), **kwargs)
        return new

    with graph.inserting_before(n), _torch.fake_mode_of(n):
        size = emit(aten.sym_size.int, x, dim)
        counted = emit(torch.ops.prims.iota.default, size, start=0, step=1, dtype=number.dtype, device=number.device, requires_grad=False)
        indices[dim] = emit(aten.reshape.default, counted, [size if d == place else 1 for d in range(number.dim())])
    n.args = (x, indices, *n.args[2:])


def _symbols_beside(gm: fx.GraphModule, members: Iterable[fx.Node], needed: Iterable[fx.Node]) -> dict[sympy.Symbol, Any]:
    """The symbols that the stage's sizes are made of and that are no input by themselves. Inductor has to find each (a tensor's size may be 5 s, or s - 1),
    and its cache, which looks at no tensors, checks among the inputs what was assumed of a symbol."""
    inputs = [n.meta["val"] for n in needed]
    used = {s for v in (*inputs, *(n.meta.get("val") for n in members)) for e in _of_value(v) for s in _torch.size_expr(e).free_symbols}
    own = {_torch.size_expr(v) for v in inputs if isinstance(v, torch.SymInt)}
    given = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    known = {s: _torch.size_at(given, i, d) for s, i, d in _torch.symbol_sources(given)}
    return {s: known[s] for s in sorted(used - own, key=str) if s in known}


def _of_value(value: Any) -> list[Any]:
    """All symbolic numbers in a value."""
    if isinstance(value, torch.Tensor):
        return [*value.shape, *value.stride(), value.storage_offset()]
    return [value] if isinstance(value, _torch.SYMBOLIC) else []


def _entry(a: fx.Node, work: PartitionState) -> StageInput:
    if _is_number(a):
        return StageInput(a.name, SAVED, None, False, number=_torch.size_expr(a.meta["val"]))
    known, value = work.followed, work.dense.get(a, _torch.value(a))
    source = SAVED if a.op == "placeholder" else work.stage.get(a, 0)
    layout = known.layout_of(a)
    return StageInput(a.name, source, layout, known.kind.get(a) == ROW_GRAD, *_expressions(value))


def _expressions(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if not isinstance(value, torch.Tensor):
        return (), ()
    return tuple(map(_torch.size_expr, value.shape)), tuple(map(_torch.size_expr, value.stride()))


def _expanded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(
        _torch.known_equal(t, 0) and not _torch.known_equal(s, 1) for s, t in zip(value.shape, value.stride(), strict=True)
    )


def _number_dtype(n: fx.Node) -> torch.dtype:
    """Beside a tensor with dims a double is as good as a Python number; beside a scalar it would change the result's dtype."""
    value = _torch.value(n)
    return value.dtype if value.dim() == 0 else torch.float64


def _result(o: Any, work: PartitionState) -> BackwardOutput:
    if not isinstance(o, fx.Node):
        return BackwardOutput(None, SAVED, None, constant=o)
    if o.op == "placeholder":
        return BackwardOutput(o.name, SAVED, None)
    source = work.stage.get(o, 0)
    on_rows = 0 < source != work.post and work.followed.kind[o] == ROW_GRAD
    return BackwardOutput(o.name, source, work.followed.layout_of(o) if on_rows else None, _expressions(_torch.value(o))[0])
