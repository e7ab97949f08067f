"""Choose which rows of a batch go through the backward pass, and estimate how many are needed.

This is readable torch code that runs on the device and never makes the host wait.

Let g_i be the norm of row i's gradient at the cut. Keeping the row with probability p_i and scaling it by 1/p_i does not change the mean of the gradient and
adds about sum (1 - p_i) / p_i g_i^2 to its variance, while the gradient's second moment over the batch is sum g_i^2. For a given number of rows the best
probabilities are p_i = min(1, c g_i). All rows with p_i < 1 then have gradients of the same norm 1 / c after scaling.

Where something below the cut couples the samples (BatchNorm), a kept row carries sums over the batch with its weight 1/p_i, whatever its own gradient is, so
that a small p_i adds much noise. There the norms have a floor: no row counts as less than `FLOOR` times the mean norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, select

_BEYOND = 1e200
"""The finite value that replaces a norm of inf or NaN. It is larger than any other, so such rows are kept first."""

_BELOW = 1e-200
"""The value that replaces a norm of 0 where rows are chosen. It is smaller than any other, so such rows are kept last."""

_LEAST = 1e-30
"""The least probability that a row counts with in its weight, so that weights are finite in fp32."""

FLOOR = 1.0
"""The least norm that a row counts with where samples are coupled, as a share of the mean norm. With 1 every row is kept with a probability of at least half
the share of rows kept."""


def choose_rows(method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """Choose rows by the norms of their gradients. Rows whose norm is inf or NaN are kept first, with weight 1.

    Args:
        method: An estimator. For rows, `bernoulli` means the fixed-size scheme of `systematic_sample`.
        norms_sq: Squared gradient norms (B,).
        k: The number of rows to keep.
        random: The generator to draw from; None for torch's own stream.

    Returns:
        Indices (k,) int64, sorted and distinct, and their weights (k,); None as weights for 1 (`topk` does not scale rows).
    """
    if method == "bernoulli":
        idx, p = systematic_sample(inclusion_probabilities(norms_sq, k), k, random)
        return idx, p.clamp_(min=_LEAST).reciprocal_().to(norms_sq.dtype)
    estimator = Estimator(method, norms_sq.shape[0], k)
    return select(estimator, norms_sq, torch.ones_like(norms_sq), random)


def with_floor(norms_sq: Tensor, floor: float) -> Tensor:
    """Return squared norms (B,) of which none is less than the square of `floor` times the mean norm, where inf and NaN count as 0 in the mean."""
    mean = torch.where(norms_sq.isfinite(), norms_sq, 0).sqrt().mean()
    return torch.maximum(norms_sq, (floor * mean).square())


def _norms(norms_sq: Tensor) -> Tensor:
    return norms_sq.detach().to(torch.float64).sqrt().nan_to_num_(nan=_BEYOND, posinf=_BEYOND)


def inclusion_probabilities(norms_sq: Tensor, k: int) -> Tensor:
    """Compute p_i = min(1, c g_i) with c such that the sum of p is k.

    c is the maximum over n of (k - (B - n)) / (g_1 + .. + g_n), where g_1 <= g_2 <= .. are the norms. Why: whatever n is, the sum of p is at most
    (B - n) + c (g_1 + .. + g_n), so that c is no less than this; and it is equal where n is the number of rows with p < 1.

    Args:
        norms_sq: Squared gradient norms (B,).
        k: The number of rows.

    Returns:
        Probabilities (B,), fp64, with the sum k. Rows without a gradient have p = 0 up to rounding; but where fewer than `k` rows have one, these have p = 1,
        and those without share the rest evenly.
    """
    g = _norms(norms_sq).clamp_(min=_BELOW)
    size = g.shape[0]
    budget = torch.arange(k - size + 1, k + 1, device=g.device)
    c = (budget / g.sort().values.cumsum(0)).amax()
    return (c * g).clamp_(max=1)


def _first_fit(c: Tensor, ascending: Tensor) -> Tensor:
    """The smallest c[n - 1] under which exactly the n smallest norms have p < 1, that is c g_n <= 1 <= c g_(n + 1); inf if there is none."""
    above = torch.cat([ascending[1:], ascending.new_full((1,), torch.inf)])
    fits = (c * ascending <= 1 + 1e-12) & (c * above >= 1 - 1e-12)
    return torch.where(fits, c, torch.inf).amin()


def systematic_sample(p: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw `k` distinct rows such that row i is among them with probability p_i.

    The rows are laid end to end in random order, row i with length p_i, and the points u, u + 1, .., u + k - 1 are marked, with u uniform in [0, 1). Every row
    is hit with probability p_i, and none is hit twice (Madow 1949; random order as in Hartley and Rao 1962).

    Args:
        p: Inclusion probabilities (B,) with the sum `k`.
        k: The number of rows.
        random: The generator to draw from; None for torch's own stream.

    Returns:
        Indices (k,), sorted, and the probabilities (k,) of these rows.
    """
    size = p.shape[0]
    order = torch.randperm(size, device=p.device, generator=random)
    ends = p[order].cumsum(0)
    first = torch.rand((), device=p.device, dtype=p.dtype, generator=random)
    cuts = (first + torch.arange(k, device=p.device)) * (ends[-1] / k)  # ends[-1] is k up to rounding
    idx = order[torch.searchsorted(ends, cuts, right=True).clamp_(max=size - 1)].sort().values
    return idx, p[idx]


