"""Measure how much variance leaving out tokens adds to the gradient of a backward graph's parameters, and correct what the norms in its regions say.

Every region adds variance to the gradients of all layers below it, so that the whole gradient gets more of it than the norms of any one region say. In some
passes the graph is evaluated twice on the same saved tensors, and in the pass after them once in full:

| pass | tokens | gradient | used for |
|---|---|---|---|
| n | as in any other pass | g' | A = |g' - g|^2, the variance added |
| n | all | g | the result of the pass, which is exact |
| n + 1 | all | h | V = |h - g|^2 / 2, the gradient's own variance; the result of the pass, which is exact |

Two batches are independent, and one step changes the mean of the gradient little, so that E |h - g|^2 = 2 V. (`variance_budget` finds V from half of the
samples of one batch. That needs a graph that can run on some of its samples.) The mean over regions of what their norms say predicts P for A / V. Where the
losses of passes alternate, as those of a discriminator do, h - g has the difference of the two means as well, and V would be far too large. Gradients that
point against each other show it; such a measurement counts for nothing.

A and V of one measurement are off by a half or more (MiniLM, batches of 32), and the mean of A / V is larger than that of A over that of V. So `added` and
`predicted` are geometric means, which one small V moves little. (`variance_budget` has arithmetic means: A and V of one batch vary together, and where
samples meet in BatchNorm one explosion of A must count at once.)

Between the two passes g is kept as a sketch of `SKETCH` numbers, so that a checkpoint made there continues as the run would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.rows.row_sampling import added_variance
from approx_compile.rows.variance_budget import MOMENTUM, VarianceBudget, some_entries, squared_distance

SKETCH = 512
"""The numbers of a sketch. The squared distance of two sketches has a relative standard deviation of at most sqrt(2 / 512), 6%."""

AGAINST = -0.3
"""The cosine of g and h below which they are taken for gradients of different losses. Noise alone gives two sketches one of 0.04 either way."""

MOST_CHANGE = 100.0
"""What is measured counts for at most so many times the mean before, or one over so many times: it may be 0."""

FIRST_EXCESS = 2.0
"""The excess before anything is measured, in a graph with several regions. It is 1 to 4 for MiniLM's 36 regions (`benchmarks.accuracy.token_variance`)."""

_EARLY = (1 / 32, 1 / 16, 1 / 8, 1 / 2, 3 / 4)
"""Measurements besides the regular ones, after so many times `probe` passes, while little is known."""


class _Half(NamedTuple):
    """The first half of a measurement: the sketch of the exact gradient, the variances A and P, and the sizes of the parameters' gradients."""

    sketch: Tensor
    added: Tensor
    predicted: Tensor
    sizes: list[list[int]]


