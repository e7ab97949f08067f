"""The parts of tune that only compute: the knapsack, and step times predicted from those of other plans."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.compile import plans_of
from helpers.models import mlp

from approx_compile.tools.tuning.knapsack import Option, solve_knapsack
from approx_compile.tools.tuning.step_time_model import MeasuredPlan, StepTimeModel


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_the_best_there_is(seed: int) -> None:
    draw = random.Random(seed)
    options = [Option(f"s{i}", draw.uniform(-0.1, 1), draw.uniform(0, 0.5)) for i in range(5) for _ in range(2)]
    overlaps = {(i, j): draw.uniform(0, 0.6) for i, j in itertools.combinations(range(10), 2) if i // 2 != j // 2 and draw.random() < 0.3}

    def value(chosen: tuple[int, ...]) -> float:
        return sum(options[i].gain for i in chosen) - sum(w for (i, j), w in overlaps.items() if i in chosen and j in chosen)

    legal = (
        tuple(i for i in pick if i is not None)
        for pick in itertools.product(*[(None, 2 * s, 2 * s + 1) for s in range(5)])
        if sum(options[i].cost for i in pick if i is not None) <= 0.6
    )
    best = max(map(value, legal))
    found = solve_knapsack(options, 0.6, overlaps)
    assert value(tuple(found)) == pytest.approx(best, abs=1e-5) and sum(options[i].cost for i in found) <= 0.6 + 1e-6
    assert len({options[i].site for i in found}) == len(found)


def test_the_knapsack_with_nothing_to_choose() -> None:
    assert solve_knapsack([], 1.0) == [] and solve_knapsack([Option("a", -1.0, 0.0), Option("b", 1.0, 2.0)], 1.0) == []


def test_step_times_are_predicted_from_others() -> None:
    """Of two kinds of sites one saves twice as much per FLOP. This is found from four steps, and is right for a plan that is not among them."""
    model, x = mlp(64, 64, 64, 128, 128), torch.randn(8, 64)
    whole = tuple(plans_of(model, {"policy": "always", "group": 1}, x))

    def plan(*ratios: float) -> tuple[Any, ...]:
        sampled = [r < 1 for r in ratios]
        return tuple(
            replace(s, decision="sampled" if d else "exact", products=tuple(replace(p, flops_sampled=round(r * p.flops_exact)) for p in s.products))
            for s, r, d in zip(whole, ratios, sampled, strict=True)
        )

    total = sum(s.flops_exact for s in whole)

    def saved(sites: tuple[Any, ...]) -> float:
        speed = {"64x64": 0.5, "64x128": 0.8, "128x128": 1.0}
        return sum(speed[s.shape.split("x", 1)[1]] * (s.flops_exact - s.flops_sampled) / total - 0.004 * (s.decision == "sampled") for s in sites)

    assert StepTimeModel(whole, []).saved(plan(0.5, 1, 1, 1)) == pytest.approx(0.5 * whole[0].flops_exact / total)
    seen = [plan(r, r, q, s) for r, q, s in ((0.5, 1, 1), (0.25, 1, 1), (1, 0.5, 1), (1, 0.25, 1), (1, 1, 0.5), (1, 1, 0.25))]
    model_of_time = StepTimeModel(whole, [MeasuredPlan(p, saved(p)) for p in seen])
    new = plan(0.5, 0.25, 0.5, 0.25)
    assert model_of_time.saved(new) == pytest.approx(saved(new), abs=0.01)
    assert StepTimeModel((), []).saved(()) == 0
