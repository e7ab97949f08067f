"""The policy "adaptive" starts with all rows, follows the norms of the gradients, and has its state in a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import ADAPTIVE
from helpers.models import mlp
from torch import Tensor, nn

import approx_compile
from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.config.words import LADDER
from approx_compile.rows import controller
from approx_compile.rows.controller import OBSERVE_EVERY, RowControl, StepFlops
from approx_compile.rows.ownership import controls
from approx_compile.rows.row_sampling import added_variance
from approx_compile.utils import percent

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


def heavy(size: int, share: float) -> Tensor:
    """Return squared norms of which a share is large and the rest zero."""
    return torch.cat([torch.ones(round(share * size)), torch.full((size - round(share * size),), 1e-12)])


def steps(c: RowControl, norms_sq: Tensor, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(c.start_step())
        if c.should_observe:
            c.observe(norms_sq)
    return found


def test_a_control_starts_exact_relaxes_and_goes_back() -> None:
    c = RowControl(AdaptiveTable(), "cut")
    assert steps(c, heavy(1000, 0.2), OBSERVE_EVERY + 1)[0] == 1
    found = steps(c, heavy(1000, 0.2), 60 * OBSERVE_EVERY)
    assert found[-1] == 0.25 and sorted(found, reverse=True) == found
    assert c.measured == pytest.approx(0.2, abs=0.03)
    back = steps(c, torch.ones(1000), 60 * OBSERVE_EVERY)
    assert back[-1] == 1 and sorted(back) == back
    assert c.changes[0] == (0, 1.0) and set(r for _, r in c.changes) <= set(LADDER)
    assert c.kept == pytest.approx(sum([1.0] * (OBSERVE_EVERY + 1) + found + back) / (OBSERVE_EVERY + 1 + len(found) + len(back)), abs=1e-9)


def test_a_number_is_used_in_the_step_after_it_was_made() -> None:
    c = RowControl(AdaptiveTable(), "cut")
    c.start_step()
    c.observe(heavy(1000, 0.01))
    before = c.measured
    c.start_step()
    assert before == 1 and c.measured == pytest.approx(0.9 + 0.1 * 0.01, abs=1e-3)


def test_even_gradients_are_declined() -> None:
    c = RowControl(AdaptiveTable(), "cut")
    assert set(steps(c, torch.rand(256) * 0.1 + 1, 200)) == {1.0}


def auto_control(on_rows: float = 0.6) -> RowControl:
    c = RowControl(AdaptiveTable(tau="auto"), "cut")
    c.work = StepFlops(on_rows, 1.0)
    return c


def test_tau_auto_keeps_the_share_with_the_least_time_to_a_given_noise() -> None:
    norms_sq = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 12
    for excess in (1.0, 30.0):
        c = auto_control()
        c.excess = excess
        assert steps(c, norms_sq, OBSERVE_EVERY + 1)[0] == 1
        found = steps(c, norms_sq, 80 * OBSERVE_EVERY)
        costs = {}
        for r in LADDER:
            variance, square = added_variance(norms_sq, [r]).tolist()
            v = variance / square if r < 1 else 0.0
            costs[r] = (1 - 0.6 * (1 - r) + controller.OVERHEAD * (r < 1)) * (1 + excess * v)
        assert found[-1] == min(costs, key=costs.__getitem__) < 1
        assert c.measured == found[-1]


def test_tau_auto_keeps_all_rows_where_that_is_cheapest() -> None:
    even = auto_control()
    assert set(steps(even, torch.ones(256), 200)) == {1.0}
    little_work = auto_control(on_rows=0.02)
    assert set(steps(little_work, heavy(256, 0.1), 200)) == {1.0}
    unknown = auto_control()
    assert set(steps(unknown, torch.full((256,), torch.nan), 40)) == {1.0}


def test_the_state_under_tau_auto_has_the_variances_by_share() -> None:
    c, again = auto_control(), auto_control()
    steps(c, heavy(256, 0.2), 30)
    again.load_state_dict(c.state_dict())
    assert again.state_dict() == c.state_dict() and steps(again, heavy(256, 0.1), 40) == steps(c, heavy(256, 0.1), 40)
    before = list(again.curve)
    again.load_state_dict(RowControl(AdaptiveTable(), "cut").state_dict())
    assert again.curve == before


def training(model: nn.Module, options: dict[str, Any] = ADAPTIVE, lr: float = 0.01) -> tuple[Any, torch.optim.Optimizer]:
    return torch.compile(model, backend=Backend(options, inner_compile=run_as_is)), torch.optim.Adam(model.parameters(), lr)


def train(f: Any, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> list[float]:
    """Train on two clouds that are far apart: after some steps few samples have a large gradient."""
    losses = []
    for i in range(first, first + count):
        g = torch.Generator().manual_seed(i)
        y = torch.randint(0, 2, (128,), generator=g)
        x = torch.randn(128, 20, generator=g) + 1.5 * (2 * y[:, None] - 1)
        optimizer.zero_grad()
        loss = F.cross_entropy(f(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.1, "auto"])
def test_training_relaxes_and_learns(tau: float | str) -> None:
    model = mlp(20, 64, 2)
    f, optimizer = training(model, ADAPTIVE | {"adaptive": {"tau": tau}})
    losses = train(f, optimizer, 200)
    (c,) = controls(f).values()
    assert c.step == 200 and c.ratio < 0.3 and c.kept < 0.7
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.slow
def test_decisions_are_shown(tmp_path: Path) -> None:
    model = mlp(20, 64, 2)
    assert "No backward pass has chosen its share of the rows" in str(approx_compile.decisions(model))
    f, optimizer = training(model)
    train(f, optimizer, 120)
    (c,) = controls(f).values()
    shown = approx_compile.decisions(f)
    assert f"whole backward pass   120    rows needed {percent(c.measured)}" in str(shown) and f"{percent(c.ratio)} now, {percent(c.kept)} on average" in str(
        shown
    )
    assert f"{len(c.changes) - 1} change" in str(shown)
    shown.plot(tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 5000


def test_decisions_before_a_change_after_loading_and_with_many_controls(small_work_counts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    model, x = mlp(20, 64, 2), torch.randn(64, 20)
    f = torch.compile(model, backend=Backend(None, inner_compile=run_as_is))
    f(x).square().mean().backward()
    assert "still the whole batch: nothing measured yet" in str(approx_compile.decisions(f))
    for _ in range(2):
        f(x).square().mean().backward()
    text = str(approx_compile.decisions(f))
    assert "whole backward pass" in text and "100 % now, 100 % on average" in text and "most samples still matter" in text
    saved, again = approx_compile.state_dict(f), mlp(20, 64, 2)
    approx_compile.load_state_dict(again, saved)
    loaded = " ".join(str(approx_compile.decisions(again)).split())
    assert loaded.startswith("A state was loaded (step 3, 100 % kept) and has not run yet")
    (control,) = controls(f).values()
    eleven = approx_compile.Decisions({f"{i}.{control.name}": control for i in range(11)})
    assert len({line.split("   ")[0] for line in str(eleven).splitlines() if "backward pass" in line}) == 11
    eleven.plot(tmp_path / "eleven.svg")
    drawn = (tmp_path / "eleven.svg").read_text()
    assert drawn.count("whole backward pass from") == 4 and "the 4 of 11 controls" in drawn


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one() -> None:
    model = mlp(20, 64, 2)
    f, optimizer = training(model)
    train(f, optimizer, 90)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "approx": approx_compile.state_dict(f)})
    rng = torch.get_rng_state()
    want = train(f, optimizer, 60, first=90)
    of_budget = {"passes", "added", "predicted", "measurements"}
    keys = [set(state) for cuts in saved["approx"]["controls"].values() for state in cuts.values()]
    assert keys == [of_budget, {"step", "passes", "measured", "changes"}, {"draws"}]

    for compiled_before in (False, True):
        torch._dynamo.reset()
        twin = mlp(20, 64, 2)
        twin.load_state_dict(saved["model"])
        g, again = training(twin)
        again.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it would go on with these very tensors
        if compiled_before:
            g(torch.randn(128, 20)).sum().backward()
        approx_compile.load_state_dict(g, saved["approx"])
        assert approx_compile.state_dict(g) == saved["approx"]
        torch.set_rng_state(rng)
        assert train(g, again, 60, first=90) == want


def test_two_models_of_a_class_have_controls_of_their_own() -> None:
    one, two = mlp(20, 64, 2), mlp(20, 64, 2)
    f, optimizer = training(one)
    g, other = training(two)
    train(f, optimizer, 40)
    train(g, other, 8)
    assert [c.step for c in controls(one).values()] == [40]
    assert [c.step for c in controls(two).values()] == [8]


def test_evaluation_and_other_sizes_keep_the_state() -> None:
    model = mlp(20, 64, 2)
    f, optimizer = training(model)
    train(f, optimizer, 40)
    model.eval()
    with torch.no_grad():
        f(torch.randn(50, 20))
    model.train()
    f(torch.randn(77, 20)).sum().backward()
    train(f, optimizer, 2, first=40)
    assert [(c.passes, c.step) for c in controls(model).values()] == [(43, 42)]


def test_the_random_state_is_untouched_while_all_rows_run() -> None:
    model = mlp(20, 64, 2)
    f, optimizer = training(model)
    before = torch.get_rng_state()
    train(f, optimizer, 3)
    assert controls(f) and torch.equal(torch.get_rng_state(), before)


def test_history_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "HISTORY", 4)
    c = RowControl(AdaptiveTable(), "cut")
    for i in range(20):
        steps(c, heavy(1000, 0.05 if i % 2 else 1.0), 30 * OBSERVE_EVERY)
    assert len(c.changes) <= max(4, controller.HISTORY) or c.changes.maxlen is not None
