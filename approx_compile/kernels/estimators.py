"""Which indices of a contraction axis are kept, and with what scale.

The product Y = A B sums over K units: Y = sum_i A[:, i] B[i, :], with norms a_i = |A[:, i]|, b_i = |B[i, :]| and scores s_i = a_i b_i.
A unit is one index, or `group` contiguous ones (then the norms are those of the blocks). Every estimator returns distinct, sorted
indices in a fixed number of slots, so shapes never depend on data; draws that repeat an index are counted and become its scale,
which adds their gradients up; a slot that a random draw left empty has scale 0.

| method | choice | scale | source |
|---|---|---|---|
| topk | k largest s_i | none | Adelman et al. 2021, section 6 |
| topk_weights | k largest norms of the weight alone | none | Adelman et al. 2021, section 6 |
| crs | k draws with replacement, p_i = s_i / sum s | count_i / (k p_i) | Drineas et al. 2006; Adelman et al. eq. 1-4 |
| bernoulli | each i independently with p_i = min(1, c s_i), sum p = k | 1 / p_i | Adelman et al. eq. 14-16, water-filled |
| uniform | k of K without replacement | K / k | control |
| wta | the c* largest surely, k - c* draws from the rest | 1; count_i (1 - P_c) / ((k - c*) p_i) | Liu et al. 2023 (WTA-CRS) |

Scores are in fp32 (fp64 for fp64 operands) and carry no gradient. A unit whose score is NaN or inf is kept with scale 1 by every
estimator that looks at scores, so that NaN and inf reach the output as in exact arithmetic; `uniform` looks at none, `topk_weights` at the
weight's only. In fp16 a rarely drawn unit's scale (crs, wta) may exceed the format's 65504 on the scaled operand; GradScaler skips such a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.1
"""Share of the uncertain budget that `bernoulli` spreads evenly: with m units certain, a rare unit's 1/p is at most (K - m) / (FLOOR (k - m))."""


@dataclass(frozen=True)
class Estimator:
    """A method bound to an axis of `size` entries: everything static that a selection needs.

    `units` whole groups of `group` entries and `tail` = size - units * group entries at the end that are always kept; `k` units are
    asked for and `slots` units are stored (more than k for `bernoulli` only). `weight`: which of the two operands is a weight.
    """

    method: str
    size: int
    k: int
    group: int = 1
    weight: int | None = None

    @property
    def units(self) -> int:
        return self.size // self.group

    @property
    def tail(self) -> int:
        return self.size - self.units * self.group

    @property
    def slots(self) -> int:
        if self.method != "bernoulli":
            return self.k
        # sum p (1 - p) <= k (1 - k / units): four standard deviations, beyond which the draw is cut (3 in 100,000 draws for a large k,
        # at most 15 for k >= 16, at most 60 below, where the count is skewed)
        return min(self.units, math.ceil(self.k + 4 * math.sqrt(self.k * (1 - self.k / self.units))))

    @property
    def kept(self) -> int:
        """Entries of the axis that the sampled product has."""
        return self.slots * self.group + self.tail

    @property
    def expected(self) -> int:
        """Entries with a weight other than 0, in expectation."""
        return self.k * self.group + self.tail

    @property
    def unit(self) -> int:
        """Contiguous entries that one index of the selection stands for (1 when a tail makes the groups ragged)."""
        return 1 if self.tail else self.group

    @property
    def scaled(self) -> bool:
        return self.method not in ("topk", "topk_weights")


