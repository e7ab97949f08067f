"""Which indices an estimator keeps and with what scale: how many, by which scores, and in edge cases."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.selections import KINDS, METHODS, RANDOM, draws, scores, split, weights_of

from approx_compile.kernels.estimators import FLOOR, Estimator, inverse_index, make_estimator, select, water_fill

BY_SCORE = ("topk", "topk_weights", "crs", "bernoulli", "wta")


pytestmark = pytest.mark.usefixtures("one_thread")


# --- how many ---


@pytest.mark.parametrize(
    ("size", "ratio", "min_k", "group", "expected"),  # expected: k, units, tail, entries kept
    [
        pytest.param(64, 0.5, 16, 1, (32, 64, 0, 32), id="half"),
        pytest.param(33, 0.5, 1, 1, (17, 33, 0, 17), id="a-half-rounds-up"),
        pytest.param(100, 0.254, 1, 1, (25, 100, 0, 25), id="rounds-down"),
        pytest.param(100, 0.256, 1, 1, (26, 100, 0, 26), id="rounds-to-nearest"),
        pytest.param(64, 0.1, 16, 1, (16, 64, 0, 16), id="min_k"),
        pytest.param(64, 0.3, 1, 8, (3, 8, 0, 24), id="up-to-a-group"),
        pytest.param(64, 0.25, 1, 8, (2, 8, 0, 16), id="whole-groups"),
        pytest.param(23, 0.5, 1, 5, (2, 4, 3, 13), id="tail-counts"),
        pytest.param(23, 0.6, 1, 5, (3, 4, 3, 18), id="tail-and-rounding"),
        pytest.param(19, 0.1, 1, 5, (1, 3, 4, 9), id="tail-longer-than-asked"),
        pytest.param(1000, 1e-6, 1, 1, (1, 1000, 0, 1), id="at-least-one"),
        pytest.param(64, 1.0, 1, 1, None, id="ratio-1"),
        pytest.param(64, 0.999, 1, 1, None, id="rounds-to-all"),
        pytest.param(16, 0.5, 16, 1, None, id="min_k-is-all"),
        pytest.param(15, 0.5, 100, 1, None, id="min_k-beyond-all"),
        pytest.param(64, 0.9, 1, 16, None, id="groups-round-to-all"),
        pytest.param(30, 0.5, 1, 64, None, id="one-short-group"),
        pytest.param(9, 0.5, 1, 5, None, id="one-group-and-tail"),
        pytest.param(1, 0.5, 1, 1, None, id="size-1"),
        pytest.param(0, 0.5, 1, 1, None, id="size-0"),
        pytest.param(0, 0.5, 16, 4, None, id="size-0-min_k"),
    ],
)
def test_counts(size, ratio, min_k, group, expected):
    for method in set(METHODS) - {"bernoulli"}:
        estimator = make_estimator(method, size, ratio, min_k, group)
        assert (estimator and (estimator.k, estimator.units, estimator.tail, estimator.kept)) == expected, method
        if estimator is not None:
            assert estimator.slots == estimator.k and estimator.expected == estimator.kept


def test_counts_are_the_smallest_that_keep_enough():
    """By brute force over k: the fewest whole groups that, with the tail, hold clamp(round(ratio size), min_k, size) entries."""
    rng = random.Random(0)
    nones = 0
    for _ in range(2000):
        size, group, min_k, ratio = rng.randint(0, 90), rng.randint(1, 12), rng.randint(1, 20), rng.uniform(0.01, 1)
        keep = min(max(round(ratio * size), min_k), size)
        units, tail = divmod(size, group)
        enough = [k for k in range(1, units + 1) if k * group + tail >= keep]
        estimator = make_estimator("topk", size, ratio, min_k, group)
        if keep == size or not enough or enough[0] == units:
            assert estimator is None
            nones += 1
        else:
            assert estimator is not None and (estimator.k, estimator.kept) == (enough[0], enough[0] * group + tail)
    assert 100 < nones < 1900


def test_bernoulli_capacity():
    estimator = make_estimator("bernoulli", 1000, 0.1, 1, 1)
    assert estimator is not None and (estimator.k, estimator.slots, estimator.expected) == (100, 138, 100)  # 100 + 4 sqrt(90) = 137.9
    estimator = make_estimator("bernoulli", 403, 0.25, 1, 4)
    assert estimator is not None and (estimator.k, estimator.slots, estimator.tail) == (25, 43, 3)  # 25 + 4 sqrt(18.75) = 42.3
    assert (estimator.kept, estimator.expected) == (43 * 4 + 3, 25 * 4 + 3)
    assert make_estimator("crs", 8, 0.5, 1, 1) is not None and make_estimator("bernoulli", 8, 0.5, 1, 1) is None  # 4 + 4 sqrt(2) > 8: saves nothing


# --- water-filling ---


def slow_water_fill(score: list[float], k: int) -> list[float]:
    """Water filling of one row in plain Python: bisection on c, then the documented floor."""
    size = len(score)
    alive = sum(s > 0 for s in score)
    if alive <= k:  # every unit with a score is certain, what is left of the budget is spread
        return [1.0 if s > 0 else (k - alive) / (size - alive) for s in score]
    lo, hi = 0.0, 1 / min(s for s in score if s > 0)
    for _ in range(3000):
        c = (lo + hi) / 2
        lo, hi = (c, hi) if sum(min(1.0, c * s) for s in score) < k else (lo, c)
    p = [min(1.0, hi * s) for s in score]
    certain = sum(q >= 1 - 1e-12 for q in p)
    return [1.0 if q >= 1 - 1e-12 else (1 - FLOOR) * q + FLOOR * (k - certain) / (size - certain) for q in p]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "k"), [(24, 1), (24, 5), (24, 11), (24, 12), (24, 15), (24, 23), (7, 3), (2, 1)])
def test_water_fill_against_bisection(kind, size, k):
    score = scores(kind, size)
    torch.testing.assert_close(water_fill(score, k), torch.tensor(slow_water_fill(score.tolist(), k), dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25], ids=["tiny", "one", "huge"])
@pytest.mark.parametrize("kind", KINDS)
def test_water_fill_properties(kind, magnitude, dtype):
    for size, k in ((1, 1), (2, 1), (2, 2), (24, 7), (24, 24), (300, 40), (4096, 1000)):
        score = (scores(kind, size) * magnitude).to(dtype)
        p = water_fill(score, k)
        assert p.dtype == dtype and p.shape == score.shape
        assert (p <= 1).all() and (p > 0)[score > 0].all()
        assert (p > 0).all() or (score > 0).sum() == k  # then those are certain
        assert p.double().sum().item() == pytest.approx(k, rel=1e-4)
        order = score.argsort()
        assert (p[order].diff() >= -1e-6 * p[order][1:]).all()  # monotone in the score
        uncertain = (p < 1) & (score > 0)
        m = int((p >= 1).sum())
        if uncertain.sum() > 1 and m < k:
            above = (p[uncertain].double() - FLOOR * (k - m) / (size - m)) / score[uncertain].double()  # proportional to the score above the floor
            torch.testing.assert_close(above, above.max().expand_as(above), rtol=1e-2 if dtype == torch.float32 else 1e-9, atol=0.0)


def test_water_fill_bounds_the_scale():
    """A unit without any score is kept with the probability of the floor, FLOOR (k - m) / (K - m), if m units are certain."""
    score = torch.tensor([100.0, 50, 3, 2, 1, 1, 0, 0], dtype=torch.float64)
    p = water_fill(score, 4)
    assert (p == 1).tolist() == [True, True, False, False, False, False, False, False]
    torch.testing.assert_close(p[-2:], torch.full((2,), FLOOR * 2 / 6, dtype=torch.float64))


def test_water_fill_rows_are_independent():
    rows = torch.stack([scores(kind) for kind in KINDS])
    together = water_fill(rows.view(2, 3, 24), 9).view(6, 24)
    for row, p in zip(rows, together, strict=True):
        assert torch.equal(water_fill(row, 9), p)


# --- every method ---

LAYOUTS = {"units": (24, 1), "groups": (96, 4), "tail": (122, 5)}  # size, group; 24 units each, a tail of 2


def bound(method: str, layout: str, k: int = 7) -> Estimator:
    size, group = LAYOUTS[layout]
    return Estimator(method, size, k, group, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_indices_are_sorted_distinct_and_of_fixed_number(method, layout):
    estimator = bound(method, layout)
    rows = torch.stack([scores(kind) for kind in KINDS]).repeat(50, 1)
    idx, scale = select(estimator, *split(rows))
    number = estimator.slots * estimator.group + estimator.tail if estimator.tail else estimator.slots
    assert idx.dtype == torch.int64 and idx.shape == (300, number)
    assert (idx.diff() > 0).all() and (idx >= 0).all() and (idx < estimator.size // estimator.unit).all()
    assert estimator.kept == number * estimator.unit
    assert (scale is None) == (method in ("topk", "topk_weights")) == (not estimator.scaled)
    if scale is not None:
        assert scale.shape == idx.shape and scale.isfinite().all() and (scale >= 0).all()
    alone, alone_scale = select(estimator, *split(scores("1/i")))
    assert alone.shape == (number,) and (alone_scale is None or alone_scale.shape == (number,))


@pytest.mark.parametrize("method", METHODS)
def test_a_tail_is_kept_whole_and_groups_share_a_scale(method):
    estimator = bound(method, "tail")
    weights = draws(estimator, scores("1/i"), 200)
    assert (weights[:, 120:] == 1).all()
    blocks = weights[:, :120].view(200, 24, 5)
    assert (blocks == blocks[..., :1]).all()
    assert ((blocks[..., 0] > 0).sum(-1) <= estimator.slots).all() and (blocks[..., 0] > 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_topk_is_the_k_largest_products(dtype):
    torch.manual_seed(1)
    a_sq, b_sq = torch.rand(2, 50, 40, dtype=dtype)
    idx, scale = select(Estimator("topk", 40, 9), a_sq, b_sq)
    best = (a_sq * b_sq).argsort(-1, descending=True)[:, :9].sort(-1).values
    assert torch.equal(idx, best) and scale is None


@pytest.mark.parametrize("weight", [0, 1])
def test_topk_weights_looks_at_the_weight_only(weight):
    torch.manual_seed(2)
    norms, other, another = torch.rand(3, 50, 40)
    estimator = Estimator("topk_weights", 40, 9, weight=weight)
    idx, scale = select(estimator, norms, other) if weight == 0 else select(estimator, other, norms)
    again, _ = select(estimator, norms, another) if weight == 0 else select(estimator, another, norms)
    assert torch.equal(idx, again) and scale is None
    assert torch.equal(idx, norms.argsort(-1, descending=True)[:, :9].sort(-1).values)
    assert not torch.equal(idx, select(Estimator("topk", 40, 9), norms, other)[0])


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_follow_the_generator(method):
    estimator = bound(method, "units")
    torch.manual_seed(3)
    first, second = draws(estimator, scores("1/i"), 20), draws(estimator, scores("1/i"), 20)
    torch.manual_seed(3)
    assert torch.equal(first, draws(estimator, scores("1/i"), 20)) and not torch.equal(first, second)


# --- edge cases ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", BY_SCORE)
def test_nan_and_inf_are_kept_unscaled(method, layout):
    estimator = bound(method, layout)
    a_sq, b_sq = split(scores("1/i").float().expand(500, -1).clone())
    b_sq[:, 3] = torch.nan
    b_sq[:, 7] = torch.inf
    b_sq[:, 20] = torch.inf
    if method != "topk_weights":  # which does not look at a
        a_sq[:, 20] = 0  # 0 inf = nan
        a_sq[:, 11] = torch.inf
    torch.manual_seed(9)
    weights = weights_of(estimator, a_sq, b_sq)
    units = weights[:, : estimator.units * estimator.group].view(500, estimator.units, estimator.group)[..., 0]
    special = [3, 7, 20] + ([11] if method != "topk_weights" else [])
    assert (units[:, special] == 1).all()
    assert units.isfinite().all() and ((units > 0).sum(1) <= estimator.slots).all()
    others = [i for i in range(estimator.units) if i not in special]
    assert (units[:, others] > 0).any(1).all()  # the rest is sampled as ever


@pytest.mark.parametrize("method", BY_SCORE)
def test_a_row_with_nan_leaves_the_others_alone(method):
    estimator = bound(method, "units")
    rows = scores("1/i").expand(3, -1).clone()
    torch.manual_seed(10)
    clean = weights_of(estimator, *split(rows))
    rows[1, 5] = torch.nan
    torch.manual_seed(10)
    weights = weights_of(estimator, *split(rows))
    assert torch.equal(weights[[0, 2]], clean[[0, 2]]) and weights[1, 5] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0], ids=["all-nan", "all-inf", "all-zero"])
def test_scores_that_say_nothing(method, value):
    estimator = bound(method, "units")
    torch.manual_seed(11)
    idx, scale = select(estimator, torch.full((100, 24), value), torch.ones(100, 24) if value else torch.zeros(100, 24))
    assert idx.shape == (100, estimator.slots) and (idx.diff() > 0).all() and (idx >= 0).all() and (idx < 24).all()
    if scale is not None:
        assert scale.isfinite().all()
        assert value == 0 or method == "uniform" or (scale == 1).all()


@pytest.mark.parametrize("method", RANDOM)
def test_scores_of_one_unit_only(method):
    """With the whole mass on one unit, wta draws k - c* units from nothing and crs draws one unit only: that unit has weight 1, and nothing is NaN."""
    score = torch.zeros(24)
    score[13] = 2
    torch.manual_seed(12)
    weights = draws(Estimator(method, 24, 7), score, 500)
    assert weights.isfinite().all()
    if method != "uniform":
        torch.testing.assert_close(weights[:, 13], torch.ones(500, dtype=torch.float64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_selection_carries_no_gradient_and_keeps_the_precision(method):
    for dtype in (torch.float32, torch.float64):
        a_sq, b_sq = (v.to(dtype).requires_grad_() for v in split(scores("1/i")))
        idx, scale = select(bound(method, "tail"), a_sq, b_sq)
        assert not idx.requires_grad
        assert scale is None or (scale.dtype == dtype and not scale.requires_grad)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9)], ids=["axis", "batch", "batches"])
def test_inverse(shape):
    torch.manual_seed(13)
    idx = torch.rand(*shape[:-1], 30).argsort(-1)[..., :9].sort(-1).values
    at = inverse_index(idx, 30)
    assert at.shape == (*shape[:-1], 30) and at.dtype == torch.int64
    assert torch.equal(at.gather(-1, idx), torch.arange(9).expand(shape))
    assert ((at == -1).sum(-1) == 21).all()
