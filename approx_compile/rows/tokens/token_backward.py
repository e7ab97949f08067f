"""Run a compiled backward graph whose regions keep some of their tokens: decide how many before the call, and observe the norms that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.config.resolve import LEAST_ROWS, RowSettings
from approx_compile.reasons.rows import UNMEASURED_MEMORY
from approx_compile.rows import row_backward, row_cost
from approx_compile.rows.bare_names import Owner
from approx_compile.rows.controller import Draws, TokenControl
from approx_compile.rows.gather_rows import copy_keeping_strides
from approx_compile.rows.graph_controls import GraphControls
from approx_compile.rows.nonlinear_below import is_nonlinear_below
from approx_compile.rows.row_backward import MAX_CACHED_SIZES
from approx_compile.rows.stage_shapes import number_of
from approx_compile.rows.tokens.token_variance import TokenBudget, predicted_variance
from approx_compile.rows.variance_budget import some_entries

_LARGEST_SEED = 2**62

MOST_KEPT = 0.8
"""The most of its regions' FLOPs at which a graph runs on tokens. Choosing and gathering them takes about 7% of a step, so that 0.88 is where nothing is won
(four blocks of width 512 on 16 x 128 tokens, six of width 384 on 32 x 48)."""


@dataclass(frozen=True)
class RegionPlan:
    """What holds for a region of a compiled graph.

    Attributes:
        size: The number of its tokens, an expression in the graph's symbols.
        settings: What is asked of its tokens.
        layers: The names of the layers in it.
        flops: The FLOPs of its products on all tokens.
    """

    size: Any
    settings: RowSettings
    layers: tuple[str, ...]
    flops: int

    @property
    def place(self) -> str:
        """The layers in words."""
        return ", ".join(self.layers) or "the backward pass"


class TokenControls(GraphControls):
    """Finds the controls and draws of one graph, with a control for each region.

    Attributes:
        weights: For each region the factor of the variance that it may add.
    """

    weights: Sequence[float] = ()
    kind = TokenControl
    budget_kind = TokenBudget

    def budget(self, owner: Owner | None) -> TokenBudget | None:
        """Return the budget of this graph for an owner; None where no share is found during the run."""
        budget = super().budget(owner)
        assert budget is None or isinstance(budget, TokenBudget)
        if budget is not None:
            budget.begin_with_excess(self.ratios.count(None))
        return budget

    def of(self, owner: Owner | None) -> list[TokenControl | None]:  # type: ignore[override]
        """Return the control of every region for an owner, with None for the regions whose ratio is fixed."""
        controls = [c if isinstance(c, TokenControl) else None for c in super().of(owner)]
        for c, weight in zip(controls, self.weights, strict=True):
            if c is not None:
                c.weight = weight
        return controls


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
        controls: TokenControls,
        donated: Iterable[str] = (),
        whole: Callable[[list[Any]], Sequence[Any]] | None = None,
        parameters: Iterable[int] = (),
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
            parameters: The places of the gradients of parameters among its outputs.
        """
        self.call = call
        self.regions = tuple(regions)
        self.controls = controls
        self.whole = whole
        self.guards = tuple(guards)
        self._names = tuple(names)
        self._counted = tuple(symbols)
        self._symbols = _torch.symbol_sources(example_inputs)
        self._donated = {i for i, n in enumerate(names) if n in set(donated)}
        self._parameters = tuple(dict.fromkeys(parameters))
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
            args[:] = self._with_donated_copied(args)
        if row_backward._all_rows[0] or is_nonlinear_below(_torch.current_backward_node()):
            return self._on_all(args, sizes)
        owner = self.controls.owner(args)
        controls, budget, draws = self.controls.of(owner), self.controls.budget(owner), self.controls.draws(owner)
        counts = self._counts(controls, sizes, symbols)
        if budget is not None:
            begins = budget.start_pass()
            if budget.is_half_done:
                outputs = self._on_all(args, sizes)
                budget.complete([outputs[i] for i in self._parameters])
                return outputs
            if begins and not budget.waits and (probed := self._probed_counts(counts, sizes, symbols, budget)) != sizes:
                return self._measure(args, probed, sizes, controls, draws, budget)
        watched = any(c is not None and c.should_observe for c in controls)
        if self.whole is not None and counts == sizes and not watched:
            return self._on_all(args, sizes)
        outputs, norms = self._on_tokens(args, counts, sizes, draws)
        _observe(controls, norms)
        if counts != sizes:
            row_backward.note_sampled()  # a graph on samples below keeps all of them
        return outputs

    def _on_all(self, args: list[Any], sizes: Sequence[int]) -> list[Any]:
        """Run the backward graph on all tokens. `args` is emptied."""
        if self.whole is not None:
            return list(self.whole(args))
        return self._on_tokens(args, sizes, sizes, None)[0]

    def _on_tokens(self, args: list[Any], counts: Sequence[int], sizes: Sequence[int], draws: Draws | None) -> tuple[list[Any], list[Tensor]]:
        """Run the backward graph on `counts` of `sizes` tokens; return its outputs and the squared norms of each region's tokens. `args` is emptied."""
        if draws is None or counts == sizes:
            seeds = torch.zeros(len(sizes), dtype=torch.int64)
        else:
            seeds = torch.randint(_LARGEST_SEED, (len(sizes),), generator=draws.random(torch.device("cpu")))
        results = self.call([*args, seeds, *counts])
        args.clear()
        return list(results[: -len(sizes)]), list(results[-len(sizes) :])

    def _with_donated_copied(self, args: Sequence[Any]) -> list[Any]:
        """The arguments, with copies of those that compiled code may write to."""
        return [copy_keeping_strides(v) if i in self._donated else v for i, v in enumerate(args)]

    # --- the variance of the whole gradient ---

    def _probed_counts(self, counts: list[int], sizes: Sequence[int], symbols: Mapping[sympy.Symbol, int], budget: TokenBudget) -> list[int]:
        """The numbers of tokens at which a pass measures: those of the pass, or the most below all tokens if too much variance measured led to all tokens."""
        ladder = budget.settings.ladder
        if counts != sizes or budget.excess <= 1 or len(ladder) == 1:
            return counts
        return [self._legal(i, max(LEAST_ROWS, int(ladder[-2] * n)), n, symbols) for i, n in enumerate(sizes)]

    def _measure(
        self, args: list[Any], counts: list[int], sizes: Sequence[int], controls: Sequence[TokenControl | None], draws: Draws, budget: TokenBudget
    ) -> list[Any]:
        """Run the backward graph on `counts` tokens and then on all, and let the budget begin a measurement. The outputs are those on all tokens."""
        devices = {v.device for v in args if isinstance(v, Tensor)}
        try:
            with _torch.random_state_kept(devices):
                outputs, norms = self._on_tokens(self._with_donated_copied(args), counts, sizes, draws)
            approximate = [some_entries(outputs[i]).clone() for i in self._parameters]
            del outputs
        except torch.OutOfMemoryError:
            budget.declined = UNMEASURED_MEMORY()
            return self._on_all(args, sizes)
        _observe(controls, norms)
        outputs = self._on_all(args, sizes)
        budget.begin(approximate, [outputs[i] for i in self._parameters], predicted_variance(norms, counts))
        return outputs

    # --- how many tokens ---

    def _counts(self, controls: Sequence[TokenControl | None], sizes: Sequence[int], symbols: Mapping[sympy.Symbol, int]) -> list[int]:
        """The number of tokens that each region keeps in this call: all of them where every share is found during the run and too little would be saved."""
        asked = [r.settings for r in self.regions]
        shares = [c.start_step() if c is not None else s.ratio for c, s in zip(controls, asked, strict=True)]
        wanted = [max(s.min_k, LEAST_ROWS, int(share * n + 0.5)) for share, s, n in zip(shares, asked, sizes, strict=True) if share is not None]
        counts = [self._legal(i, min(n, k), n, symbols) for i, (k, n) in enumerate(zip(wanted, sizes, strict=True))]
        worthwhile = self._is_worthwhile(counts, sizes)
        for control, share in zip(controls, shares, strict=True):
            if control is not None and share is not None:
                control.keep(share if worthwhile else 1.0)
        return counts if worthwhile else list(sizes)

    def _is_worthwhile(self, counts: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether the graph on some of the tokens is expected to be faster than that on all."""
        if self.whole is None or row_cost.ANY_SIZE:
            return True
        flops = [r.flops for r in self.regions]
        kept = sum(f * k / n for f, k, n in zip(flops, counts, sizes, strict=True) if n)
        return kept <= MOST_KEPT * sum(flops)

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


def _observe(controls: Sequence[TokenControl | None], norms_sq: Sequence[Tensor]) -> None:
    """Let the controls that observe this pass see the squared norms of their regions' tokens."""
    for control, norms in zip(controls, norms_sq, strict=True):
        if control is not None and control.should_observe:
            control.observe(norms)