def make_estimator(method: str, size: int, ratio: float, min_k: int, group: int, weight: int | None = None) -> Estimator | None:
    """The estimator for an axis, or None where it would keep everything (the product is then exact, bit for bit).

    k = clamp(round(ratio size), min_k, size), rounded up to whole groups.
    """
    keep = min(max(math.floor(ratio * size + 0.5), min_k), size)
    if keep >= size:
        return None
    group = min(group, size)
    k = max(1, math.ceil((keep - size % group) / group))
    made = Estimator(method, size, min(k, size // group), group, weight)
    return None if made.slots >= made.units else made


def unit_scores(how: Estimator, a_sq: Tensor, b_sq: Tensor) -> Tensor:
    """What units are ranked or drawn by, from their squared norms: |a_i| |b_i|, or the weight's norm alone."""
    a, b = a_sq.detach().sqrt(), b_sq.detach().sqrt()
    if how.method == "topk_weights":
        assert how.weight is not None, "topk_weights needs to know which operand is the weight"
        return (a, b)[how.weight]
    return a * b


def select(how: Estimator, a_sq: Tensor, b_sq: Tensor, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """Squared norms of the units, (units,) or (batch, units) each -> indices (.., n) int64, sorted and distinct, and their scale or None.

    With a tail (`size` no multiple of `group`) the indices are those of entries, else of units. `random`: what is drawn from in place of torch's own
    stream (not in a graph, which takes no generators).
    """
    idx, scale = _METHODS[how.method](unit_scores(how, a_sq, b_sq), how, random)
    if not how.tail:
        return idx, scale
    entry = torch.arange(how.group, device=idx.device)
    tail = torch.arange(how.units * how.group, how.size, device=idx.device)
    idx = torch.cat([(idx.unsqueeze(-1) * how.group + entry).flatten(-2), tail.expand(*idx.shape[:-1], -1)], -1)
    if scale is not None:
        ones = scale.new_ones(()).expand(*scale.shape[:-1], how.tail)
        scale = torch.cat([scale.unsqueeze(-1).expand(*scale.shape, how.group).flatten(-2), ones], -1)
    return idx, scale


def inverse_index(idx: Tensor, size: int) -> Tensor:
    """Position of every unit among the kept ones, -1 where it was dropped: (.., k) -> (.., size)."""
    place = torch.arange(idx.shape[-1], device=idx.device).expand(idx.shape)
    return torch.full((*idx.shape[:-1], size), -1, dtype=torch.int64, device=idx.device).scatter(-1, idx, place)


def water_fill(score: Tensor, k: int) -> Tensor:
    """Inclusion probabilities p_i = min(1, c s_i) with c such that sum p = k exactly; (.., K) -> (.., K).

    The units with p = 1 are certain; among the others a floor keeps rare units alive: p <- (1 - FLOOR) p + FLOOR (k - m) / (K - m), which
    leaves the sum at k. All-zero scores give k / K. Solved by sorting: with the m largest certain, c = (k - m) / (sum of the rest). Where just
    k units have a score they are all certain (and p = 0 for the others).
    """
    size = score.shape[-1]
    if k >= size:
        return torch.ones_like(score)
    value, order = score.sort(dim=-1, descending=True)
    rest = value.flip(-1).cumsum(-1).flip(-1)
    left = (k - torch.arange(size, device=score.device)).to(score.dtype)
    fits = (left * value < rest) | (rest == 0) | (left == 0)
    m = fits.to(torch.int64).argmax(-1, keepdim=True)  # the first that fits: the largest of the rest has c s < 1, or there is nothing to share out
    budget = (k - m).to(score.dtype)
    even = budget / (size - m).to(score.dtype)
    rest_m = rest.gather(-1, m)
    p = torch.where(rest_m > 0, budget * value / rest_m.clamp_min(torch.finfo(score.dtype).tiny), even)
    p = ((1 - FLOOR) * p + FLOOR * even).clamp(max=1)
    p = torch.where(torch.arange(size, device=score.device) < m, torch.ones_like(p), p)
    return torch.empty_like(p).scatter(-1, order, p)


def _rand(shape: Sequence[int], like: Tensor, random: torch.Generator | None) -> Tensor:
    if random is None:  # given as a generator it would be another op
        return torch.rand(shape, device=like.device, dtype=like.dtype)
    return torch.rand(shape, device=like.device, dtype=like.dtype, generator=random)


def _topk(score: Tensor, how: Estimator, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    return score.topk(how.k, dim=-1, sorted=False).indices.sort(dim=-1).values, None  # NaN ranks above inf, inf above the rest


def _uniform(score: Tensor, how: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    idx, _ = _topk(_rand(score.shape, score, random), how)
    return idx, score.new_full((), how.units / how.k).expand(idx.shape)


def _bernoulli(score: Tensor, how: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    finite = score.isfinite()
    p = water_fill(torch.where(finite, score, 0), how.k)
    kept = _rand(score.shape, score, random) < p
    return _slots(torch.where(kept, 1 / p, 0), finite, how.slots)


def _crs(score: Tensor, how: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    finite = score.isfinite()
    mass = _or_ones(torch.where(finite, score, 0))
    total = mass.sum(-1, keepdim=True)
    draw = _rand((*score.shape[:-1], how.k), score, random)
    count = _draw(mass, draw, torch.ones_like(draw))
    return _slots(torch.where(mass > 0, count * total / (how.k * mass), 0), finite, how.slots)


def _wta(score: Tensor, how: Estimator, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    finite = score.isfinite()
    k = how.k
    value, order = _or_ones(torch.where(finite, score, 0)).sort(dim=-1, descending=True)
    rest = value.flip(-1).cumsum(-1).flip(-1)  # rest[c] = mass outside the c largest, not normalised
    c = (rest[..., :k] / (k - torch.arange(k, device=score.device))).argmin(-1, keepdim=True)
    sure = torch.arange(value.shape[-1], device=score.device) < c
    mass = torch.where(sure, 0, value)
    total = rest.gather(-1, c)
    draw = _rand((*score.shape[:-1], k), score, random)
    used = torch.arange(k, device=score.device) < k - c
    count = _draw(mass, draw, used.to(score.dtype))
    drawn = torch.where(mass > 0, count * total / ((k - c) * mass), 0)
    weight = torch.where(sure, torch.ones_like(value), drawn)
    return _slots(torch.empty_like(weight).scatter(-1, order, weight), finite, how.slots)


def _or_ones(mass: Tensor) -> Tensor:
    """All-zero scores carry no preference: draw evenly."""
    return torch.where(mass.sum(-1, keepdim=True) > 0, mass, torch.ones_like(mass))


def _draw(mass: Tensor, uniform: Tensor, used: Tensor) -> Tensor:
    """How often each unit is drawn (with replacement, in proportion to `mass`), counting the draws marked in `used`."""
    cdf = mass.cumsum(-1)
    at = torch.searchsorted(cdf, (uniform * cdf[..., -1:]).contiguous(), right=True).clamp(max=mass.shape[-1] - 1)
    return torch.zeros_like(mass).scatter_add(-1, at, used)


def _slots(weight: Tensor, finite: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Weights (0 = dropped) -> a fixed number of distinct sorted indices that hold every unit with a weight, and the weights there."""
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
}
