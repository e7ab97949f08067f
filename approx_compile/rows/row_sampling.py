"""Choose which rows of a batch go through the backward pass, and estimate how many are needed: readable torch on the device, no host synchronisation.

Row i has gradient norm g_i at the cut. A row kept with probability p_i and scaled by 1/p_i leaves the gradient's mean as it is and adds to its
variance about sum (1 - p_i) / p_i g_i^2, where the gradient's own second moment over the batch is sum g_i^2. For a given number of rows the best
p_i is min(1, c g_i): all rows that are not certain then weigh the same, 1 / c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, select

_BEYOND = 1e200
"""What an inf or NaN norm counts as: such rows are kept first."""


def choose_rows(method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """Squared norms (B,) -> indices (k,) int64, sorted and distinct, and their weights (k,) or None (topk keeps rows as they are).

    `bernoulli` is here the fixed-size scheme of `systematic_sample`. Rows whose norm is inf or NaN are kept first, with weight 1.
    `random`: what is drawn from in place of torch's own stream.
    """
    if method == "bernoulli":
        idx, p = systematic_sample(inclusion_probabilities(norms_sq, k), k, random)
        return idx, p.reciprocal().to(norms_sq.dtype)
    how = Estimator(method, norms_sq.shape[0], k)
    return select(how, norms_sq, torch.ones_like(norms_sq), random)


def _norms(norms_sq: Tensor) -> Tensor:
    return norms_sq.detach().to(torch.float64).sqrt().nan_to_num_(nan=_BEYOND, posinf=_BEYOND)


def inclusion_probabilities(norms_sq: Tensor, k: int) -> Tensor:
    """p_i = min(1, c g_i), fp64 (B,), with c such that sum p = k. Where fewer than k rows have a gradient, those have p = 1 and the sum is less.

    If the n smallest rows are the uncertain ones, c = (k - (B - n)) / (g_1 + .. + g_n); the n at which that fits is the solution.
    """
    g = _norms(norms_sq)
    size = g.shape[0]
    ascending, _ = g.sort()
    budget = torch.arange(k - size + 1, k + 1, device=g.device)
    c = budget / ascending.cumsum(0)
    c = _first_fit(c, ascending)
    return torch.where(c.isfinite(), (c * g).clamp_(max=1), (g > 0).to(g.dtype))


def _first_fit(c: Tensor, ascending: Tensor) -> Tensor:
    """The smallest c[n - 1] under which just the n smallest norms are uncertain: c g_n <= 1 <= c g_(n + 1). inf where there is none."""
    above = torch.cat([ascending[1:], ascending.new_full((1,), torch.inf)])
    fits = (c * ascending <= 1 + 1e-12) & (c * above >= 1 - 1e-12)
    return torch.where(fits, c, torch.inf).amin()


def systematic_sample(p: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """k distinct rows, row i among them with probability p_i (sum p = k): indices (k,), sorted, and their p.

    The rows are laid end to end in random order, row i with length p_i, and cut at u, u + 1, .., u + k - 1 with u uniform in [0, 1): every row is
    hit with probability p_i and none twice (Madow 1949; random order as in Hartley and Rao 1962). With sum p < k the rest of the k are rows without
    a gradient, whose p is given as 1.
    """
    size = p.shape[0]
    p = torch.where(p.sum() < k - 0.5, torch.where(p > 0, p, _spare(p, k)), p)
    order = torch.randperm(size, device=p.device, generator=random)
    ends = p[order].cumsum(0)
    first = torch.rand((), device=p.device, dtype=p.dtype, generator=random)
    cuts = (first + torch.arange(k, device=p.device)) * (ends[-1] / k)  # ends[-1] is k but for rounding
    idx = order[torch.searchsorted(ends, cuts, right=True).clamp_(max=size - 1)].sort().values
    return idx, p[idx]


def _spare(p: Tensor, k: int) -> Tensor:
    """1 for just so many rows without a gradient that the sum is k."""
    empty = p == 0
    return (empty & (empty.cumsum(0) <= k - p.sum())).to(p.dtype)


def needed_share(norms_sq: Tensor, tau: float) -> Tensor:
    """The smallest expected share of rows, a scalar in (0, 1], at which sum (1 - p) / p g^2 <= tau sum g^2 with p = min(1, c g).

    With the n smallest norms uncertain the left side is G1 / c - G2, where G1 = sum g and G2 = sum g^2 over those: c = G1 / (tau S + G2), for the n
    at which it fits. 1 where a norm is inf or NaN or all are 0: then nothing is to be saved.
    """
    g = _norms(norms_sq)
    ascending, _ = g.sort()
    square = ascending.square()
    total = square.sum()
    c = _first_fit(ascending.cumsum(0) / (tau * total + square.cumsum(0)), ascending)
    share = (c * g).clamp_(max=1).mean()
    return torch.where((total > 0) & (ascending[-1] < _BEYOND) & share.isfinite(), share, 1.0)
