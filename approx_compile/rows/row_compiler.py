"""Compile a backward graph into code that runs on some rows of the batch, between AOTAutograd and Inductor.

`RowCompiler` cuts the backward graph into stages (`partition`), compiles each once, with a symbol for the batch's size, and returns a `RowBackward` that
calls them with as many rows as a step needs. Where a step may keep all rows, `RowCompiler` also compiles the whole graph for the batch size at hand,
because code for a known size is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from approx_compile import _torch, machine
from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import LEAST_ROWS, RowSettings
from approx_compile.passes.fx_utils import ZERO_KEY, copy_of
from approx_compile.passes.planning.plan import RowCut
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import ROWS_END, WHOLE_BACKWARD
from approx_compile.reasons.rows import BATCH_ASSUMED, FIXED_BATCH_CODE, FIXED_BATCH_TRACED
from approx_compile.rows import row_cost
from approx_compile.rows.batch_dim import BatchSize, SampleLayout, ValueLayout, is_dense_at_hand_only
from approx_compile.rows.controller import StepFlops
from approx_compile.rows.coverage import estimate_coverage
from approx_compile.rows.gather_rows import copy_keeping_strides, may_overlap
from approx_compile.rows.graph_controls import GraphControls
from approx_compile.rows.opaque_backward import ROW_BACKWARD_ATTRIBUTE
from approx_compile.rows.ownership import UNNAMED, GraphName
from approx_compile.rows.partition import partition_backward
from approx_compile.rows.row_backward import RowBackward, WholeBatchBackward
from approx_compile.rows.specialize import specialize_sizes
from approx_compile.rows.stage_shapes import entering_gradients
from approx_compile.rows.stages import ALL_ROWS, EXCLUDED, SAVED, CoverageEstimate, Partition, Stage, StageInput, output_layouts, tangent_layouts, zero_outputs
from approx_compile.rows.variance_budget import unmeasured_reason

LEAST_SHARE = 0.3
"""The share of the backward pass's FLOPs that must be able to run on selected rows, under the policies that consider the cost."""


