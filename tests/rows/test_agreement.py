"""Pooled shares: what several ranks come to together is what one process with all samples comes to."""

from __future__ import annotations

import pytest
import torch

from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.config.words import LADDER
from approx_compile.rows.agreement import SLOTS, WIDTH, VariancePool
from approx_compile.rows.controller import RowControl
from approx_compile.rows.row_sampling import added_variance, needed_share, share_from_variance

SHARES = tuple(r for r in LADDER if r < 1)


def _norms(seed: int, rows: int = 256, power: float = 3) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)).pow(power).double()


@pytest.mark.parametrize("power", [0.1, 1, 3, 10, 40])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_interpolation_gives_no_less_than_the_needed_share_and_at_most_the_next_rung(power: float, tau: float) -> None:
    norms_sq = _norms(0, power=power)
    share = float(share_from_variance(added_variance(norms_sq, SHARES), SHARES, tau))
    needed = float(needed_share(norms_sq, tau))
    rung = next(r for r in (*SHARES, 1.0) if r >= needed - 1e-9)
    assert needed - 0.5 / 256 <= max(share, needed) <= rung + 0.5 / 256 or share == SHARES[0]
    assert share >= min(needed, SHARES[0]) - 0.5 / 256


def test_sums_over_ranks_of_equal_samples_give_the_share_of_one() -> None:
    one = added_variance(_norms(0), SHARES)
    assert torch.equal(share_from_variance(4 * one, SHARES, 0.1), share_from_variance(one, SHARES, 0.1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_norm_on_one_rank_keeps_all_rows_on_all(bad: float) -> None:
    norms_sq = _norms(0)
    norms_sq[3] = bad
    assert float(share_from_variance(added_variance(norms_sq, SHARES) + added_variance(_norms(1), SHARES), SHARES, 0.1)) == 1


def test_no_observation_changes_nothing() -> None:
    control = RowControl(AdaptiveTable(agree=True), "cut")
    control.take_pooled(torch.zeros(WIDTH, dtype=torch.float64))
    assert control.start_step() == 1 and control.measured == 1


def test_controls_of_two_ranks_that_pool_hold_the_same_share() -> None:
    settings = AdaptiveTable(agree=True, tau=0.5)
    pools, controls = [VariancePool(), VariancePool()], [RowControl(settings, "cut") for _ in range(2)]
    alone = RowControl(AdaptiveTable(tau=0.5), "cut")
    for pool, control in zip(pools, controls, strict=True):
        control.pool = pool
    for step in range(200):
        for rank, control in enumerate((*controls, alone)):
            control.start_step()
            if control.should_observe:
                control.observe(100 * _norms(step, power=20) if rank == 0 else _norms(step, power=0.01))
        sums = sum(pool.local(torch.device("cpu")) for pool in pools)
        for pool in pools:
            pool.deliver(lambda sums=sums: sums)
    assert controls[0].state_dict() == controls[1].state_dict()
    assert controls[0].ratio < alone.ratio


def test_more_controls_or_shares_than_there_is_room_for_decide_alone() -> None:
    pool = VariancePool()
    controls = [RowControl(AdaptiveTable(agree=True), str(i)) for i in range(SLOTS + 1)]
    assert [pool.put(c, torch.ones(2)) for c in controls] == [True] * SLOTS + [False]
    assert not pool.put(controls[0], torch.ones(WIDTH + 1))
