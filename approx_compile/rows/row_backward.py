"""Run a backward pass on selected rows of the batch.

The backward pass is compiled once, with a symbol for the batch's size, and called with fewer rows. `RowBackward` runs its compiled stages: it selects rows
by the norms of their gradients, gathers what the stages read of them, and puts the input gradients back among all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.config.resolve import LEAST_ROWS, RowSettings
from approx_compile.rows.batch_dim import SampleLayout
from approx_compile.rows.batch_norm import WEIGHTS
from approx_compile.rows.controller import Draws, RowControl
from approx_compile.rows.gather_rows import copy_keeping_strides, put_rows, row_norms_sq, take_rows, with_strides
from approx_compile.rows.graph_controls import GraphControls
from approx_compile.rows.nonlinear_below import is_nonlinear_below
from approx_compile.rows.row_sampling import FLOOR, added_variance, choose_rows, with_floor
from approx_compile.rows.row_selection import RowSelection, _path, _weights, mark_selection, selection_of
from approx_compile.rows.stage_shapes import entering_gradients, last_use_of_saved, number_of, shape_of
from approx_compile.rows.stages import ALL_ROWS, SAVED, BackwardOutput, Partition, StageInput
from approx_compile.rows.variance_budget import Probe, Rows, VarianceBudget, measure

MAX_CACHED_SIZES = 1024
"""The most entries in each cache of shapes and of legal numbers of rows; a cache that exceeds it is cleared."""


class WholeBatchBackward(NamedTuple):
    """The backward pass on all rows, compiled for one value of each symbol.

    Attributes:
        call: The compiled code, called with a list of its arguments that it empties.
        sizes: The value of each symbol that it was compiled for.
    """

    call: Callable[[list[Any]], list[Any]]
    sizes: Mapping[sympy.Symbol, int]


class RowBackward:
    """The compiled backward pass of one graph, called as AOTAutograd calls it (boxed).

    The rows of all levels are selected on the device. How many there are is an integer on the host that is known before the call, so no step waits for the
    device.
    """

    def __init__(
        self,
        partition: Partition,
        calls: Sequence[Callable[..., Any]],
        levels: Sequence[RowSettings],
        names: Sequence[str],
        example_inputs: Sequence[Any],
        guards: Sequence[Any],
        controls: GraphControls,
        whole: WholeBatchBackward | None = None,
        dense: Iterable[str] = (),
        donated: Iterable[str] = (),
    ) -> None:
        """Store the compiled stages and derive from the partition what every call needs.

        Args:
            partition: The partition of the backward graph.
            calls: The compiled code of each stage, in order.
            levels: The settings of level 1, 2, ...
            names: The names of the backward graph's inputs, in order.
            example_inputs: The inputs that the graph was compiled with. They say in which size each symbol is found.
            guards: The conditions on the batch's size that the compiled code assumes.
            controls: Where the adaptive ratios and the random numbers of a call come from.
            whole: The backward pass on all rows, compiled for fixed sizes; None if there is none.
            dense: The names of saved tensors that the stages on selected rows were compiled to get with other strides than the tensors have.
            donated: The names of saved tensors that compiled code may write to. Where the user keeps the graph (`retain_graph`), compiled code gets copies
                of them, because a second backward pass may need what the forward pass saved.
        """
        self.partition = partition
        self.calls = tuple(calls)
        self.levels = tuple(levels)
        self.names = tuple(names)
        self.controls = controls
        self.whole = whole
        self.as_one_op: Any = None
        """The op of `opaque_backward` that runs this backward pass. It is stored here so that it lives as long as this object."""
        self._dense = frozenset(dense)
        self._donated = frozenset(donated)
        self.guards = tuple(guards)
        placeholders = [n for s in partition.stages for n in s.gm.graph.find_nodes(op="placeholder")]
        self._weights: Any = next((n.meta["val"] for n in placeholders if n.name == WEIGHTS), None)
        coupled = max((s.level for s in partition.stages for e in s.entries if e.name == WEIGHTS), default=ALL_ROWS)
        self._floors = [FLOOR if level < coupled and s.method in ("bernoulli", "wta") else 0.0 for level, s in enumerate(self.levels)]
        self._symbols = _torch.symbol_sources(example_inputs)
        self._last_use = last_use_of_saved(partition)
        self._entering = [entering_gradients(partition, level) for level in range(len(self.levels))]
        self._parameters = [i for i, r in enumerate(partition.results) if r.summed]
        self._legal_counts: dict[tuple[Any, ...], int] = {}
        self._plans: dict[tuple[Any, ...], list[list[Any]]] = {}

    def __call__(self, args: list[Any], keep: bool = False) -> list[Any]:
        """Run the backward pass.

        Args:
            args: The inputs of the backward graph. The list is emptied, so that tensors can be freed during the call.
            keep: Whether saved tensors must stay unchanged even if the autograd engine says that the graph is freed after this pass.

        Returns:
            The outputs of the backward graph.
        """
        symbols = self._values(args)
        values = dict(zip(self.names, args, strict=True))
        args.clear()
        spared = self._donated if self._donated and (keep or _torch.graph_is_kept()) else frozenset[str]()
        size = self._samples(symbols)
        if _all_rows[0] or symbols[self.partition.batch.symbol] % self.partition.batch.group:  # some sample lacks entries
            return self.run(values, symbols, [size] * len(self.levels), [None] * len(self.levels), None, spared)
        owner = self.controls.owner(values.values())
        budget = self.controls.budget(owner)
        controls = self.controls.of(owner)
        followed, may_drop = self._follow(values, symbols)
        counts = self._counts(symbols, controls, followed) if may_drop else [size] * len(self.levels)
        if budget is not None and followed is None and may_drop and budget.start_pass():
            probed = self._probed_counts(counts, symbols, budget)
            if probed[-1] < size and self._parameters:
                return self._measure(values, symbols, probed, controls, spared, self.controls.draws(owner), budget)
        whole = self.whole
        if whole is not None and whole.sizes == symbols and followed is None and set(counts) == {size} and self._watched(values, counts, controls):
            return self._run_on_all(values, symbols, spared)
        return self.run(values, symbols, counts, controls, followed, spared, self.controls.draws(owner))

    def _probed_counts(self, counts: list[int], symbols: Mapping[sympy.Symbol, int], budget: VarianceBudget) -> list[int]:
        """Return the numbers of rows at which a step measures: those of the step, or the most below all rows if too much variance measured led to all rows."""
        if min(counts) < self._samples(symbols) or budget.excess <= 1 or len(budget.settings.ladder) == 1:
            return counts
        return [self._legal(max(LEAST_ROWS, int(budget.settings.ladder[-2] * self._samples(symbols))), symbols)] * len(counts)

    def _measure(
        self,
        values: dict[str, Any],
        symbols: Mapping[sympy.Symbol, int],
        counts: Sequence[int],
        controls: Sequence[RowControl | None],
        spared: frozenset[str],
        draws: Draws,
        budget: VarianceBudget,
    ) -> list[Any]:
        """Run the backward pass on all rows, and let the budget observe how much variance `counts` rows add. Arguments as those of `run`."""
        size = self._samples(symbols)
        half = [self._legal(max(LEAST_ROWS, size // 2), symbols)] * len(self.levels)

        def evaluate(probe: Probe) -> list[Any]:
            if probe.rows is Rows.ALL:
                return self._run_on_all(values, symbols, spared)
            given = (counts, controls) if probe.rows is Rows.CHOSEN else (half, [None] * len(self.levels))
            return self.run(dict(values), symbols, *given, None, self._donated | spared, draws, probe)

        before, devices = _last_sampled[0], {v.device for v in values.values() if isinstance(v, Tensor)}
        try:
            return measure(evaluate, budget, self._parameters, half[0] / max(1, size - half[0]), devices)
        finally:
            _last_sampled[0] = before  # the result is exact: a graph below may leave out rows

    def _run_on_all(self, values: dict[str, Any], symbols: Mapping[sympy.Symbol, int], spared: frozenset[str]) -> list[Any]:
        """Run the backward pass on all rows, by the code for the whole batch if there is some for its size. `values` is emptied."""
        if self.whole is None or self.whole.sizes != symbols:
            return self.run(values, symbols, [self._samples(symbols)] * len(self.levels), [None] * len(self.levels), None, spared)
        inputs = [copy_keeping_strides(v) if name in spared else v for name, v in values.items()]
        values.clear()
        return self.whole.call(inputs)

    def _watched(self, values: Mapping[str, Any], counts: Sequence[int], controls: Sequence[RowControl | None]) -> bool:
        """Let observing controllers see this step's gradient norms without dropping rows; return False if some norms are not available."""
        watching = [level for level, c in enumerate(controls) if c is not None and c.should_observe and self._entering[level]]
        if any(e.name not in values for level in watching for e in self._entering[level]):
            return False
        for level in watching:
            self._choose(level, values, dict.fromkeys(values, ALL_ROWS), [None] * level, counts[level], counts, controls[level])
        return True

    def _follow(self, values: Mapping[str, Any], symbols: Mapping[sympy.Symbol, int]) -> tuple[RowSelection | None, bool]:
        """Return the rows that an earlier graph of this backward pass selected, if all entering gradients come from there, and whether rows may be dropped.

        Leaving out rows whose gradients are already zero changes nothing. Where other gradients have been added to them all rows are needed: a second
        selection would add variance that the settings do not account for. All rows are needed as well above what is not linear in the gradient.
        """
        entering = [e for s in self.partition.stages if s.level != ALL_ROWS for e in s.entries if e.gradient and e.source in (SAVED, ALL_ROWS)]
        size = self._samples(symbols)
        marks = [
            selection_of(values[e.name]) if e.source == SAVED and e.layout == SampleLayout(0) and values[e.name].shape[0] == size else None for e in entering
        ]
        first = marks[0] if marks else None
        if first is not None and all(m is not None and m[0] is first[0] for m in marks):
            idx, before = first
            if self._legal(len(idx), symbols) == len(idx):
                return RowSelection(idx, None, len(idx), before), True
        task = _torch.current_backward_id()
        return None, (task < 0 or task != _last_sampled[0]) and not is_nonlinear_below(_torch.current_backward_node())

    def _values(self, args: Sequence[Any]) -> dict[sympy.Symbol, int]:
        return {s: _torch.size_at(args, i, d) for s, i, d in self._symbols}

    def _samples(self, symbols: Mapping[sympy.Symbol, int]) -> int:
        """The number of samples in the batch of a call."""
        return symbols[self.partition.batch.symbol] // self.partition.batch.group

    def _counts(self, symbols: Mapping[sympy.Symbol, int], controls: Sequence[RowControl | None], followed: RowSelection | None) -> list[int]:
        """Return the number of rows kept at each level, which never exceeds that of the previous level.

        If an earlier graph selected the rows (`followed`), the first level keeps these, and its control is not asked.
        """
        size = most = self._samples(symbols)
        counts = []
        for level, (asked, control) in enumerate(zip(self.levels, controls, strict=True)):
            if level == 0 and followed is not None:
                most = followed.k
            elif self._entering[level]:
                ratio = control.start_step() if control is not None else asked.ratio
                assert ratio is not None
                most = min(most, self._legal(max(asked.min_k, LEAST_ROWS, int(ratio * size + 0.5)), symbols))
            counts.append(most)
        return counts

    def _legal(self, k: int, symbols: Mapping[sympy.Symbol, int]) -> int:
        """The smallest number of rows, `k` or more, that satisfies everything that the compiled code assumes of the batch's size."""
        key = (k, *symbols.values())
        if len(self._legal_counts) > MAX_CACHED_SIZES:
            self._legal_counts.clear()
        if key not in self._legal_counts:
            size, batch = self._samples(symbols), self.partition.batch
            legal = (n for n in range(k, size) if all(_torch.guard_holds(g, {**symbols, batch.symbol: n * batch.group}) for g in self.guards))
            self._legal_counts[key] = next(legal, size)
        return self._legal_counts[key]

    def run(
        self,
        values: dict[str, Any],
        symbols: Mapping[sympy.Symbol, int],
        counts: Sequence[int],
        controls: Sequence[RowControl | None],
        followed: RowSelection | None = None,
        spared: frozenset[str] = frozenset(),
        draws: Draws | None = None,
        probe: Probe | None = None,
    ) -> list[Any]:
        """Run one backward pass with given numbers of rows.

        Args:
            values: The inputs of the backward graph by name. The dictionary is emptied.
            symbols: The values of the symbols in this call.
            counts: The number of rows that each level keeps.
            controls: The control of each level, None for a level with a fixed ratio.
            followed: The rows of the first level, if an earlier graph of this backward pass selected them.
            spared: The names of the inputs that must not be written to. Compiled code gets copies of them.
            draws: The source of the random numbers that select rows; None for torch's own stream.
            probe: What a measurement asks of this pass, if it is for one.

        Returns:
            The outputs of the backward graph.
        """
        size = self._samples(symbols)
        plan = self._plan(symbols, counts)
        kept: list[RowSelection | None] = [] if followed is None else [followed]
        live = dict(values)
        values.clear()
        made: dict[str, int] = dict.fromkeys(live, ALL_ROWS)
        for s, (stage, call) in enumerate(zip(self.partition.stages, self.calls, strict=True)):
            while len(kept) < stage.level:
                level = len(kept)
                kept.append(self._choose(level, live, made, kept, size, counts, controls[level], draws, probe))
            inputs = []
            for entry, shape in zip(stage.entries, plan[s], strict=True):
                value = self._entry(entry, shape, stage.level, live, made, kept, size)
                shared = entry.name in spared and value.data_ptr() == live[entry.name].data_ptr()
                inputs.append(copy_keeping_strides(value) if shared else value)
                if self._last_use.get(entry.name) == s:
                    live.pop(entry.name, None)
            outputs = call(inputs)
            for name, value in zip(stage.outputs, outputs, strict=True):
                live[name] = value
                made[name] = stage.level
        if any(k is not None for k in kept):
            note_sampled()
        return [self._result(r, live, made, kept, size, symbols) for r in self.partition.results]

    # --- rows ---

    def _choose(
        self,
        level: int,
        live: Mapping[str, Any],
        made: Mapping[str, int],
        kept: Sequence[RowSelection | None],
        size: int,
        counts: Sequence[int],
        control: RowControl | None,
        draws: Draws | None = None,
        probe: Probe | None = None,
    ) -> RowSelection | None:
        """Select the rows of level `level` + 1 by the norms of the gradients that enter it; None for all rows of the previous level."""
        before = counts[level - 1] if level else size
        k = counts[level]
        watched = control if control is not None and control.should_observe else None
        if k >= before and watched is None:
            return None
        total: Tensor | None = None
        for entry in self._entering[level]:
            if entry.name not in made or made[entry.name] > level:
                continue
            entry_norms_sq = row_norms_sq(live[entry.name], entry.layout, counts[made[entry.name] - 1] if made[entry.name] else size)
            idx, weight = _path(kept, made[entry.name], level)
            entry_norms_sq = entry_norms_sq if idx is None else entry_norms_sq[idx]
            entry_norms_sq = entry_norms_sq if weight is None else entry_norms_sq * weight.square()
            total = entry_norms_sq if total is None else total + entry_norms_sq
        assert total is not None
        if watched is not None:
            watched.observe(total, self._floors[level])
        if k >= before:
            return None
        method = self.levels[level].method if probe is None or probe.rows is not Rows.UNIFORM else "uniform"
        if probe is not None:
            variance, square = added_variance(total, [k / len(total)], self._floors[level])
            probe.predicted.append(variance / square)
        random = draws.random(total.device) if draws is not None and method != "topk" else None
        idx, weight = choose_rows(method, with_floor(total, self._floors[level]) if self._floors[level] and method != "uniform" else total, k, random)
        return RowSelection(idx, weight, k)

    def _entry(
        self, entry: StageInput, shape: Any, level: int, live: Mapping[str, Any], made: Mapping[str, int], kept: Sequence[RowSelection | None], size: int
    ) -> Any:
        """The value of a stage's input with the rows of the stage's level: gathered from a larger level, or put back among all rows."""
        if entry.number is not None:
            return shape
        if entry.name == WEIGHTS:
            weights, like = _weights(kept, level), self._weights
            return torch.ones(shape[0], dtype=like.dtype, device=like.device) if weights is None else weights.to(like.dtype)
        value = live[entry.name]
        stride = shape[1] if entry.source != SAVED or (level and entry.name in self._dense) else None  # a stage's result may have got others
        if entry.layout is None or made[entry.name] == level:
            return with_strides(value, stride)
        if level == ALL_ROWS:
            return put_rows(value, entry.layout, _path(kept, ALL_ROWS, made[entry.name])[0], size, *shape)
        idx, weight = _path(kept, made[entry.name], level)
        return with_strides(value, stride) if idx is None else take_rows(value, entry.layout, idx, weight if entry.gradient else None, *shape)

    def _result(
        self,
        result: BackwardOutput,
        live: Mapping[str, Any],
        made: Mapping[str, int],
        kept: Sequence[RowSelection | None],
        size: int,
        symbols: Mapping[Any, int],
    ) -> Any:
        """An output of the backward graph. If it was computed on selected rows, these are put back among all rows and the result is marked with them."""
        if result.name is None:
            return result.constant
        value = live[result.name]
        if result.layout is None:
            return value
        idx, _ = _path(kept, ALL_ROWS, made[result.name])
        full = put_rows(value, result.layout, idx, size, [number_of(e, symbols) for e in result.size])
        if idx is not None and result.layout == SampleLayout(0):
            mark_selection(full, idx, _weights(kept, made[result.name]))
        return full

    def _plan(self, symbols: Mapping[sympy.Symbol, int], counts: Sequence[int]) -> list[list[Any]]:
        """The size and stride of every input of every stage (or its value, if it is a number), for these symbols and numbers of rows."""
        key = (*symbols.values(), *counts)
        if len(self._plans) > MAX_CACHED_SIZES:
            self._plans.clear()
        if key not in self._plans:
            plan, size, batch = [], self._samples(symbols), self.partition.batch
            for stage in self.partition.stages:
                count = counts[stage.level - 1] if stage.level != ALL_ROWS else size
                here = dict(symbols) | ({batch.symbol: count * batch.group} if count != size else {})
                plan.append([shape_of(e, here, symbols) for e in stage.entries])
            self._plans[key] = plan
        return self._plans[key]


_all_rows = [False]


@contextlib.contextmanager
def all_rows() -> Iterator[None]:
    """Run backward passes inside on all rows, without any controller observing them."""
    before, _all_rows[0] = _all_rows[0], True
    try:
        yield
    finally:
        _all_rows[0] = before


_last_sampled = [-1]
"""The backward pass in which rows or tokens were last dropped, by the number that torch gives it."""


def note_sampled() -> None:
    """Note that entries of the batch were dropped in the backward pass that is running."""
    _last_sampled[0] = _torch.current_backward_id()
