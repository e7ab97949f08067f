"""Which rows are kept and how many are needed: probabilities, means and variances equal their formulas."""

from __future__ import annotations

import itertools
import random

import pytest
import sympy
import torch
from torch import Tensor

from approx_compile.rows.batch_dim import SampleLayout
from approx_compile.rows.controller import Draws
from approx_compile.rows.gather_rows import copy_keeping_strides, may_overlap, put_rows, row_norms_sq, take_rows, with_strides
from approx_compile.rows.row_sampling import choose_rows, inclusion_probabilities, needed_share, systematic_sample, with_floor

NORMS = {
    "even": torch.ones(40),
    "random": torch.rand(40, generator=torch.Generator().manual_seed(1)),
    "heavy": torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 8,
    "one": torch.tensor([100.0] + [0.01] * 39),
    "zeros": torch.cat([torch.zeros(20), torch.rand(20, generator=torch.Generator().manual_seed(3))]),
}


@pytest.mark.parametrize("k", [2, 10, 39])
@pytest.mark.parametrize("name", NORMS)
def test_inclusion_is_water_filled(name: str, k: int) -> None:
    g = NORMS[name]
    p = inclusion_probabilities(g.square(), k)
    live = int((g > 0).sum())
    assert p.sum().item() == pytest.approx(k, rel=1e-9) and p[g > 0].sum().item() == pytest.approx(min(k, live), rel=1e-9)
    assert ((p >= 0) & (p <= 1)).all() and p[g == 0].allclose(torch.tensor(max(0, k - live) / max(1, 40 - live), dtype=p.dtype), rtol=1e-9)
    uncertain = (p < 1 - 1e-9) & (g > 0)
    if uncertain.any():  # p = c g with one c, and c g >= 1 for the certain ones
        c = (p / g.double())[uncertain]
        assert c.max().item() == pytest.approx(c.min().item(), rel=1e-6)
        assert (c.max() * g.double()[p >= 1 - 1e-9] >= 1 - 1e-6).all()


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NORMS)
def test_systematic_hits_every_row_with_its_probability(name: str) -> None:
    torch.manual_seed(0)
    k, draws = 10, 4000
    p = inclusion_probabilities(NORMS[name].square(), k)
    hits = torch.zeros(40, dtype=torch.float64)
    for _ in range(draws):
        idx, at = systematic_sample(p, k)
        assert len(idx.unique()) == k and (idx == idx.sort().values).all() and torch.equal(at, p[idx])
        hits[idx] += 1
    live = p > 0
    spread = (p * (1 - p) / draws).sqrt()
    assert ((hits / draws - p).abs()[live] <= 5 * spread[live] + 1e-9).all()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_draws_from_a_stream_of_their_own_hit_every_row_with_its_probability() -> None:
    """Every draw is seeded anew: each must have its probabilities, and must be independent of the next one."""
    draws, count, k = Draws("graph:draws"), 20000, 12
    p = inclusion_probabilities(NORMS["heavy"].square(), k)
    hit = torch.zeros(count, 40, dtype=torch.float64)
    for i in range(count):
        hit[i, systematic_sample(p, k, draws.random(torch.device("cpu")))[0]] = 1
    uncertain = (p > 0) & (p < 1 - 1e-9)
    off = (hit - p)[:, uncertain] / (p * (1 - p)).sqrt()[uncertain]
    assert off.mean(0).abs().max() * count**0.5 < 4
    assert (off[1:] * off[:-1]).mean(0).abs().max() * count**0.5 < 4


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["bernoulli", "uniform", "wta"])
def test_sums_over_rows_are_unbiased(method: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 6) * NORMS["heavy"][:, None]
    norms_sq, draws = rows.square().sum(1), 8000
    sums = torch.empty(draws, 6)
    for i in range(draws):
        idx, weight = choose_rows(method, norms_sq, 12)
        assert weight is not None
        sums[i] = (rows[idx] * weight[:, None]).sum(0)
    z = (sums.mean(0) - rows.sum(0)) / (sums.std(0) / draws**0.5)
    assert z.abs().max() < 4.5


@pytest.mark.slow
def test_the_variance_of_systematic_draws_is_that_of_its_scheme() -> None:
    """The variance is compared with that of independent draws with the same probabilities, sum (1 - p) / p g^2; the fixed size removes the part that an equal
    shift of all gradients would add."""
    torch.manual_seed(0)
    rows = torch.randn(60, 50)
    rows *= (torch.rand(60, 1) ** 3) / rows.norm(dim=1, keepdim=True)
    norms_sq, k, draws = rows.square().sum(1), 20, 6000
    p = inclusion_probabilities(norms_sq, k)
    independent = ((1 - p) / p * norms_sq).sum().item()
    found = 0.0
    for _ in range(draws):
        idx, weight = choose_rows("bernoulli", norms_sq, k)
        assert weight is not None
        found += ((rows[idx] * weight[:, None]).sum(0) - rows.sum(0)).square().sum().item() / draws
    # Hartley and Rao 1962: pairs of uncertain rows are a little less likely together, by about (1 - p) of a row in k; random directions cancel it
    assert found == pytest.approx(independent, rel=0.06)


