"""A backward pass on some rows of the batch: compiled once, with a symbol for the batch, and called with fewer rows.

`RowCompiler` stands between AOTAutograd and Inductor: it splits the backward graph at its cuts (`passes.stages`) and compiles the pieces.
`RowBackward` runs them: chooses rows by the norm of their gradient, gathers what the pieces need of them, and puts input gradients back in place.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from approx_compile import _torch
from approx_compile.config import LEAST_ROWS, ApproxConfig, RowSettings
from approx_compile.control import Control, control_for
from approx_compile.kernels.rows import choose
from approx_compile.passes.batch_norm import WEIGHTS
from approx_compile.passes.rows import Layout, Rows
from approx_compile.passes.stages import ALL, SAVED, Cut, Entry, Outlook, Result, Split, Stage, outlook, output_layouts, split, tangent_layouts

LEAST_SHARE = 0.3
"""Under the policies that look at the cost: the share of the backward pass's FLOPs that must run on the rows kept."""


class Declined(Exception):
    """Row sampling is not worth it in this graph; the message says why."""


class RowCompiler:
    """An `inner_compile` for one call of `compile_fx`. `batch`: the symbol of the batch's size; `root`, `key`: the module and the graph of it that
    adaptive state belongs to."""

    def __init__(self, batch: sympy.Symbol, config: ApproxConfig, inner: Callable[..., Any] | None, root: nn.Module | None = None, key: str = "") -> None:
        self.batch = batch
        self.config = config
        self.root = root
        self.key = key
        self.inner = inner or _torch.compile_graph
        self.levels: list[RowSettings] = []
        self.default = ALL
        self.cuts: list[Cut] = []
        self._known: dict[str, Layout] = {}

    def ask(self, graph: fx.Graph, top: RowSettings | None, sites: Mapping[fx.Node, RowSettings | None]) -> None:
        """Levels for what is asked, the most rows first; written on the gradient products. Raises Declined if it will not be worth it."""
        distinct = dict.fromkeys(s for s in (top, *sites.values()) if s is not None)
        self.levels = sorted(distinct, key=lambda s: -1.0 if s.ratio is None else -s.ratio)
        self.default = self._level(top)
        for node, settings in sites.items():
            node.meta[LEVEL] = self._level(settings)
        if _torch.has_backward(graph):
            found = outlook(graph, self.batch, self.default, {n.name: n.meta[LEVEL] for n in sites}, self._approximate_batch_norm)
            reason = found.why_not(self._least_share)
            if reason is not None:
                self._note(found, {}, graph, reason)
                raise Declined(reason)

    @property
    def _approximate_batch_norm(self) -> bool:
        return any(s.approximate_batch_norm for s in self.levels)

    @property
    def _least_share(self) -> float:
        return 0.0 if self.config.policy == "always" else LEAST_SHARE

    def _level(self, settings: RowSettings | None) -> int:
        return self.levels.index(settings) + 1 if settings is not None else ALL

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **kwargs: Any) -> Any:
        if not is_backward:
            self._known |= output_layouts(gm.graph, self.batch)
            return self.inner(gm, example_inputs, is_backward=False, **kwargs)
        given = [n.name for n in _placeholders(gm)]
        known = self._known | tangent_layouts(gm.graph, self._known)
        plain = copy.deepcopy(gm) if self._approximate_batch_norm else gm
        found = split(gm, self.batch, known, self.default, _levels_of(gm), self._approximate_batch_norm)
        exact = found.outlook.why_not(self._least_share)
        self._note(found.outlook, found.products, gm.graph, exact)
        if exact is not None:
            return self.inner(plain, example_inputs, is_backward=True, **kwargs)
        return self._compiled(found, gm, given, example_inputs, kwargs)

    def _note(self, found: Outlook, products: Mapping[str, int], graph: fx.Graph, exact: str | None) -> None:
        rows = next((_torch.hint(s) for n in graph.nodes if n.op == "placeholder" for s in _sizes(n) if _torch.size_expr(s) == self.batch), 0)
        for i, asked in enumerate(self.levels, 1):
            mine = tuple(name for name, level in products.items() if level == i)
            if exact is None and not mine:
                continue
            stops = "; ".join(found.blocked)
            reason = exact or (f"rows end where {stops}" if stops else "the whole backward pass")
            decision = "exact" if exact else "rows"
            self.cuts.append(Cut(asked.method, asked.ratio, rows, decision, reason, found.flops_all, found.flops_on_rows, mine, i))

    def _compiled(self, found: Split, gm: fx.GraphModule, names: Sequence[str], example_inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, example_inputs, strict=True))  # may have other strides than the graph says
        donated = _torch.donated(gm)
        uses: dict[str, int] = {}
        for stage in found.stages:
            for entry in stage.entries:
                uses[entry.name] = uses.get(entry.name, 0) + 1
        found = _restrided(found, given)
        calls = []
        for stage in found.stages:
            inputs = [given.get(e.name, n.meta["val"]) for e, n in zip(stage.entries, _placeholders(stage.gm), strict=True)]
            mine = [i for i, e in enumerate(stage.entries) if e.name in donated and uses[e.name] == 1]
            static = [i for i, e in enumerate(stage.entries) if e.source == SAVED and e.layout is None and e.number is None and e.name not in donated]
            with _torch.donating(mine):
                calls.append(self.inner(stage.gm, inputs, is_backward=True, **(kwargs | {"static_input_idxs": static})))
        guards = _torch.guards_on(self.batch, gm)
        backward = RowBackward(
            found, calls, self.levels, names, example_inputs, guards, donated, _Controls(self.config, self.root, self.key, self.levels)
        )

        def call(args: list[Any]) -> list[Any]:  # wrappers on the way keep a function's attributes, not an object's
            return backward(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


def _levels_of(gm: fx.GraphModule) -> dict[str, int]:
    return {n.name: n.meta[LEVEL] for n in gm.graph.nodes if LEVEL in n.meta}


LEVEL = "approx_compile_rows"
"""Key in the meta of a gradient product's node: the level of rows that its site asks for."""


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _sizes(n: fx.Node) -> Sequence[Any]:
    value = n.meta.get("val")
    return value.shape if n.op == "placeholder" and isinstance(value, Tensor) else (value,) if isinstance(value, torch.SymInt) else ()


def _restrided(found: Split, given: Mapping[str, Any]) -> Split:
    """Entries with the strides that the forward pass really gives its saved tensors."""
    from dataclasses import replace

    def of(e: Entry) -> Entry:
        value = given.get(e.name)
        if e.source != SAVED or not isinstance(value, Tensor):
            return e
        return replace(e, stride=tuple(map(_torch.size_expr, value.stride())))

    return replace(found, stages=tuple(replace(s, entries=tuple(of(e) for e in s.entries)) for s in found.stages))


# --- what runs ---


@dataclass
class _Kept:
    """The rows of one level: `idx` among the rows of the level before (sorted), `weight` on them (None: 1), `k` of them."""

    idx: Tensor
    weight: Tensor | None
    k: int
    before: Tensor | None = None
    """The weights that these rows' gradients had already, where a graph further up chose them."""


@dataclass(frozen=True)
class _Sizes:
    """Everything that follows from the symbols' values and the rows kept: the numbers and shapes of every entry, by stage."""

    entries: tuple[tuple[Any, ...], ...]


class RowBackward:
    """The compiled backward pass of one graph, called as AOTAutograd calls it (boxed).

    Rows of all levels are chosen on the device; how many is an integer known before the call, so no step waits for the device.
    """

    def __init__(
        self,
        found: Split,
        calls: Sequence[Callable[..., Any]],
        levels: Sequence[RowSettings],
        names: Sequence[str],
        example_inputs: Sequence[Any],
        guards: Sequence[Any],
        donated: set[str],
        controls: _Controls,
    ) -> None:
        self.found = found
        self.calls = tuple(calls)
        self.levels = tuple(levels)
        self.names = tuple(names)
        self.controls = controls
        self.donated = donated
        self.guards = tuple(guards)
        self.device = next((v.device for v in example_inputs if isinstance(v, Tensor)), torch.device("cpu"))
        self._symbols = _symbol_sources(names, example_inputs)
        self._last_use = _last_use(found)
        self._legal_counts: dict[tuple[Any, ...], int] = {}
        self._plans: dict[tuple[Any, ...], list[list[Any]]] = {}

    def __call__(self, args: list[Any]) -> list[Any]:
        symbols = self._values(args)
        values = dict(zip(self.names, args, strict=True))
        args.clear()
        controls = self.controls.of(values.values())
        counts = self._counts(symbols[self.found.batch], symbols, controls)
        followed, own = self._follow(values, symbols)
        if followed is not None or not own:
            most = followed.k if followed is not None else symbols[self.found.batch]
            counts = [most, *(min(most, k) for k in counts[1:])] if followed is not None else [most] * len(counts)
        return self.run(values, symbols, counts, controls, followed)

    def _follow(self, values: Mapping[str, Any], symbols: Mapping[sympy.Symbol, int]) -> tuple[_Kept | None, bool]:
        """The rows that a graph further up in this backward pass chose, if all gradients come from there; and whether this one may choose its own.

        Rows that are zero already can be left out for nothing. Where other gradients have been added, all rows are needed; choosing among them anew
        would add variance that nobody has accounted for.
        """
        task = _torch.backward_pass()
        first = next((s for s in self.found.stages if s.level == 1), None)
        gradients = [values[e.name] for e in first.entries if e.gradient and e.source == SAVED] if first is not None else []
        marks = [_mark_of(t) for t in gradients]
        if marks and marks[0] is not None and all(m is not None and m[0] is marks[0][0] for m in marks):
            idx, before = marks[0]
            if self._legal(len(idx), symbols) == len(idx):
                return _Kept(idx, None, len(idx), before), True
        return None, task < 0 or task != _last_sampled[0]

    def _values(self, args: Sequence[Any]) -> dict[sympy.Symbol, int]:
        return {s: args[i] if d is None else args[i].shape[d] for s, i, d in self._symbols}

    def _counts(self, size: int, symbols: Mapping[sympy.Symbol, int], controls: Sequence[Control | None]) -> list[int]:
        """Rows kept at each level, never more than at the level before."""
        counts, most = [], size
        for asked, control in zip(self.levels, controls, strict=True):
            ratio = control.begin() if control is not None else asked.ratio
            assert ratio is not None
            most = min(most, self._legal(max(asked.min_k, LEAST_ROWS, int(ratio * size + 0.5)), symbols))
            counts.append(most)
        return counts

    def _legal(self, k: int, symbols: Mapping[sympy.Symbol, int]) -> int:
        """The smallest number of rows, k or more, of which everything is true that the compiled code assumed of the batch's size."""
        key = (k, *symbols.values())
        if key not in self._legal_counts:
            size = symbols[self.found.batch]
            legal = (n for n in range(k, size) if all(g.subs(dict(symbols) | {self.found.batch: n}) == sympy.true for g in self.guards))
            self._legal_counts[key] = next(legal, size)
        return self._legal_counts[key]

    def run(
        self,
        values: dict[str, Any],
        symbols: Mapping[sympy.Symbol, int],
        counts: Sequence[int],
        controls: Sequence[Control | None],
        followed: _Kept | None = None,
    ) -> list[Any]:
        """One backward pass with `counts` rows at each level; `followed`: the first level's rows, if they are given."""
        size = symbols[self.found.batch]
        plan = self._plan(symbols, counts)
        kept: list[_Kept | None] = [] if followed is None else [followed]
        live = dict(values)
        values.clear()
        made: dict[str, int] = dict.fromkeys(live, ALL)
        for s, (stage, call) in enumerate(zip(self.found.stages, self.calls, strict=True)):
            while len(kept) < stage.level:
                level = len(kept)
                kept.append(self._choose(stage, level, live, made, kept, size, counts, controls[level]))
            inputs = []
            for entry, shape in zip(stage.entries, plan[s], strict=True):
                inputs.append(self._entry(entry, shape, stage.level, live, made, kept, size))
                if self._last_use.get(entry.name) == s:
                    live.pop(entry.name, None)
            outputs = call(inputs)
            for name, value in zip(stage.outputs, outputs, strict=True):
                live[name] = value
                made[name] = stage.level
        if any(k is not None for k in kept):
            _last_sampled[0] = _torch.backward_pass()
        return [self._result(r, live, made, kept, size, symbols) for r in self.found.results]

    # --- rows ---

    def _choose(
        self,
        stage: Stage,
        level: int,
        live: Mapping[str, Any],
        made: Mapping[str, int],
        kept: Sequence[_Kept | None],
        size: int,
        counts: Sequence[int],
        control: Control | None,
    ) -> _Kept | None:
        """The rows of level + 1, by the norms of the gradients that enter the stage there. None: all that the level before has."""
        before = counts[level - 1] if level else size
        k = counts[level]
        watched = control if control is not None and control.watches else None
        if k >= before and watched is None:
            return None
        total: Tensor | None = None
        for entry in stage.entries:
            if not entry.gradient or made[entry.name] > level:
                continue
            own = row_norms_sq(live[entry.name], entry.layout, counts[made[entry.name] - 1] if made[entry.name] else size)
            idx, weight = _path(kept, made[entry.name], level)
            own = own if idx is None else own[idx]
            own = own if weight is None else own * weight.square()
            total = own if total is None else total + own
        assert total is not None
        if watched is not None:
            watched.see(total)
        if k >= before:
            return None
        idx, weight = choose(self.levels[level].method, total, k)
        return _Kept(idx, weight, k)

    def _entry(self, entry: Entry, shape: Any, level: int, live: Mapping[str, Any], made: Mapping[str, int], kept: Sequence[_Kept | None], size: int) -> Any:
        if entry.number is not None:
            return shape
        if entry.name == WEIGHTS:
            weights = _weights(kept, level)
            return torch.ones(shape[0], device=self.device) if weights is None else weights.float()
        value = live[entry.name]
        if entry.layout is None or made[entry.name] == level:
            return value
        if level == ALL:
            return scattered(value, entry.layout, _path(kept, ALL, made[entry.name])[0], size, shape[0])
        idx, weight = _path(kept, made[entry.name], level)
        if idx is None:
            return value
        return gathered(value, entry.layout, idx, weight if entry.gradient else None, *shape)

    def _result(
        self, result: Result, live: Mapping[str, Any], made: Mapping[str, int], kept: Sequence[_Kept | None], size: int, symbols: Mapping[Any, int]
    ) -> Any:
        if result.name is None:
            return result.constant
        value = live[result.name]
        if result.layout is None:
            return value
        idx, _ = _path(kept, ALL, made[result.name])
        full = scattered(value, result.layout, idx, size, [_number(e, symbols) for e in result.size])
        if idx is not None and result.layout == Rows(0):
            _mark(full, idx, _weights(kept, made[result.name]))
        return full

    def _plan(self, symbols: Mapping[sympy.Symbol, int], counts: Sequence[int]) -> list[list[Any]]:
        """Shape and stride (or number) of every entry, for these symbols and counts."""
        key = (*symbols.values(), *counts)
        if key not in self._plans:
            plan = []
            for stage in self.found.stages:
                here = dict(symbols) | ({self.found.batch: counts[stage.level - 1]} if stage.level != ALL else {})
                plan.append([_shape_of(e, here, symbols) for e in stage.entries])
            self._plans[key] = plan
        return self._plans[key]


class _Controls:
    """Where the controls of a graph's cuts are found: with a parameter among what was saved, or else with the module that was compiled."""

    def __init__(self, config: ApproxConfig, root: nn.Module | None, key: str, levels: Sequence[RowSettings]) -> None:
        self.adaptive = config.adaptive
        self.key = key
        self.root = weakref.ref(root) if root is not None else None
        self.asked = [s.ratio is None for s in levels]
        self.own = [Control(config.adaptive, f"{key}{i}") for i, _ in enumerate(levels, 1)]

    def of(self, saved: Iterable[Any]) -> list[Control | None]:
        """One for every level whose ratio is to be found."""
        if not any(self.asked):
            return [None] * len(self.asked)
        owner = next((v for v in saved if isinstance(v, nn.Parameter)), self.root() if self.root is not None else None)
        if owner is None:
            return [c if a else None for a, c in zip(self.asked, self.own, strict=True)]
        return [control_for(owner, self.adaptive, f"{self.key}{i}") if a else None for i, a in enumerate(self.asked, 1)]


_last_sampled = [-1]
"""The backward pass (torch's number of it) in which rows were last left out."""

_ROWS_MARK = "_approx_compile_rows"


def _mark(gradient: Tensor, idx: Tensor, weight: Tensor | None) -> None:
    """Tell the graph that gets this gradient next which of its rows are not zero. Whatever is added in place makes the mark invalid."""
    setattr(gradient, _ROWS_MARK, (idx, weight, gradient._version))


def _mark_of(gradient: Tensor) -> tuple[Tensor, Tensor | None] | None:
    idx, weight, version = getattr(gradient, _ROWS_MARK, (None, None, None))
    return (idx, weight) if version == gradient._version else None


def _weights(kept: Sequence[_Kept | None], level: int) -> Tensor | None:
    """All the weight that the rows of a level have; None: 1."""
    _, weight = _path(kept, ALL, level)
    first = next((k for k in kept[:level] if k is not None), None)
    if first is None or first.before is None:
        return weight
    idx, _ = _path(kept, kept.index(first) + 1, level)
    before = first.before if idx is None else first.before[idx]
    return before if weight is None else before * weight


def _shape_of(entry: Entry, here: Mapping[Any, int], whole: Mapping[Any, int]) -> Any:
    if entry.number is not None:
        if entry.dtype is not None:
            return torch.tensor(_number(entry.number, whole), dtype=entry.dtype)
        return _number(entry.number, here)
    return [_number(e, here) for e in entry.size], [_number(e, here) for e in entry.stride]


def _number(expression: Any, symbols: Mapping[Any, int]) -> Any:
    value = expression.subs(symbols)
    return int(value) if value.is_Integer else float(value)


def _symbol_sources(names: Sequence[str], example_inputs: Sequence[Any]) -> list[tuple[sympy.Symbol, int, int | None]]:
    """For every symbol an input, and the dim of it, that has its value."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for i, value in enumerate(example_inputs):
        sizes = list(enumerate(value.shape)) if isinstance(value, Tensor) else [(None, value)] if isinstance(value, torch.SymInt) else []
        for d, s in sizes:
            if (e := _torch.size_expr(s)).is_Symbol:
                found.setdefault(e, (i, d))  # type: ignore[arg-type]
    return [(s, i, d) for s, (i, d) in found.items()]


def _last_use(found: Split) -> dict[str, int]:
    """The last stage that reads a value, for those that are no outputs of the graph."""
    last = {e.name: s for s, stage in enumerate(found.stages) for e in stage.entries}
    for r in found.results:
        last.pop(r.name or "", None)
    return last


def _path(kept: Sequence[_Kept | None], start: int, end: int) -> tuple[Tensor | None, Tensor | None]:
    """The rows of level `end` among those of level `start` (0: all), and the weights picked up on the way; None: all of them; 1."""
    idx: Tensor | None = None
    weight: Tensor | None = None
    for step in kept[start:end]:
        if step is None:
            continue
        idx = step.idx if idx is None else idx[step.idx]
        carried = weight[step.idx] if weight is not None else None
        weight = step.weight if carried is None else carried if step.weight is None else carried * step.weight
    return idx, weight


def _unfolded(value: Tensor, layout: Rows, size: int) -> tuple[Tensor, int]:
    """The tensor with its rows in a dim of their own, and that dim."""
    total = value.shape[layout.dim]
    inner = total // size if layout.uniform else int(layout.inner) if layout.inner.is_Integer else None
    if inner is None:  # sizes of other symbols: what the batch and the outer part leave
        outer = int(layout.outer) if layout.outer.is_Integer else None
        if outer is None:
            raise RuntimeError(f"rows between two axes of symbolic size: {layout}")
        inner = total // size // outer
    if inner == 1 and total == size:
        return value, layout.dim
    outer = total // (size * inner)
    return value.unflatten(layout.dim, (outer, size, inner)), layout.dim + 1


def row_norms_sq(value: Tensor, layout: Rows | None, size: int) -> Tensor:
    """Squared Euclidean norm of every row, (size,) in fp32 (fp64 for fp64)."""
    assert layout is not None
    rows, dim = _unfolded(value, layout, size)
    rest = [d for d in range(rows.dim()) if d != dim]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if not rest:
        return rows.to(dtype).square()
    return torch.linalg.vector_norm(rows, dim=rest, dtype=dtype).square()


def gathered(value: Tensor, layout: Rows, idx: Tensor, weight: Tensor | None, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The rows `idx` of a tensor, times their weights, with the strides that the compiled code expects."""
    batch = value.shape[layout.dim] * len(idx) // size[layout.dim]
    rows, dim = _unfolded(value, layout, batch)
    order = sorted(range(rows.dim()), key=lambda d: -rows.stride(d))  # in memory order: whole rows are copied
    at = order.index(dim)
    back = [order.index(d) for d in range(rows.dim())]
    new = rows.permute(order).index_select(at, idx)
    if weight is not None:
        shape = [1] * new.dim()
        shape[at] = len(idx)
        new = new.mul_(weight.view(shape)) if new.dtype == weight.dtype else (new * weight.view(shape)).to(new.dtype)
    new = new.permute(back).reshape(list(size))
    if any(a != b for a, b, s in zip(new.stride(), stride, size, strict=True) if s > 1):
        placed = torch.empty_strided(list(size), list(stride), dtype=new.dtype, device=new.device)
        new = placed.copy_(new)
    return new


def scattered(value: Tensor, layout: Rows, idx: Tensor | None, batch: int, size: Sequence[int]) -> Tensor:
    """Rows put back in their places among `batch`, zeros elsewhere."""
    if idx is None:
        return value
    rows, dim = _unfolded(value, layout, len(idx))
    full = torch.zeros([*rows.shape[:dim], batch, *rows.shape[dim + 1 :]], dtype=value.dtype, device=value.device)
    return full.index_copy_(dim, idx, rows).reshape(list(size))
