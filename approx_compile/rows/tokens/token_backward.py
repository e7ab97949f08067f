"""Run a compiled backward graph whose regions keep some of their tokens: decide how many before the call, and observe the norms that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from approx_compile import _torch
from approx_compile.config.resolve import LEAST_ROWS, RowSettings
from approx_compile.rows import row_backward
from approx_compile.rows.controller import RowControl, TokenControl
from approx_compile.rows.gather_rows import copy_keeping_strides
from approx_compile.rows.graph_controls import GraphControls
from approx_compile.rows.nonlinear_below import is_nonlinear_below
from approx_compile.rows.row_backward import MAX_CACHED_SIZES
from approx_compile.rows.stage_shapes import number_of

_LARGEST_SEED = 2**62


@dataclass(frozen=True)
class RegionPlan:
    """What holds for a region of a compiled graph.

    Attributes:
        size: The number of its tokens, an expression in the graph's symbols.
        settings: What is asked of its tokens.
        place: The layers in it, in words.
    """

    size: Any
    settings: RowSettings
    place: str


class TokenControls(GraphControls):
    """Finds the controls and draws of one graph, with a control for each region."""

    kind = TokenControl
    measures = False


class TokenBackward:
    """The compiled backward pass of one graph, called as AOTAutograd calls it (boxed)."""

    def __init__(
        self,
        call: Callable[[list[Any]], Sequence[Any]],
        regions: Sequence[RegionPlan],
        symbols: Sequence[sympy.Symbol],
        guards: Sequence[Any],
        names: Sequence[str],
        example_inputs: Sequence[Any],
        controls: GraphControls,
        donated: Iterable[str] = (),
        whole: Callable[[list[Any]], Sequence[Any]] | None = None,
    ) -> None:
        """Store the compiled graph.

        Args:
            call: The compiled graph. Behind the inputs of the backward graph it takes the seeds and the number of tokens of each region, and behind its outputs
                it returns the squared norms of each region's tokens.
            regions: What holds for each region.
            symbols: The symbols of the numbers of tokens.
            guards: The conditions on these that the compiled code assumes.
            names: The names of the backward graph's inputs, in order.
            example_inputs: The inputs that the graph was compiled with, which say where the other symbols are found.
            controls: Where the adaptive ratios and the random numbers of a call come from.
            donated: The names of the inputs that compiled code may write to.
            whole: The backward graph on all tokens; None if there is none.
        """
        self.call = call
        self.regions = tuple(regions)
        self.controls = controls
        self.whole = whole
        self.guards = tuple(guards)
        self._names = tuple(names)
        self._counted = tuple(symbols)
        self._symbols = _torch.symbol_sources(example_inputs)
        self._donated = [i for i, n in enumerate(names) if n in set(donated)]
        self._legal_counts: dict[tuple[Any, ...], int] = {}

    def __call__(self, args: list[Any]) -> list[Any]:
        """Run the backward pass.

        Args:
            args: The inputs of the backward graph. The list is emptied, so that tensors can be freed during the call.

        Returns:
            The outputs of the backward graph.
        """
        symbols = {s: _torch.size_at(args, i, d) for s, i, d in self._symbols}
        sizes = [number_of(sympy.sympify(r.size), symbols) for r in self.regions]
        if self._donated and _torch.graph_is_kept():
            for i in self._donated:
                args[i] = copy_keeping_strides(args[i])
        owner = self.controls.owner(args)
        exact = row_backward._all_rows[0] or is_nonlinear_below(_torch.current_backward_node())
        controls: Sequence[RowControl | None] = [None] * len(sizes) if exact else self.controls.of(owner)
        counts = sizes if exact else [self._count(i, c, sizes[i], symbols) for i, c in enumerate(controls)]
        watched = [(i, c) for i, c in enumerate(controls) if c is not None and c.should_observe]
        if self.whole is not None and counts == sizes and not watched:
            return list(self.whole(args))
        random = self.controls.draws(owner).random(torch.device("cpu")) if counts != sizes else None
        args.append(torch.randint(_LARGEST_SEED, (len(sizes),), generator=random) if counts != sizes else torch.zeros(len(sizes), dtype=torch.int64))
        args.extend(counts)
        results = self.call(args)
        outputs, norms = results[: -len(sizes)], results[-len(sizes) :]
        for i, c in watched:
            c.observe(norms[i])
        return list(outputs)

    def _count(self, i: int, control: RowControl | None, size: int, symbols: Mapping[sympy.Symbol, int]) -> int:
        """The number of tokens that a region keeps in this call."""
        asked = self.regions[i].settings
        ratio = control.start_step() if control is not None else asked.ratio
        assert ratio is not None
        return self._legal(i, min(size, max(asked.min_k, LEAST_ROWS, int(ratio * size + 0.5))), size, symbols)

    def _legal(self, i: int, k: int, size: int, symbols: Mapping[sympy.Symbol, int]) -> int:
        """The smallest number of tokens, `k` or more, that satisfies everything that the compiled code assumes of it."""
        symbol = self._counted[i]
        guards = [g for g in self.guards if symbol in g.free_symbols]
        if not guards:
            return k
        key = (i, k, size, *symbols.values())
        if len(self._legal_counts) > MAX_CACHED_SIZES:
            self._legal_counts.clear()
        if key not in self._legal_counts:
            legal = (n for n in range(k, size) if all(_torch.guard_holds(g, {**symbols, symbol: n}) for g in guards))
            self._legal_counts[key] = next(legal, size)
        return self._legal_counts[key]