def test_topk_takes_the_largest_as_they_are() -> None:
    idx, weight = choose_rows("topk", torch.arange(10.0), 3)
    assert weight is None and idx.tolist() == [7, 8, 9]


@pytest.mark.parametrize("method", ["bernoulli", "topk", "uniform", "wta"])
def test_nan_and_inf_rows_are_kept(method: str) -> None:
    norms_sq = torch.ones(30)
    norms_sq[7], norms_sq[21] = float("nan"), float("inf")
    for seed in range(20):
        torch.manual_seed(seed)
        idx, weight = choose_rows(method, norms_sq, 5)
        if method != "uniform":
            assert {7, 21} <= set(idx.tolist())
        assert weight is None or weight.isfinite().all()


@pytest.mark.parametrize("k", [2, 10, 39])
@pytest.mark.parametrize("name", NORMS)
def test_with_a_floor_of_one_no_row_has_less_than_half_the_share(name: str, k: int) -> None:
    norms_sq = NORMS[name].square()
    p = inclusion_probabilities(with_floor(norms_sq, 1.0), k)
    assert p.sum().item() == pytest.approx(k, rel=1e-9) and p.min() >= k / 40 / 2 and p.max() <= 1
    assert (p[norms_sq.argsort()].diff() >= -1e-12).all()  # no row has less than one with a smaller gradient


def test_a_floor_keeps_rows_of_nan_and_inf_first() -> None:
    norms_sq = torch.ones(30)
    norms_sq[7], norms_sq[21] = float("nan"), float("inf")
    p = inclusion_probabilities(with_floor(norms_sq, 1.0), 5)
    assert p[7] == p[21] == 1 and torch.isfinite(p).all()


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("tau", [0.01, 0.025, 0.1, 0.5])
@pytest.mark.parametrize("name", ["even", "random", "heavy", "one", "zeros"])
def test_needed_is_the_smallest_share_under_tau(name: str, tau: float, floor: float) -> None:
    g = NORMS[name].double()
    counted = g.clamp(min=floor * g.mean())
    low, high = 1e-6, 1e9
    for _ in range(200):  # bisection on c
        c = (low * high) ** 0.5
        p = (c * counted).clamp(max=1)
        added = torch.where(p > 0, (1 - p) / p * g.square(), 0).sum()
        low, high = (low, c) if added <= tau * g.square().sum() else (c, high)
    assert needed_share(NORMS[name].square(), tau, floor).item() == pytest.approx((high * counted).clamp(max=1).mean().item(), rel=1e-5)


def test_nothing_is_saved_where_nothing_is_known() -> None:
    for norms_sq in (torch.zeros(8), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])):
        assert needed_share(norms_sq, 0.1).item() == 1


