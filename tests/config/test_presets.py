"""The presets equal the tables of Wang and Nelaturu's schedules."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from helpers.compile import Plans
from torch import nn

from approx_compile import ApproxConfig, Backend
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.config import presets

pytestmark = pytest.mark.usefixtures("one_thread")


def convolutions(count: int) -> nn.Module:
    return nn.Sequential(*[m for _ in range(count) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())])


def methods(rules: Any, layers: int, steps: int) -> list[list[str]]:
    """Return what replaces the weight gradient, by layer and step."""
    config = ApproxConfig(policy="always", method="exact", rules=rules)
    plans = Plans()
    torch.compile(convolutions(layers), backend=Backend(config, inner_compile=run_as_is, on_plan=plans))(torch.randn(2, 4, 6, 6))
    schedule = Schedule.of(config)
    columns = [[s.products[-1].method for s in plans[schedule.at(step, None)].sites] for step in range(steps)]
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.slow
def test_figure_3() -> None:
    assert methods(presets.figure_3(), 5, 8) == [list(row) * 2 for row in presets.FIGURE_3]
    assert len(Schedule.of(ApproxConfig(policy="always", method="exact", rules=presets.figure_3())).assignments) == 3  # batches 2 and 4 are alike


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["zero", "random", "max"])
def test_the_three_schedules_and_that_of_two_layers(method: str) -> None:
    table = {
        presets.schedule_1: lambda layer, step: layer % 4 == 1,
        presets.schedule_2: lambda layer, step: layer % 2 == 1 and step % 2 == 1,
        presets.schedule_3: lambda layer, step: step % 4 == 3,
        presets.two_layers: lambda layer, step: layer == 1 and step % 2 == 1,
    }
    for schedule, where in table.items():
        found = methods(schedule(method), 6, 4)
        assert all(found[i][s] == (method if where(i, s) else "exact") for i, s in product(range(6), range(4)))


def test_a_table_for_linear_layers_with_settings() -> None:
    rules = presets.from_table([["exact", {"method": "max", "j": 2}], ["zero", "exact"]], layers="linear")
    assert rules == [
        {"layers": "linear[0]", "steps": "1::2", "grad_weight": {"method": "max", "j": 2}},
        {"layers": "linear[1]", "steps": "0::2", "grad_weight": "zero"},
    ]
    ApproxConfig(policy="always", method="exact", rules=rules)


@pytest.mark.parametrize("table", [[], [["zero"], ["zero", "max"]], [[], []]])
def test_ragged_tables(table: Any) -> None:
    with pytest.raises(ValueError, match="every row needs the same number"):
        presets.from_table(table)
    with pytest.raises(ValueError, match="a kind is expected"):
        presets.from_table([["zero"]], layers="conv1")


def test_mc_samples_the_backward_pass_with_ten_of_a_batch_of_twenty() -> None:
    """k is 10 of the rows and 100 of the units; the forward pass and the last layer's ten outputs are exact."""
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    plans = Plans()
    torch.compile(model, backend=Backend(presets.mc(), inner_compile=run_as_is, on_plan=plans))(torch.randn(20, 784))
    kept = [{p.name: (p.method, p.how.k if p.how else None) for p in s.products} for s in plans.sites]
    sampled, exact = ("bernoulli", 10), ("exact", None)
    (of_units,) = [p for p in plans.sites[1].products if p.name == "grad_input"]
    assert of_units.method == "bernoulli" and of_units.how is not None
    assert abs(of_units.how.k * of_units.how.group - 100) < of_units.how.group, "whole groups of units, whose size depends on the machine"
    assert kept[1] == {"output": exact, "grad_input": kept[1]["grad_input"], "grad_weight": sampled}
    assert kept[2] == {"output": exact, "grad_input": exact, "grad_weight": sampled} and kept[0] == {"output": exact, "grad_weight": sampled}