class Declined(Exception):
    """Raised if sampling rows is not worth it in a graph, with the reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class RowCompiler:
    """An `inner_compile` for one call of `compile_fx`.

    AOTAutograd calls it once for the forward and once for the backward graph. `ask` must be called before, with the joint graph.
    """

    def __init__(
        self,
        symbols: Sequence[sympy.Symbol],
        config: ApproxConfig,
        inner: Callable[..., Any] | None,
        root: nn.Module | None = None,
        name: GraphName = UNNAMED,
        symbol_was_requested: bool = False,
        flops_elsewhere: int = 0,
    ) -> None:
        """Store the settings of one compilation.

        Args:
            symbols: The symbols that may be the batch's size, the likeliest first.
            config: The user's configuration.
            inner: The function that compiles a graph; None for Inductor's.
            root: The module that is compiled. Adaptive state belongs to it where no parameter is saved.
            name: The name of the graph within the module, by which its adaptive state is found.
            symbol_was_requested: Whether the sizes are symbolic because this package asked for it, rather than the user.
            flops_elsewhere: The FLOPs that may run on rows in other graphs of the same model.
        """
        self.flops_elsewhere = flops_elsewhere
        self.symbols = tuple(symbols)
        self.batch = BatchSize(self.symbols[0])
        self.symbol_was_requested = symbol_was_requested
        self.config = config
        self.root = root
        self.name = name
        self.inner = _torch.compile_graph if inner is None else inner
        self.levels: list[RowSettings] = []
        self.default = ALL_ROWS
        self.cuts: list[RowCut] = []
        self._known: dict[str, ValueLayout] = {}
        self._zeros: set[str] = set()
        self._forward_flops = 0

    def ask(self, graph: fx.Graph, top: RowSettings | None, sites: Mapping[fx.Node, RowSettings | None], excluded: Collection[fx.Node] = frozenset()) -> None:
        """Number the levels that the settings ask for, the one with the most rows first, and choose the batch's size.

        Each gradient product gets the number of its level in its meta (key `LEVEL`), from where the backward graph inherits it.

        Args:
            graph: The joint graph.
            top: The settings that begin at the output gradients; None to keep all rows there.
            sites: The settings that begin at gradient products; None for a product at which none begin.
            excluded: Gradient products that must be computed from all rows, so that all that leads to them keeps all rows, too.

        Raises:
            Declined: If running on selected rows will not be worth it for any of the symbols.
        """
        distinct = dict.fromkeys(s for s in (top, *sites.values()) if s is not None)
        self.levels = sorted(distinct, key=lambda s: -1.0 if s.ratio is None else -s.ratio)
        self.default = self._level(top)
        for node, settings in sites.items():
            node.meta[LEVEL] = EXCLUDED if node in excluded else self._level(settings)
        if not _torch.has_backward(graph):
            return
        levels = {n.name: n.meta[LEVEL] for n in sites}
        groups = [BatchSize(s, g) for s in self.symbols if (g := _torch.divisor_of(s, graph)) > 1]
        self.batch, coverage, reason = self._best(graph, [*map(BatchSize, self.symbols), *groups], levels)
        partners = tuple(s for s in self.symbols if s != self.batch.symbol)
        compared = tuple(s for s in partners if _torch.are_compared(s, self.batch.symbol, graph))
        if partners and self.symbol_was_requested:  # nothing in the graph says yet that they are one size
            together = replace(self.batch, same=partners)
            unify = reason is not None or self._best(graph, [self.batch, together], levels)[0] is together
            if same := partners if unify else compared:
                symbol = _torch.unify_symbols([self.batch.symbol, *same], graph)
                self.batch, coverage, reason = self._estimate_for(graph, BatchSize(symbol, self.batch.group), levels)
        if reason is not None:
            self._record_cuts(coverage, {}, graph, reason)
            raise Declined(reason)

    def _best(self, graph: fx.Graph, sizes: Sequence[BatchSize], levels: Mapping[str, int]) -> tuple[BatchSize, CoverageEstimate, Reason | None]:
        """Return what `_estimate_for` does for the one of several sizes of the batch with which most can run on rows, the first among equals."""
        return max((self._estimate_for(graph, batch, levels) for batch in sizes), key=lambda t: (t[2] is None, t[1].flops_on_rows))

    def _estimate_for(self, graph: fx.Graph, batch: BatchSize, levels: Mapping[str, int]) -> tuple[BatchSize, CoverageEstimate, Reason | None]:
        """Estimate with this size of the batch what can run on rows; return the size, the estimate, and why it is not worth it, if so."""
        coverage = estimate_coverage(graph, batch, self.default, levels, self._approximate_batch_norm)
        return batch, coverage, _traced_size_reason(graph, batch.symbol) or self._rejection_reason(coverage, graph)

    @property
    def _approximate_batch_norm(self) -> bool:
        return any(s.approximate_batch_norm for s in self.levels)

    def _rejection_reason(self, coverage: CoverageEstimate, graph: fx.Graph) -> Reason | None:
        """Why running on rows is not worth it, if so, by the machine's profile where one is stored.

        The profile decides only whether rows are sampled at all and never what is compiled for them, so cache keys need not name it.
        """
        reason = coverage.rejection_reason(self._least_share)
        if reason is not None or self.config.policy == "always":
            return reason
        device = _device_of(graph)
        return row_cost.rejection_reason(coverage.work, self.levels, machine.stored(device), device, self.flops_elsewhere)

    @property
    def _least_share(self) -> float:
        return 0.0 if self.config.policy == "always" else LEAST_SHARE

    def _level(self, settings: RowSettings | None) -> int:
        return self.levels.index(settings) + 1 if settings is not None else ALL_ROWS

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **kwargs: Any) -> Any:
        """Compile a forward graph as it is, or a backward graph to run on selected rows.

        Args:
            gm: The graph. It may be edited.
            example_inputs: Fake inputs to compile it with.
            is_backward: Whether it is the backward graph.
            **kwargs: Further arguments for the inner compiler.

        Returns:
            The compiled graph.
        """
        if self.symbol_was_requested:
            _torch.drop_dynamic_marks()
        if not is_backward:
            self._known |= output_layouts(gm.graph, self.batch)
            self._zeros |= zero_outputs(gm.graph)
            self._forward_flops = sum(map(_torch.flops, gm.graph.nodes))
            return self.inner(gm, example_inputs, is_backward=False, **kwargs)
        try:
            return self._backward(gm, example_inputs, kwargs)
        finally:
            _torch.clear_donated_inputs()  # the function that `_backward` returns handles donated inputs itself

    def _backward(self, gm: fx.GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Compile a backward graph to run on selected rows, or on all rows where selecting them turns out not to be worth it or not possible."""
        names = [n.name for n in _placeholders(gm)]
        donated = _torch.donated_placeholders(gm)
        for n in (n for n in _placeholders(gm) if n.name in self._zeros):
            n.meta[ZERO_KEY] = True
        known = self._known | tangent_layouts(gm.graph, self._known)
        plain = copy_of(gm) if self._approximate_batch_norm else gm
        partition = partition_backward(gm, self.batch, known, self.default, _levels_of(gm), self._approximate_batch_norm)
        exact = self._rejection_reason(partition.coverage, gm.graph)
        self._record_cuts(partition.coverage, partition.products, gm.graph, exact)
        if exact is not None:
            return _with_donated_inputs_copied(self.inner(plain, example_inputs, is_backward=True, **kwargs), names, donated)
        given = dict(zip(names, example_inputs, strict=True))
        dense = _contiguous_copies(partition, given)
        calls, partition = self._compile_stages(partition, gm, given, dense, kwargs)
        guards = _torch.guards_on_symbol(partition.batch.symbol, gm) if partition.batch.symbol.is_Symbol else []
        hints = {s: _torch.known_hint(_torch.size_at(example_inputs, i, d)) for s, i, d in _torch.symbol_sources(example_inputs)}
        sizes = {s: n for s, n in hints.items() if n is not None}
        if (fixed := _fixed_size_reason(partition.batch, sizes, guards)) is not None:
            self.cuts = [replace(c, decision="exact", reason=fixed, stops=True) for c in self.cuts]
            return _with_donated_inputs_copied(self.inner(plain, example_inputs, is_backward=True, **kwargs), names, donated)
        cuts = len(self.levels)
        work = StepFlops(partition.coverage.flops_on_rows / cuts, (self._forward_flops + partition.coverage.flops_all) / cuts)
        places = {c.level: self._place(c) for c in self.cuts}
        controls = GraphControls(self.config, self.root, self.name, self.levels, places, work, unmeasured_reason(gm.graph))
        asked = {s for level, s in enumerate(self.levels) if entering_gradients(partition, level)}
        whole = self._compile_whole_batch(plain, example_inputs, sizes, kwargs) if all(s.ratio is None for s in asked) else None
        backward = RowBackward(partition, calls, self.levels, names, example_inputs, guards, controls, whole, dense, donated)
        call = _boxed(backward)
        setattr(call, ROW_BACKWARD_ATTRIBUTE, backward)
        return call

    def _compile_whole_batch(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], sizes: Mapping[sympy.Symbol, int], kwargs: dict[str, Any]
    ) -> WholeBatchBackward | None:
        """Compile the backward pass on all rows for the sizes at hand, without symbols; None where some size is not known yet."""
        fixed = specialize_sizes(gm, example_inputs, sizes)
        return WholeBatchBackward(self.inner(*fixed, is_backward=True, **kwargs), sizes) if fixed is not None else None

    def _record_cuts(self, coverage: CoverageEstimate, products: Mapping[str, int], graph: fx.Graph, exact: Reason | None) -> None:
        """Add a `RowCut` for each level to what is reported. `exact` is the reason why all rows are kept, if they are."""
        sizes = (s for n in graph.nodes if n.op == "placeholder" for s in _sizes(n))
        rows = next((_torch.hint(s) for s in sizes if _torch.size_expr(s) == self.batch.symbol), 0) // self.batch.group
        profile = machine.stored(_device_of(graph)) if exact is None and self.config.policy != "always" else None
        predicted = row_cost.predict(coverage.work, self.levels, profile) if profile is not None else None
        times = (predicted.saved_us, predicted.cost_us) if predicted is not None else ()
        for i, asked in enumerate(self.levels, 1):
            mine = tuple(name for name, level in products.items() if level == i)
            if exact is None and not mine:
                continue
            reason = exact or (ROWS_END(stops=join(coverage.blocked)) if coverage.blocked else WHOLE_BACKWARD())
            decision, stops = "exact" if exact else "rows", bool(exact or coverage.blocked)
            flops = (coverage.flops_all, coverage.flops_on_rows)
            self.cuts.append(RowCut(asked.method, asked.ratio, rows, decision, reason, *flops, mine, i, stops, *times))

    def _place(self, cut: RowCut) -> str:
        """Say which part of the backward pass a cut decides about."""
        if cut.level != self.default:
            return f"backward pass, level {cut.level}"
        return "backward pass down to where rows end" if cut.stops else "whole backward pass"

    def _compile_stages(
        self, partition: Partition, gm: fx.GraphModule, given: Mapping[str, Any], dense: Mapping[str, Tensor], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Partition]:
        """Compile the stages; return the code of each, and the partition with the sizes that compiling has fixed.

        `given` holds the example inputs by name, which may have other strides than the graph says. `dense` holds those that stages on selected rows get as
        separate contiguous tensors.
        """
        donated = _torch.donated_placeholders(gm)
        uses: dict[str, int] = {}
        for stage in partition.stages:
            for entry in stage.entries:
                uses[entry.name] = uses.get(entry.name, 0) + 1
        partition = _with_real_strides(partition, given, dense)
        calls = []
        for stage in partition.stages:
            here = _inputs_of(stage, given, dense)
            inputs = [here.get(e.name, n.meta["val"]) for e, n in zip(stage.entries, _placeholders(stage.gm), strict=True)]
            mine = [i for i, e in enumerate(stage.entries) if e.name in donated and uses[e.name] == 1]
            static = [i for i, e in enumerate(stage.entries) if e.source == SAVED and e.layout is None and e.number is None and e.name not in donated]
            with _torch.donate_inputs(mine):
                calls.append(self.inner(stage.gm, inputs, is_backward=True, **(kwargs | {"static_input_idxs": static})))
        return calls, _with_fixed_symbols(partition, _torch.symbol_replacer(gm.graph))


