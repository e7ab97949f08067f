"""Hash tables for maximum inner products: buckets against a search by hand, the probability of a collision against theory, and the timetable of rebuilds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from approx_compile.kernels import hash_tables
from approx_compile.kernels.hash_tables import LONGEST, Hashing, HashTables, alsh_units, input_codes, load_tables, most_found, tables_of, unit_codes

pytestmark = pytest.mark.usefixtures("one_thread")


def transforms(w: Tensor, a: Tensor, powers: int) -> tuple[Tensor, Tensor]:
    """P(w) and Q(a) of one weight that is scaled already and one input, term by term (equation 2)."""
    p = torch.cat([w, torch.stack([w.norm() ** 2 ** (i + 1) for i in range(powers)])])
    return p, torch.cat([a / a.norm(), torch.full((powers,), 0.5)])


def test_active_units_are_those_of_a_search_by_hand() -> None:
    torch.manual_seed(0)
    hashing, x, weight = Hashing(bits=4, tables=3, powers=3), torch.randn(7, 10), torch.randn(20, 10)
    tables = HashTables.make(hashing, 5, weight)
    count = tables.count(x, weight)
    scaled = weight * LONGEST / weight.norm(dim=1).max()
    by_hand = torch.zeros(20)
    for j in range(20):
        for a in x:
            p, q = transforms(scaled[j], a, 3)
            for t in range(3):
                mine = tables.projections[:, 4 * t : 4 * (t + 1)]
                by_hand[j] += bool((((p @ mine) > 0) == ((q @ mine) > 0)).all())
    assert torch.equal(count, by_hand) and 0 < (count > 0).sum() < 20
    idx, scale = most_found(count, 12)
    assert torch.equal(idx, idx.sort().values) and len(set(idx.tolist())) == 12
    assert sorted(count[idx].tolist()) == sorted(by_hand.tolist())[-12:] and torch.equal(scale, (by_hand[idx] > 0).float())


def test_bits_agree_with_the_probability_of_the_angle() -> None:
    """One bit agrees with probability 1 - angle / pi, and a unit is found with probability 1 - (1 - p^K)^L, within 5 standard errors."""
    torch.manual_seed(1)
    hashing = Hashing(bits=2, tables=3)
    many = 4000
    w, a = torch.randn(1, 6), torch.randn(1, 6)
    a = a + 1.5 * w
    p, q = transforms(w[0] * LONGEST / w.norm(), a[0], 3)
    agree = 1 - math.acos(torch.nn.functional.cosine_similarity(p, q, 0).item()) / math.pi
    wide = Hashing(bits=1, tables=many)
    projections = torch.randn(9, many)
    share = (unit_codes(w, projections, wide) == input_codes(a, projections, wide)).double().mean().item()
    assert abs(share - agree) < 5 * math.sqrt(agree * (1 - agree) / many)
    found = sum(HashTables.make(hashing, seed, w).count(a, w)[0].item() > 0 for seed in range(1000)) / 1000
    theory = 1 - (1 - agree**2) ** 3
    assert abs(found - theory) < 5 * math.sqrt(theory * (1 - theory) / 1000)


def test_an_input_of_which_only_kept_entries_are_there() -> None:
    torch.manual_seed(2)
    hashing, idx, scale = Hashing(), torch.tensor([1, 4, 7]), torch.tensor([1.0, 0.0, 1.0])
    x, weight = torch.randn(5, 9), torch.randn(16, 9)
    tables = HashTables.make(hashing, 3, weight)
    whole = x * torch.zeros(9).index_copy_(0, idx, scale)
    assert torch.equal(tables.count(x[:, idx], weight, idx, scale), tables.count(whole, weight))


def test_no_unit_may_be_found() -> None:
    idx, scale = most_found(torch.zeros(8), 3)
    assert len(idx) == 3 and not scale.any()
    tables = HashTables.make(Hashing(bits=16), 0, torch.randn(8, 4))
    assert torch.isfinite(tables.count(torch.zeros(5, 4), torch.zeros(8, 4))).all()  # no 0 / 0 in either transform


def test_tables_are_rebuilt_on_the_timetable(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt = []
    monkeypatch.setattr(hash_tables, "unit_codes", lambda weight, *more: rebuilt.append(weight) or unit_codes(weight, *more))
    weight, x = torch.randn(8, 4), torch.randn(20, 4)
    tables = HashTables.make(Hashing(early=200, early_every=100, every=300), 0, weight)
    at = []
    for step in range(40):
        before = len(rebuilt)
        tables.count(x, weight)
        if len(rebuilt) > before:
            at.append(step * 20)
    assert at == [0, 100, 200, 500]


def test_tables_belong_to_the_memory_of_a_weight_and_can_be_saved() -> None:
    torch.manual_seed(3)
    hashing, x = [6, 5, 3, 10_000, 100, 1_000], torch.randn(20, 12)
    one, other = torch.nn.Parameter(torch.randn(32, 12)), torch.nn.Parameter(torch.randn(32, 12))
    for _ in range(3):
        alsh_units(x, one, None, None, False, 4, hashing, 7)
    state = tables_of({"one": one, "other": other})
    assert list(state) == ["one"] and state["one"]["samples"] == 60 and state["one"]["due"] == 100
    assert torch.equal(
        alsh_units(x, one.t(), None, None, True, 4, hashing, 7)[0], alsh_units(x, one, None, None, False, 4, hashing, 7)[0]
    )  # a view: 100 samples
    with torch.no_grad():
        one.mul_(-1)  # the tables are not due: what was found stays
    copy = torch.nn.Parameter(one.detach().clone())
    load_tables({"one": copy}, state | {"one": state["one"] | {"samples": 20}})
    load_tables({"one": one}, state | {"one": state["one"] | {"samples": 20}})
    assert all(torch.equal(a, b) for a, b in zip(*(alsh_units(x, p, None, None, False, 4, hashing, 0) for p in (one, copy)), strict=True))
    load_tables({"one": one}, {})
    assert tables_of({"one": one}) == {}


def test_the_op_passes_torchs_own_checks() -> None:
    weight = torch.randn(32, 12)
    inputs = (torch.randn(20, 12), weight, None, None, False, 4, [6, 5, 3, 10_000, 100, 1_000], 0)
    torch.library.opcheck(alsh_units, inputs, test_utils=("test_schema", "test_faketensor"))