class TokenBudget(VarianceBudget):
    """The budget of one backward graph whose regions run on tokens. `excess` is A / V over P, the mean of what the norms of its regions say."""

    left_out = "tokens left out"

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        super().__init__(settings, name)
        self._half: _Half | None = None
        self._task = -1

    def begin_with_excess(self, regions: int) -> None:
        """Take the excess of a graph with so many regions for what it was elsewhere, until something is measured. Without measurements the norms hold."""
        if regions > 1 and self.settings.probe and self.passes == 0:
            self.added = FIRST_EXCESS * self.predicted

    def is_due(self) -> bool:
        """Whether this pass begins a measurement."""
        every = self.settings.probe
        if not self.settings.tau:  # no token with a gradient is left out
            return False
        return super().is_due() or (every > 0 and self.declined is None and self.passes in {int(every * part) for part in _EARLY})

    def _mean(self, before: float, new: float) -> float:
        """The geometric mean of the numbers so far and what was there at first; one with a momentum when there are more. One number counts for little."""
        seen = len(self.measurements) + 1
        momentum = min(MOMENTUM, seen / (seen + 1))
        return float(before**momentum * min(max(new, before / MOST_CHANGE), before * MOST_CHANGE) ** (1 - momentum))

    @property
    def is_half_done(self) -> bool:
        """Whether a measurement waits for the exact gradient of this pass: not for that of another call of the graph in the same backward pass."""
        task = _torch.current_backward_id()
        return self._half is not None and (task < 0 or task != self._task)

    @property
    def waits(self) -> bool:
        """Whether a measurement has begun and is not complete."""
        return self._half is not None

    def begin(self, approximate: Sequence[Tensor], exact: Sequence[Tensor], predicted: Tensor) -> None:
        """Take up the first half of a measurement.

        Args:
            approximate: Some entries (`some_entries`) of the gradients of the parameters on chosen tokens, g'.
            exact: The gradients on all tokens, g.
            predicted: The mean over regions of the variance that their norms say is added, over the sum of squares.
        """
        self._half = _Half(sketch_of(exact), squared_distance(approximate, exact), predicted, _sizes(exact))
        self._task = _torch.current_backward_id()

    def complete(self, exact: Sequence[Tensor]) -> None:
        """Complete a measurement with the gradients h on all tokens of another batch; drop it if they are those of other parameters, or of another loss."""
        half, self._half = self._half, None
        assert half is not None
        if half.sizes != _sizes(exact):
            return
        sketch = sketch_of(exact)
        before, added, predicted = (t.to(sketch.device) for t in half[:3])
        against = (sketch * before).sum() < AGAINST * sketch.norm() * before.norm()
        self.observe(added, torch.where(against, torch.nan, (sketch - before).square().sum() / 2), predicted)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        half = self._half
        return super().state_dict() | ({"half": [half.sketch.tolist(), half.added.item(), half.predicted.item(), half.sizes]} if half is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        super().load_state_dict(state)
        half = state.get("half")
        self._task = -1
        if half is None:
            self._half = None
            return
        sketch, added, predicted = (torch.tensor(v, dtype=torch.float64) for v in half[:3])
        self._half = _Half(sketch, added, predicted, [list(size) for size in half[3]])


def _sizes(gradients: Sequence[Tensor]) -> list[list[int]]:
    return [list(g.shape) for g in gradients]


def sketch_of(gradients: Sequence[Tensor]) -> Tensor:
    """Project gradients to a few numbers such that squared distances are kept on average (Charikar, Chen and Farach-Colton, 2002).

    Every entry is added to one of the numbers with a random sign. The signs are the same in every call and on every device.

    Args:
        gradients: The gradients; of one with more than `MOST_ENTRIES` entries some are used, scaled up.

    Returns:
        (SKETCH,) fp64.
    """
    total = torch.zeros(SKETCH, dtype=torch.float64, device=gradients[0].device)
    random = torch.Generator().manual_seed(0)
    for gradient in gradients:
        entries = some_entries(gradient)
        entries = (torch.view_as_real(entries) if entries.is_complex() else entries).flatten()
        size = -(-entries.numel() // SKETCH) * SKETCH
        signs = torch.randint(0, 2, (entries.numel(),), generator=random, dtype=torch.int8).to(entries.device)
        values = torch.where(signs > 0, entries, -entries).to(torch.float64 if entries.dtype == torch.float64 else torch.float32)
        summed = torch.nn.functional.pad(values, (0, size - entries.numel())).view(-1, SKETCH).sum(0)
        total += summed.double() * (gradient.numel() / max(1, some_entries(gradient).numel())) ** 0.5
    return total


def predicted_variance(norms_sq: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Compute the mean over regions of the variance added, as a share of the sum of squares, by their norms.

    Args:
        norms_sq: The squared gradient norms (N,) of each region's tokens.
        counts: The number of tokens that each region keeps.

    Returns:
        A scalar in fp64. A region without a gradient, or with all of its tokens, counts as 0.
    """
    parts = []
    for norms, count in zip(norms_sq, counts, strict=True):
        variance, square = added_variance(norms, [count / len(norms) if count < len(norms) else 1.0])
        parts.append(torch.where(square > 0, variance / square, 0))
    return torch.stack(parts).mean()