def _traced_size_reason(graph: fx.Graph, batch: sympy.Symbol) -> Reason | None:
    """Why only one number of rows is possible, if tracing has replaced the batch's symbol by a number."""
    size = _torch.symbol_replacer(graph)(batch)
    return FIXED_BATCH_TRACED(size=size) if size.is_Integer else None


def _boxed(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Wrap a callable in a function with the boxed calling convention: it is passed a list that it empties.

    It must be a function because the wrappers that torch adds copy the attributes of functions only.
    """

    def call(args: list[Any]) -> Any:
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _with_donated_inputs_copied(compiled: Callable[[list[Any]], Any], names: Sequence[str], donated: set[str]) -> Callable[[list[Any]], Any]:
    """Wrap a compiled graph so that it gets copies of donated inputs, which it may write to, where the user keeps the graph for another pass."""
    indices = [i for i, name in enumerate(names) if name in donated]
    if not indices:
        return compiled

    def run(args: list[Any]) -> Any:
        if _torch.graph_is_kept():
            for i in indices:
                args[i] = copy_keeping_strides(args[i])
        return compiled(args)

    return _boxed(run)


def _levels_of(gm: fx.GraphModule) -> dict[str, int]:
    return {n.name: n.meta[LEVEL] for n in gm.graph.nodes if LEVEL in n.meta}


LEVEL = "approx_compile_rows"
"""Key in the meta of a gradient product's node: the level that its site asks for."""


def _device_of(graph: fx.Graph) -> str:
    """Return the type of the device that a graph runs on."""
    return next((n.meta["val"].device.type for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)), "cpu")


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _sizes(n: fx.Node) -> Sequence[Any]:
    """The sizes of a placeholder's tensor, or the one size that a node is."""
    value = n.meta.get("val")
    return value.shape if n.op == "placeholder" and isinstance(value, Tensor) else (value,) if isinstance(value, torch.SymInt) else ()


