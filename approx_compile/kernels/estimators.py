"""Estimators: choose which indices of a contraction axis a sampled product keeps, and with what scale.

The product Y = A B sums over K units: Y = sum_i A[:, i] B[i, :], with norms a_i = |A[:, i]|, b_i = |B[i, :]| and scores s_i = a_i b_i.
A unit is one index of the axis, or `group` contiguous ones, whose norms are then those of the blocks. Every estimator returns distinct, sorted indices in a
fixed number of slots, so that shapes never depend on data. An index that is drawn several times is stored once, with the number of draws in its scale. A
slot that a random draw left empty has scale 0.

| method | selection | scale | source |
|---|---|---|---|
| topk | k largest s_i | none | Adelman et al. 2021, section 6 |
| topk_weights | k largest norms of the weight alone | none | Adelman et al. 2021, section 6 |
| crs | k draws with replacement, p_i = s_i / sum s | count_i / (k p_i) | Drineas et al. 2006; Adelman et al. eq. 1-4 |
| bernoulli | each i independently with p_i = min(1, c s_i), sum p = k | 1 / p_i | Adelman et al. eq. 14-16, water-filled |
| uniform | k of K without replacement | K / k | baseline |
| dropout | of a layer's units: as uniform | K / k | Srivastava et al. 2014 |
| adaptive_dropout | of a layer's units: as bernoulli, of the scores of `unit_selection` | 1 / p_i | Ba and Frey 2013 |
| alsh | of a layer's units: those that hash tables find most often (`hash_tables`) | 1, or 0 for what fills up the slots | Spring and Shrivastava 2017 |
| wta | the c* largest always, k - c* draws from the others | 1; count_i (1 - P_c) / ((k - c*) p_i) | Liu et al. 2023 (WTA-CRS) |

Scores are in fp32 (fp64 for fp64 operands) and carry no gradient. Every estimator that reads scores keeps a unit whose score is NaN or inf, with scale 1, so
that NaN and inf reach the output as in exact arithmetic. `uniform` reads no scores, `topk_weights` only those of the weight. In fp16 the scale of a rarely
drawn unit (crs, wta) may make the scaled operand exceed the format's maximum of 65504; GradScaler skips such a step.

Sources: Drineas, Kannan and Mahoney, *Fast Monte Carlo Algorithms for Matrices I*, 2006; Adelman et al., *Faster Neural Network Training with Approximate
Tensor Operations*, 2021; Liu et al., *Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model*, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.1
"""Share of the budget for units that are not certain that `bernoulli` spreads evenly. With m certain units, 1/p of a rare unit is at most
(K - m) / (FLOOR (k - m))."""


@dataclass(frozen=True)
class Estimator:
    """A sampling method for an axis of known size: everything static that a selection needs.

    The axis consists of `units` whole groups and `tail` entries at its end, which are always kept.

    Attributes:
        method: One of the methods in the module's table.
        size: Entries of the axis.
        k: Units that are kept in expectation.
        group: Contiguous entries of a unit.
        weight: Which of the two operands (0 or 1) is a weight; None if neither or not known.
    """

    method: str
    size: int
    k: int
    group: int = 1
    weight: int | None = None

    @property
    def units(self) -> int:
        """Whole groups of the axis."""
        return self.size // self.group

    @property
    def tail(self) -> int:
        """Entries at the end that fill no group; they are always kept."""
        return self.size - self.units * self.group

    @property
    def slots(self) -> int:
        """Units that a selection stores: k, but more for `bernoulli`, whose number of kept units is random."""
        if self.method not in ("bernoulli", "adaptive_dropout"):
            return self.k
        # The number kept has variance sum p (1 - p) <= k (1 - k / units). Four standard deviations are stored; a draw with more is cut, which happens in
        # 3 of 100,000 draws for a large k, in at most 15 for k >= 16, and in at most 60 below, where the distribution is skewed.
        return min(self.units, math.ceil(self.k + 4 * math.sqrt(self.k * (1 - self.k / self.units))))

    @property
    def kept(self) -> int:
        """Entries of the axis that the sampled product has."""
        return self.slots * self.group + self.tail

    @property
    def expected(self) -> int:
        """Entries that are kept with a scale other than 0, in expectation."""
        return self.k * self.group + self.tail

    @property
    def unit(self) -> int:
        """Contiguous entries that one index of the selection stands for: `group`, or 1 if there is a tail."""
        return 1 if self.tail else self.group

    @property
    def scaled(self) -> bool:
        """Whether the method gives kept units a scale."""
        return self.method not in ("topk", "topk_weights")


def make_estimator(method: str, size: int, ratio: float, min_k: int, group: int, weight: int | None = None) -> Estimator | None:
    """Return the estimator for an axis, or None if it would keep everything; the product is then computed exactly, bit for bit.

    k = clamp(round(ratio size), min_k, size), rounded up to whole groups.

    Args:
        method: One of the methods in the module's table.
        size: Entries of the axis.
        ratio: Share of the entries to keep.
        min_k: Least number of entries to keep.
        group: Contiguous entries of a unit; at most `size` is used.
        weight: Which of the two operands (0 or 1) is a weight, if one is.
    """
    keep = min(max(math.floor(ratio * size + 0.5), min_k), size)
    if keep >= size:
        return None
    group = min(group, size)
    k = max(1, math.ceil((keep - size % group) / group))
    made = Estimator(method, size, min(k, size // group), group, weight)
    return None if made.slots >= made.units else made


def unit_scores(estimator: Estimator, a_sq: Tensor, b_sq: Tensor) -> Tensor:
    """Return the scores by which units are ranked or drawn: |a_i| |b_i|, or for `topk_weights` the norm of the weight alone.

    Args:
        estimator: The estimator.
        a_sq: Squared norms of the units of the first operand, (units,) or (batch, units).
        b_sq: The same of the second operand.

    Returns:
        Scores of the same shape, without a gradient.
    """
    a, b = a_sq.detach().sqrt(), b_sq.detach().sqrt()
    if estimator.method == "topk_weights":
        assert estimator.weight is not None, "topk_weights needs to know which operand is the weight"
        return (a, b)[estimator.weight]
    return a * b


def select(estimator: Estimator, a_sq: Tensor, b_sq: Tensor, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """Select the units that a product keeps.

    Args:
        estimator: The estimator.
        a_sq: Squared norms of the units of the first operand, (units,) or (batch, units).
        b_sq: The same of the second operand.
        random: The generator to draw from; None draws from torch's default one. A graph takes no generators.

    Returns:
        Indices (.., n), int64, sorted and distinct, and their scale (.., n), or None for 1. If there is a tail (`size` is no multiple of `group`), indices
        are those of entries, else those of units.
    """
    idx, scale = select_by_score(estimator, unit_scores(estimator, a_sq, b_sq), random)
    if not estimator.tail:
        return idx, scale
    entry = torch.arange(estimator.group, device=idx.device)
    tail = torch.arange(estimator.units * estimator.group, estimator.size, device=idx.device)
    idx = torch.cat([(idx.unsqueeze(-1) * estimator.group + entry).flatten(-2), tail.expand(*idx.shape[:-1], -1)], -1)
    if scale is not None:
        ones = scale.new_ones(()).expand(*scale.shape[:-1], estimator.tail)
        scale = torch.cat([scale.unsqueeze(-1).expand(*scale.shape, estimator.group).flatten(-2), ones], -1)
    return idx, scale


def select_by_score(estimator: Estimator, score: Tensor, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """Select units by scores that are given.

    Args:
        estimator: The estimator.
        score: Scores >= 0 of the units, (units,) or (batch, units), fp32 or fp64.
        random: As in `select`.

    Returns:
        Indices of units, sorted and distinct, and their scale, or None for 1.
    """
    return _METHODS[estimator.method](score, estimator, random)


def inverse_index(idx: Tensor, size: int) -> Tensor:
    """Return the position of every unit among the kept ones, -1 where it was dropped.

    Args:
        idx: Indices of kept units, (.., k), int64.
        size: Number of units.

    Returns:
        (.., size), int64.
    """
    place = torch.arange(idx.shape[-1], device=idx.device).expand(idx.shape)
    return torch.full((*idx.shape[:-1], size), -1, dtype=torch.int64, device=idx.device).scatter(-1, idx, place)


def water_fill(score: Tensor, k: int) -> Tensor:
    """Return inclusion probabilities p_i = min(1, c s_i), with c such that sum p = k exactly.

    Units with p = 1 are certain. Among the m certain units' K - m others a floor bounds 1/p of rare units: p <- (1 - FLOOR) p + FLOOR (k - m) / (K - m),
    which leaves the sum at k. Scores that are all zero give k / K. The equation is solved by sorting: if the m largest are certain, c is (k - m) / (sum of
    the others' scores). If exactly k units have a score other than zero, they are certain and p = 0 for the others. Adelman et al. 2021, eq. 14-16.

    Args:
        score: Finite scores >= 0, (.., K).
        k: The sum of the probabilities.

    Returns:
        Probabilities, (.., K).
    """
    size = score.shape[-1]
    if k >= size:
        return torch.ones_like(score)
    value, order = score.sort(dim=-1, descending=True)
    rest = value.flip(-1).cumsum(-1).flip(-1)
    left = (k - torch.arange(size, device=score.device)).to(score.dtype)
    fits = (left * value < rest) | (rest == 0) | (left == 0)
    m = fits.to(torch.int64).argmax(-1, keepdim=True)  # the first m for which the largest other unit has c s < 1, or nothing is left to share out
    budget = (k - m).to(score.dtype)
    even = budget / (size - m).to(score.dtype)
    rest_m = rest.gather(-1, m)
    p = torch.where(rest_m > 0, budget * value / rest_m.clamp_min(torch.finfo(score.dtype).tiny), even)
    p = ((1 - FLOOR) * p + FLOOR * even).clamp(max=1)
    p = torch.where(torch.arange(size, device=score.device) < m, torch.ones_like(p), p)
    return torch.empty_like(p).scatter(-1, order, p)


def _rand(shape: Sequence[int], like: Tensor, random: torch.Generator | None) -> Tensor:
    if random is None:  # a `generator` argument, even None, would trace to another op
        return torch.rand(shape, device=like.device, dtype=like.dtype)
    return torch.rand(shape, device=like.device, dtype=like.dtype, generator=random)


def _topk(score: Tensor, estimator: Estimator, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    return score.topk(estimator.k, dim=-1, sorted=False).indices.sort(dim=-1).values, None  # NaN ranks above inf, inf above all others


def _uniform(score: Tensor, estimator: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    idx, _ = _topk(_rand(score.shape, score, random), estimator)
    return idx, score.new_full((), estimator.units / estimator.k).expand(idx.shape)


def _bernoulli(score: Tensor, estimator: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    finite = score.isfinite()
    p = water_fill(torch.where(finite, score, 0), estimator.k)
    kept = _rand(score.shape, score, random) < p
    return _slots(torch.where(kept, 1 / p, 0), finite, estimator.slots)


def _crs(score: Tensor, estimator: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    finite = score.isfinite()
    mass = _or_ones(torch.where(finite, score, 0))
    total = mass.sum(-1, keepdim=True)
    draw = _rand((*score.shape[:-1], estimator.k), score, random)
    count = _draw(mass, draw, torch.ones_like(draw))
    return _slots(torch.where(mass > 0, count * total / (estimator.k * mass), 0), finite, estimator.slots)


def _wta(score: Tensor, estimator: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    finite = score.isfinite()
    k = estimator.k
    value, order = _or_ones(torch.where(finite, score, 0)).sort(dim=-1, descending=True)
    rest = value.flip(-1).cumsum(-1).flip(-1)  # rest[c]: mass of all but the c largest, not normalised
    c = (rest[..., :k] / (k - torch.arange(k, device=score.device))).argmin(-1, keepdim=True)
    sure = torch.arange(value.shape[-1], device=score.device) < c
    mass = torch.where(sure, 0, value)
    total = rest.gather(-1, c)
    draw = _rand((*score.shape[:-1], k), score, random)
    used = torch.arange(k, device=score.device) < k - c
    count = _draw(mass, draw, used.to(score.dtype))
    drawn = torch.where(mass > 0, count * total / ((k - c) * mass), 0)
    weight = torch.where(sure, torch.ones_like(value), drawn)
    return _slots(torch.empty_like(weight).scatter(-1, order, weight), finite, estimator.slots)


def _or_ones(mass: Tensor) -> Tensor:
    """Replace scores that are all zero by ones, so that units are drawn evenly."""
    return torch.where(mass.sum(-1, keepdim=True) > 0, mass, torch.ones_like(mass))


def _draw(mass: Tensor, uniform: Tensor, used: Tensor) -> Tensor:
    """Count how often each unit is drawn, with replacement and in proportion to `mass`; draws with 0 in `used` do not count."""
    cdf = mass.cumsum(-1)
    at = torch.searchsorted(cdf, (uniform * cdf[..., -1:]).contiguous(), right=True).clamp(max=mass.shape[-1] - 1)
    return torch.zeros_like(mass).scatter_add(-1, at, used)


def _slots(weight: Tensor, finite: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Turn the weights of all units (0: dropped) into `slots` distinct sorted indices, which include every unit with a weight, and the weights there."""
    weight = torch.where(finite, weight, 1)
    rank = torch.where(finite, (weight > 0).to(torch.float32), 2.0)
    idx = rank.topk(slots, dim=-1, sorted=False).indices.sort(dim=-1).values
    return idx, weight.gather(-1, idx)


_METHODS = {
    "topk": _topk,
    "topk_weights": _topk,
    "crs": _crs,
    "bernoulli": _bernoulli,
    "uniform": _uniform,
    "wta": _wta,
    "dropout": _uniform,
    "adaptive_dropout": _bernoulli,
}
