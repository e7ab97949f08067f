"""Whether a library model's gradients on tokens are right, region by region: the mean over two choices of a region's tokens is the exact gradient.

Of two complementary sets of tokens one is drawn with probability 0.3 and the other with 0.7, and every token's weight is one over its set's probability. All
other regions keep all tokens. The gradient is linear in what enters the region, so that the mean over the two is the exact gradient up to rounding, unless a
member reads the wrong tokens, is put back in the wrong place or is not linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import checks
import decide
import torch
from models import Model
from torch import Tensor

from approx_compile.rows.tokens import choose_op
from approx_compile.rows.tokens.token_backward import TokenBackward

HALF: dict[str, Any] = {"policy": "always", "grad": {"axis": "tokens", "ratio": 0.5}}
FIRST = 0.3
"""The probability of the first of the two sets."""


class OneRegion:
    """Inside, backward passes keep all tokens of every region but one, of which they keep the tokens that are given."""

    def __init__(self) -> None:
        self.calls = 0
        """The graphs run so far in this backward pass. Equal blocks that are compiled one by one share a graph."""
        self.target: tuple[int, int] = (-1, -1)
        """A graph, by when it runs in a backward pass, and a region of it."""
        self.kept: Tensor | None = None
        self.weight = 1.0
        self.sizes: dict[tuple[int, int], int] = {}
        self.places: dict[tuple[int, int], str] = {}
        self.chosen = 0

    def __enter__(self) -> OneRegion:
        self._before = TokenBackward._counts, choose_op.choose_rows
        one = self

        def counts(self: TokenBackward, controls: Any, sizes: Sequence[int], symbols: Mapping[Any, int]) -> list[int]:
            for i, n in enumerate(sizes):
                one.sizes[one.calls, i], one.places[one.calls, i] = n, self.regions[i].place
            found = list(sizes)
            if one.target[0] == one.calls and one.kept is not None:
                found[one.target[1]] = len(one.kept)
            one.calls += 1
            return found

        TokenBackward._counts = counts  # type: ignore[method-assign]
        choose_op.choose_rows = self._choose
        return self

    def __exit__(self, *_: Any) -> None:
        TokenBackward._counts, choose_op.choose_rows = self._before  # type: ignore[method-assign]

    def gradients(self, *given: Any) -> checks.Gradients:
        self.calls = 0
        return checks.gradients(*given)

    def _choose(self, method: str, norms_sq: Tensor, k: int, random: Any = None) -> tuple[Tensor, Tensor]:
        assert self.kept is not None and k == len(self.kept)
        self.chosen += 1
        return self.kept, torch.full((k,), self.weight, dtype=norms_sq.dtype)


def check(entry: Model, dtype: torch.dtype) -> dict[str, Any]:
    """The worst error over the regions of a model, on all tokens and as the mean over two sets of a region's tokens."""
    decide.fresh()
    model = checks.prepared(entry, dtype)
    data = checks.batch(entry, decide.BATCH, dtype)
    want = checks.gradients(entry, model, model, data)
    f = decide.compiled(model, HALF, decide.Watched())
    worst, where = (0.0, ""), ""
    with OneRegion() as one:
        exact = checks.error(one.gradients(entry, model, f, data), want)
        random = torch.Generator().manual_seed(3)
        for region, size in list(one.sizes.items()):
            if size < 4:
                continue
            first = torch.rand(size, generator=random) < 0.5
            first[:2], first[-2:] = True, False  # at least two in each set
            total = {n: torch.zeros_like(w) for n, w in want.items()}
            one.target = region
            for p, members in ((FIRST, first), (1 - FIRST, ~first)):
                (one.kept,) = members.nonzero(as_tuple=True)
                one.weight = 1 / p
                for n, g in one.gradients(entry, model, f, data).items():
                    total[n] += p * g
            found = checks.error(total, want)
            if not found[0] <= worst[0]:
                worst, where = found, one.places[region]
        assert one.chosen == 2 * sum(n >= 4 for n in one.sizes.values())
    return {"regions": len(one.sizes), "exact tokens": exact, "mean tokens": (worst[0], f"{worst[1]}, tokens of {where}")}