def _fixed_size_reason(batch: BatchSize, sizes: Mapping[sympy.Symbol, int], guards: Sequence[Any]) -> Reason | None:
    """The assumption of the compiled code under which only the whole batch can run, if there is one.

    Testing every number of rows would be slow, so only likely ones are tried: numbers next to constants in the guards, 2 to 64, multiples of a 16th of the
    batch, and those within 64 of the batch. A guard that only a larger batch satisfies is no obstacle: such a batch may have rows to leave out.
    """
    symbol, group = batch.symbol, batch.group
    if not symbol.is_Symbol:
        return FIXED_BATCH_CODE(size=symbol)
    size = sizes[symbol] // group
    known = [g for g in guards if g.free_symbols <= sizes.keys()]

    def broken_by(n: int) -> list[Any]:
        return [g for g in known if not _torch.guard_holds(g, {**sizes, symbol: n * group})]

    named = {int(c) // group + d for g in known for c in g.atoms(sympy.Integer) for d in (-1, 0, 1)}  # bounds and divisors in the guards
    tried = sorted({*named, *range(LEAST_ROWS, 65), *(size * i // 16 for i in range(1, 64)), *range(size - 64, size + 65)})
    if any(not broken_by(n) for n in tried if LEAST_ROWS <= n < size):
        return None
    broken = broken_by(size - 1)
    larger = all(g.free_symbols == {symbol} for g in broken) and any(not broken_by(n) for n in tried if n > size)
    return None if larger or not broken else BATCH_ASSUMED(guard=broken[0], size=symbol)  # a larger batch may have rows to leave out


def _with_fixed_symbols(partition: Partition, settled: Callable[[Any], Any]) -> Partition:
    """The partition with every symbol replaced that compiling the stages has fixed, such as an image size that a convolution was compiled for."""

    def layout(rows: SampleLayout | None) -> SampleLayout | None:
        return rows if rows is None or rows.uniform else replace(rows, outer=settled(rows.outer), inner=settled(rows.inner))

    def entry(e: StageInput) -> StageInput:
        number = None if e.number is None else settled(e.number)
        return replace(e, layout=layout(e.layout), size=tuple(map(settled, e.size)), stride=tuple(map(settled, e.stride)), number=number)

    stages = tuple(replace(s, entries=tuple(map(entry, s.entries))) for s in partition.stages)
    results = tuple(replace(r, layout=layout(r.layout), size=tuple(map(settled, r.size))) for r in partition.results)
    return replace(partition, batch=replace(partition.batch, symbol=settled(partition.batch.symbol)), stages=stages, results=results)


def _with_real_strides(partition: Partition, given: Mapping[str, Any], dense: Mapping[str, Tensor]) -> Partition:
    """The partition with the strides that saved tensors really have: those that the forward pass gives them, or those of their contiguous copies (`dense`)."""

    def of(e: StageInput, here: Mapping[str, Any]) -> StageInput:
        value = here.get(e.name)
        if e.source != SAVED or not isinstance(value, Tensor):
            return e
        return replace(e, stride=tuple(map(_torch.size_expr, value.stride())))

    return replace(partition, stages=tuple(replace(s, entries=tuple(of(e, _inputs_of(s, given, dense)) for e in s.entries)) for s in partition.stages))


def _inputs_of(stage: Stage, given: Mapping[str, Any], dense: Mapping[str, Tensor]) -> dict[str, Any]:
    """The backward graph's inputs as a stage gets them: a stage on selected rows gets contiguous copies of those in `dense`."""
    return dict(given) if stage.level == ALL_ROWS else {**given, **{e.name: dense[e.name] for e in stage.entries if e.layout is not None and e.name in dense}}


def _contiguous_copies(partition: Partition, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Fake contiguous tensors for the saved tensors whose gathered rows cannot have the strides of the tensor, by name.

    Entries of these overlap in memory, or would with another batch's size, or they are gradients expanded along the batch, whose rows get different weights.
    """
    new = {}
    for e in (e for s in partition.stages if s.level != ALL_ROWS for e in s.entries):
        value = given.get(e.name)
        if e.source != SAVED or e.layout is None or not isinstance(value, Tensor):
            continue
        size, stride = [_torch.hint(s) for s in value.shape], [_torch.hint(s) for s in value.stride()]
        if may_overlap(size, stride) or is_dense_at_hand_only(value) or (e.gradient and stride[e.layout.dim] == 0):
            new[e.name] = _torch.fake_contiguous(value)
    return new
