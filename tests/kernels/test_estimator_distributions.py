"""How estimators that draw at random are distributed: mean weights, probabilities, and how often a selection overflows.

Statistical tests take a fixed number of draws from a fixed seed, as rows of one `select` call, and compare a mean with its expectation in units of its
standard error. The file makes about 2,000 such comparisons; a normal variable exceeds 5 standard errors once in 1.7 million.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.selections import DRAWS, KINDS, RANDOM, draws, scores
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, water_fill

pytestmark = pytest.mark.usefixtures("one_thread")


Z = 5.0


def z_score(mean: Tensor, expected: Tensor, variance: Tensor, n: int) -> Tensor:
    """|mean - expected| in standard errors. Where nothing is random, the two must agree up to rounding."""
    error = (mean - expected).abs()
    fixed = variance < 1e-12
    return torch.where(fixed, (error > 1e-9) * torch.inf, error / (variance / n).sqrt().clamp_min(1e-30)).nan_to_num(0, posinf=torch.inf)


def wta_sure(score: Tensor, k: int) -> list[int]:
    """Find the number c* of units that are surely kept, by brute force over c in [0, k): argmin of (1 - P_c) / (k - c)."""
    p = sorted((score / score.sum()).tolist(), reverse=True)
    cost = [math.fsum(p[c:]) / (k - c) for c in range(k)]
    c = cost.index(min(cost))
    return sorted(score.argsort(descending=True)[:c].tolist())


def weight_variance(method: str, score: Tensor, k: int) -> Tensor:
    """Var(weight_i), from the definition of each method."""
    size = score.shape[-1]
    score = score if score.sum() > 0 else torch.ones_like(score)
    if method == "uniform":
        return torch.full_like(score, size / k - 1)
    if method == "bernoulli":
        p = water_fill(score, k)
        return (1 - p) / p
    sure = wta_sure(score, k) if method == "wta" else []
    rest = score.clone()
    rest[sure] = 0
    p = rest / rest.sum()
    variance = (1 / p - 1) / (k - len(sure))
    variance[sure] = 0
    return variance  # inf for a unit without a score, which is never drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", RANDOM)
def test_mean_weight_is_one(method, kind, dtype):
    """E[weight_i] = 1 for every unit, with the variance of the method's definition. The standard error of the mean is the theoretical one, because an
    estimated one is too small if a rare unit happens to be drawn too rarely."""
    k, score = 7, scores(kind)
    torch.manual_seed(4)
    weights = draws(Estimator(method, 24, k), score.to(dtype))
    variance = weight_variance(method, score, k)
    possible = variance.isfinite()
    assert possible.sum() == (24 if method in ("uniform", "bernoulli") or kind != "half zeros" else 12)
    assert (weights[:, ~possible] == 0).all()  # a unit without a score adds nothing to the product
    z = z_score(weights.mean(0), torch.ones(24, dtype=torch.float64), variance, DRAWS)[possible]
    assert z.max() < Z, z
    squared = (weights - 1).square()
    z = z_score(squared.mean(0), variance, squared.var(0), DRAWS)[possible]
    assert z.max() < Z, z


@pytest.mark.parametrize("kind", KINDS)
def test_bernoulli_keeps_k_in_expectation_each_with_its_probability(kind):
    k, score = 7, scores(kind)
    estimator = Estimator("bernoulli", 24, k)
    torch.manual_seed(5)
    weights = draws(estimator, score)
    p = water_fill(score, k)
    kept = (weights > 0).double()
    assert z_score(kept.mean(0), p, p * (1 - p), DRAWS).max() < Z
    assert z_score(kept.sum(1).mean(), torch.tensor(7.0, dtype=torch.float64), (p * (1 - p)).sum(), DRAWS) < Z
    torch.testing.assert_close(weights[kept > 0], (1 / p).expand_as(weights)[kept > 0])


def binomial_tail(n: int, p: float, above: int) -> float:
    """P(X > above) for a binomial X."""

    def term(j: int) -> float:
        return math.exp(math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * math.log(p) + (n - j) * math.log1p(-p))

    return math.fsum(term(j) for j in range(above + 1, min(n, above + 200) + 1))


def test_bernoulli_overflow_is_as_rare_as_documented():
    """Above its mean, a sum of independent 0/1 variables has the heaviest tail when all are equally likely (Hoeffding 1956)."""
    seen = 0
    for k in (*range(1, 40), 64, 128, 512, 2048):
        for units in {round(k / r) for r in (0.75, 0.5, 0.3, 0.2, 0.1, 0.03, 0.01)}:
            estimator = Estimator("bernoulli", units, k)
            if estimator.slots < units:
                tail = binomial_tail(units, k / units, estimator.slots)
                assert tail < (1.5e-4 if k >= 16 else 6e-4), (k, units)
                assert k < 2048 or tail < 4e-5
                seen += 1
    assert seen > 100


def test_bernoulli_overflow_is_cut_to_the_slots():
    """With k = 1 of 64 there are 5 slots, and 5 or more units are drawn 36 times in 10,000 draws."""
    estimator = Estimator("bernoulli", 64, 1)
    assert estimator.slots == 5
    torch.manual_seed(6)
    weights = draws(estimator, scores("constant", 64))
    full = ((weights > 0).sum(1) == 5).sum().item()
    expected = DRAWS * binomial_tail(64, 1 / 64, 4)
    assert expected > 50 and abs(full - expected) < Z * math.sqrt(expected)


@pytest.mark.parametrize("k", [1, 2, 7, 13, 23])
@pytest.mark.parametrize("kind", ["constant", "1/i", "1/i^2", "dominant"])
def test_wta_keeps_the_best_number_surely(kind, k):
    score = scores(kind) * torch.linspace(1, 1.01, 24, dtype=torch.float64)  # no ties
    torch.manual_seed(7)
    weights = draws(Estimator("wta", 24, k), score, 2000)
    sure = (weights == 1).all(0).nonzero().flatten().tolist()
    assert sure == wta_sure(score, k)
    assert len(sure) < k  # the drawn part is never dropped
    rest = score.clone()
    rest[sure] = 0
    drawn = torch.ones(24, dtype=torch.bool)
    drawn[sure] = False
    counts = weights[:, drawn] * (k - len(sure)) * score[drawn] / rest.sum()  # k - c* draws, every one counted
    torch.testing.assert_close(counts, counts.round(), rtol=0.0, atol=1e-9)
    assert (counts.round().sum(1) == k - len(sure)).all()


def test_crs_counts_repeated_draws():
    k, score = 7, scores("1/i^2")
    torch.manual_seed(8)
    weights = draws(Estimator("crs", 24, k), score, 2000)
    counts = weights * k * score / score.sum()
    torch.testing.assert_close(counts, counts.round(), rtol=0.0, atol=1e-9)
    assert (counts.round().sum(1) == k).all() and (counts > 1.5).any()
