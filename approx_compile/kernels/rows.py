"""Which rows of a batch go through the backward pass, and how many are needed: readable torch on the device, no host synchronisation.

Row i has gradient norm g_i at the cut. A row kept with probability p_i and scaled by 1/p_i leaves the gradient's mean as it is and adds to its
variance about sum (1 - p_i) / p_i g_i^2, where the gradient's own second moment over the batch is sum g_i^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, pick_slots, select, water_fill

METHODS = ("bernoulli", "topk", "uniform", "wta")
"""Estimators that choose rows. `bernoulli` is here the fixed-size scheme of `systematic`."""


def choose(method: str, norms_sq: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """Squared norms (B,) -> indices (k,) int64, sorted and distinct, and their weights (k,) or None (topk keeps rows as they are).

    Rows whose norm is inf or NaN are kept first, with weight 1.
    """
    if method != "bernoulli":
        how = Estimator(method, norms_sq.shape[0], k)
        return select(how, norms_sq, torch.ones_like(norms_sq))
    norms = norms_sq.detach().sqrt()
    finite = norms.isfinite()
    return pick_slots(systematic(torch.where(finite, norms, 0), k), finite, k)


def systematic(score: Tensor, k: int) -> Tensor:
    """Weights (B,): 1/p_i for k rows, 0 for the others, where p = water_fill(score, k).

    The rows are laid end to end in random order, row i with length p_i, and cut at u, u + 1, .., u + k - 1 with u uniform in [0, 1): every row
    is hit with probability p_i, none twice, always k in all (Madow 1949; random order as in Hartley and Rao 1962).
    """
    size = score.shape[0]
    p = water_fill(score, k)
    order = torch.randperm(size, device=score.device)
    ends = p[order].to(torch.float64).cumsum(0)
    cuts = torch.rand((), device=score.device, dtype=torch.float64) + torch.arange(k, device=score.device)
    at = torch.searchsorted(ends, cuts * (ends[-1] / k), right=True).clamp_(max=size - 1)  # ends[-1] is k but for rounding
    return torch.zeros_like(p).index_fill_(0, order[at], 1) / p.clamp_min(torch.finfo(p.dtype).tiny)


def needed(norms_sq: Tensor, tau: float) -> Tensor:
    """The smallest expected share of rows, a scalar in (0, 1], at which sum (1 - p) / p g^2 <= tau sum g^2 with p = min(1, c g).

    With the n smallest norms below 1 / c the sum is G1 / c - G2, where G1 = sum g and G2 = sum g^2 over those: c = G1 / (tau S + G2), for the n at
    which it fits. 1 where a norm is inf or NaN: then nothing is to be saved.
    """
    square, _ = norms_sq.detach().to(torch.float64).sort()
    g = square.sqrt()
    total = square.sum()
    g1, g2 = g.cumsum(0), square.cumsum(0)
    c = g1 / (tau * total + g2)  # c[n - 1]: the n smallest uncertain
    upper = torch.cat([g[1:], g.new_full((1,), torch.inf)])
    fits = (c * g <= 1) & (c * upper >= 1)
    c = torch.where(fits, c, torch.inf).amin()
    share = (c * g).nan_to_num(nan=0.0).clamp(max=1).mean()
    return torch.where(torch.isfinite(total) & (total > 0), share, 1.0)