def needed_share(norms_sq: Tensor, tau: float, floor: float = 0.0) -> Tensor:
    """Compute the smallest share of rows that keeps the added variance within a bound: sum (1 - p) / p g^2 <= tau sum g^2 with p = min(1, c f).

    f is g, or with a floor max(g, floor times the mean of g). If the n smallest f have p < 1, the left side is G1 / c - G2, where G1 and G2 are the sums of
    g^2 / f and g^2 over these. Hence c = G1 / (tau S + G2) with S = sum g^2 over all rows, for the n for which this c leaves exactly these rows below 1.

    Args:
        norms_sq: Squared gradient norms (B,).
        tau: The bound on the added variance, relative to the gradient's second moment; with 0 all rows with a gradient are needed.
        floor: The least norm that a row counts with, as a share of the mean norm.

    Returns:
        The expected share, a scalar in (0, 1]. It is 1 where a norm is inf or NaN, or where all norms are 0, because then no rows can be saved.
    """
    ascending, _ = _norms(norms_sq).sort()
    counted = ascending.clamp(min=floor * ascending.mean()) if floor else ascending
    square = ascending.square()
    total = square.sum()
    if not tau:
        return torch.where((total > 0) & (ascending[-1] < _BEYOND), (ascending > 0).to(ascending.dtype).mean(), 1.0)
    by_norm = torch.where(counted > 0, square / counted, 0.0)
    c = _first_fit(by_norm.cumsum(0) / (tau * total + square.cumsum(0)), counted)
    share = (c * counted).clamp_(max=1).mean()
    return torch.where((total > 0) & (ascending[-1] < _BEYOND) & share.isfinite(), share, 1.0)


def added_variance(norms_sq: Tensor, shares: Sequence[float], floor: float = 0.0) -> Tensor:
    """Compute the variance sum (1 - p) / p g^2 that keeping a share of the rows adds, with p = min(1, c f), for each of several shares.

    Args:
        norms_sq: Squared gradient norms (B,).
        shares: Shares of the rows.
        floor: The least norm that a row counts with (f), as a share of the mean norm.

    Returns:
        (shares + 1,) fp64: the variance for each share, and the sum of g^2. Infinite where a norm is inf or NaN.
    """
    square, size = _norms(norms_sq).square(), norms_sq.shape[0]
    counted = with_floor(norms_sq, floor) if floor else norms_sq
    variances = []
    for share in shares:
        p = inclusion_probabilities(counted, max(1, int(share * size + 0.5)))
        variances.append(torch.where(p > 0, (1 - p) / p * square, 0).sum())
    return torch.stack([*variances, square.sum()])


def share_from_variance(numbers: Tensor, shares: Sequence[float], tau: float) -> Tensor:
    """Compute the share that keeps the added variance within tau times the sum of squares, from what `added_variance` gives.

    Between two shares the variance is interpolated linearly. It is convex in the share, so the result is no less than the share that is needed.

    Args:
        numbers: The variance for each share, then the sum of squares: of one batch, or summed over several.
        shares: The shares, ascending and below 1.
        tau: The bound, relative to the sum of squares.

    Returns:
        A scalar in (0, 1]; NaN if the sum of squares is 0.
    """
    variance = torch.cat([numbers[: len(shares)], numbers.new_zeros(1)])
    at = torch.tensor([*shares, 1.0], dtype=numbers.dtype, device=numbers.device)
    total = numbers[len(shares)]
    first = (variance <= tau * total).to(torch.int64).argmax().clamp_min(1)  # the last one always holds
    above, below = variance[first - 1], variance[first]
    between = at[first - 1] + (above - tau * total) / (above - below) * (at[first] - at[first - 1])
    share = torch.where(variance[0] <= tau * total, at[0], torch.where(between.isfinite(), between, at[first]))
    return torch.where(total > 0, share, torch.nan)