LAYOUTS: dict[str, tuple[tuple[int, ...], SampleLayout]] = {
    "first": ((6, 3, 4), SampleLayout(0)),
    "middle": ((3, 6, 4), SampleLayout(1)),
    "last": ((3, 6), SampleLayout(1)),
    "outer": ((24, 3), SampleLayout(0, 1, 4)),
    "inner": ((24, 3), SampleLayout(0, 4, 1)),
    "between": ((2 * 6 * 3, 5), SampleLayout(0, 2, 3)),
    "uniform": ((12, 3), SampleLayout(0, None, None)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gather_norms_and_scatter(name: str) -> None:
    shape, place = LAYOUTS[name]
    layout = place if place.uniform else SampleLayout(place.dim, sympy.Integer(place.outer), sympy.Integer(place.inner))
    x, idx, weight = torch.randn(shape), torch.tensor([0, 2, 5]), torch.tensor([2.0, 1.0, 3.0])
    split = (1, 6, shape[0] // 6) if place.uniform else (place.outer, 6, place.inner)
    parts = x.unflatten(place.dim, split).movedim(place.dim + 1, 0)

    def together(rows: Tensor) -> Tensor:
        return rows.movedim(0, place.dim + 1).flatten(place.dim, place.dim + 2)

    want = together(parts[idx] * weight.view(-1, *[1] * (parts.dim() - 1)))
    got = take_rows(x, layout, idx, weight, list(want.shape), list(want.contiguous().stride()))
    assert torch.equal(got, want) and got.is_contiguous()
    assert torch.allclose(row_norms_sq(x, layout, 6), parts.flatten(1).square().sum(1))
    back = put_rows(got, layout, idx, 6, list(shape)).unflatten(place.dim, split).movedim(place.dim + 1, 0)
    assert torch.equal(back[idx], want.unflatten(place.dim, (split[0], 3, split[2])).movedim(place.dim + 1, 0))
    assert (back[[1, 3, 4]] == 0).all()


def test_gather_keeps_channels_last_and_half_precision() -> None:
    one = sympy.Integer(1)
    x = torch.randn(6, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    idx, weight = torch.tensor([1, 4]), torch.tensor([1.5, 2.0])
    got = take_rows(x, SampleLayout(0, one, one), idx, weight, [2, 3, 4, 4], [48, 1, 12, 3])
    assert got.stride() == (48, 1, 12, 3)
    assert torch.equal(got, (x[idx] * weight.view(-1, 1, 1, 1)).to(torch.bfloat16))


def drawn_layout(g: random.Random) -> tuple[Tensor, SampleLayout, int]:
    """Return a tensor that has 6 rows in one of its dims, in a memory layout that views, expansions and permutations may produce."""
    split = (g.choice([1, 1, 2, 3]), 6, g.choice([1, 1, 2]))
    shape = [g.choice([0, 1, 1, 2, 3, 3]) for _ in range(g.randrange(4))]
    dim = g.randrange(len(shape) + 1)
    shape.insert(dim, split[0] * split[1] * split[2])
    order = g.sample(range(len(shape)), len(shape))
    made = [1 if g.random() < 0.25 else shape[d] * g.choice([1, 1, 2]) for d in order]  # in memory order; what is larger is sliced
    x = torch.randn(made)
    for at, d in enumerate(order):
        if made[at] > shape[d]:
            x = x.narrow(at, g.choice([0, made[at] - shape[d]]), shape[d]) if g.random() < 0.5 else x.unfold(at, shape[d], 1).select(at, 0).movedim(-1, at)
    x = x.permute([order.index(d) for d in range(len(shape))]).expand(shape)
    assert list(x.shape) == shape
    return x, SampleLayout(dim, sympy.Integer(split[0]), sympy.Integer(split[2])), split[2]


def test_rows_of_any_layout_are_those_of_plain_indexing() -> None:
    """With strides of 0, sliced, permuted and empty dims: gathered rows have the values of indexing and the strides asked for, and are put back in their
    places."""
    g = random.Random(0)
    torch.manual_seed(0)
    expanded = 0
    for _ in range(2000):
        x, layout, inner = drawn_layout(g)
        dim, outer = layout.dim, x.shape[layout.dim] // (6 * inner)
        idx = torch.tensor(sorted(g.sample(range(6), g.choice([2, 3, 5]))))
        shared = x.stride(dim) == 0 and x.shape[dim] > 1
        weight = None if shared or g.random() < 0.3 else torch.rand(len(idx))
        parts = x.unflatten(dim, (outer, 6, inner))
        kept = parts.index_select(dim + 1, idx)
        if weight is not None:
            kept = kept * weight.view(-1, *[1] * (kept.dim() - dim - 2))
        want = kept.flatten(dim, dim + 2)
        # what the compiled code expects: the strides of the whole tensor, or those of a dense one in the same order
        small = [1 if t == 0 else n for n, t in zip(want.shape, x.stride(), strict=True)]
        at = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d]))
        stride, step = [0] * x.dim(), 1
        for d in at:
            stride[d] = 0 if x.stride(d) == 0 else step
            step *= max(small[d], 1)
        got = take_rows(x, layout, idx, weight, list(want.shape), stride)
        expanded += any(n > 1 and t == 0 for n, t in zip(got.shape, got.stride(), strict=True))
        assert torch.equal(got, want)
        assert all(a == b for a, b, n in zip(got.stride(), stride, got.shape, strict=True) if n > 1)
        back = put_rows(got, layout, idx, 6, list(x.shape)).unflatten(dim, (outer, 6, inner))
        assert back.is_contiguous() and torch.equal(back.index_select(dim + 1, idx), want.unflatten(dim, (outer, len(idx), inner)))
        rest = [i for i in range(6) if i not in idx.tolist()]
        assert not back.index_select(dim + 1, torch.tensor(rest)).any()
        assert torch.allclose(row_norms_sq(x, layout, 6), parts.movedim(dim + 1, 0).flatten(1).square().sum(1))
    assert expanded > 200


def test_what_overlaps_is_known() -> None:
    g = random.Random(0)
    found = set()
    for _ in range(500):
        size, stride = [g.randrange(1, 4) for _ in range(3)], [g.randrange(0, 9) for _ in range(3)]
        free = [d for d in range(3) if stride[d]]
        places = [sum(i * stride[d] for i, d in zip(at, free, strict=True)) for at in itertools.product(*[range(size[d]) for d in free])]
        shares = len(set(places)) < len(places)
        assert may_overlap(size, stride) or not shares
        found.add((may_overlap(size, stride), shares))
    assert found >= {(True, True), (False, False)}
    assert not may_overlap([4, 3, 5], [15, 5, 1]) and not may_overlap([5, 3, 4], [1, 5, 15]) and may_overlap([4, 3], [1, 1])


def test_copies_keep_strides() -> None:
    for x in (torch.randn(4, 3).t(), torch.randn(4, 1).expand(4, 3), torch.randn(1, 3).expand(4, 3), torch.randn(9).unfold(0, 3, 1), torch.randn(0, 3)):
        new = copy_keeping_strides(x)
        assert torch.equal(new, x) and new.stride() == x.stride() and (not x.numel() or new.data_ptr() != x.data_ptr())
    x = torch.randn(4, 3)
    assert (
        with_strides(x, [3, 1]) is x and with_strides(x, None) is x and with_strides(x, [1, 4]).stride() == (1, 4) and torch.equal(with_strides(x, [1, 4]), x)
    )
