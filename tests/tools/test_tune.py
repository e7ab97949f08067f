"""`tune` measures the errors that gradients really have, chooses the best plan and gives reasons. Few of these tests compile, and no time decides."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from helpers.oracles import relative
from helpers.tuning import NOTHING, ModelState, net_and_batch
from rich.progress import Progress
from torch import Tensor, nn

from approx_compile import ApproxConfig, ConfigError, TunedPlan, explain, tune
from approx_compile.passes.cost import margins
from approx_compile.tools.tuning.measurements import Measurements
from approx_compile.tools.tuning.search_space import SearchSpace
from approx_compile.tools.tuning.trial import StepTimes, Trials
from approx_compile.tools.tuning.tune import _Choice, _exact_choice, _result

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what it measures ---


@pytest.fixture
def measured() -> tuple[Measurements, nn.Module, Tensor, Tensor]:
    model, x, y = net_and_batch()
    space = SearchSpace.of({"group": 1})
    trials = Trials(model, (x,), y, None, space.options({}))
    return Measurements(trials, space, NOTHING, [0.5, 0.25], 1e9, Progress(disable=True)), model, x, y


@pytest.mark.slow
def test_errors_are_those_of_the_gradients(measured: Any) -> None:
    """The errors equal those of gradients that are computed by hand with the same random numbers, all in one vector."""
    found, model, x, y = measured
    found.survey()
    found.measure_all(rows=False)
    assert list(found.alone) == [("conv", 0.5), ("twice", 0.5), ("twice#2", 0.5)] and not found.usable and not found.times
    assert found.space.excluded.keys() == {"stem", "head"}

    def gradient(options: dict[str, Any]) -> Tensor:
        torch.manual_seed(0)
        F.cross_entropy(compiled(model, options)[0](x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rule = {"layers": "conv", "method": "topk", "ratio": 0.5, "group": 1}
    exact = gradient({"policy": "always", "method": "exact"})
    model.zero_grad()
    sampled = gradient({"policy": "always", "method": "exact", "rules": [rule]})
    assert found.alone["conv", 0.5].error == pytest.approx(relative(sampled, exact), rel=1e-4)
    assert 0.01 < found.alone["conv", 0.5].error < 3


@pytest.mark.slow
@pytest.mark.exhaustive
def test_errors_of_a_random_choice_are_of_several_draws() -> None:
    model, x = mlp(64, 64, 64), torch.randn(8, 64)
    space = SearchSpace.of({"policy": "always", "method": "crs"})
    trials = Trials(model, (x,), None, lambda output: output.square().mean(), space.options({}))
    found = Measurements(trials, space, NOTHING, [0.5], 1e9, Progress(disable=True))
    space.survey(trials, 0.5)
    options = space.options({"2": 0.5})
    each = [trials.gradients(options, d).error(trials.gradients(space.options({}), d)) for d in range(3)]
    assert len(set(each)) == 3 and found.measure_error(options).error == pytest.approx((sum(e * e for e in each) / 3) ** 0.5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_rows_are_measured(small_work_counts: None) -> None:
    model, x, y = mlp(64, 64, 10), torch.randn(32, 64), torch.randint(10, (32,))
    space = SearchSpace.of({"rules": [{"layers": "site", "method": "exact"}]})
    trials = Trials(model, (x,), y, None, space.options({}))
    found = Measurements(trials, space, 10.0, [0.5], 1e9, Progress(disable=True))
    found.survey()
    found.measure_all(rows=True)
    (tried, saved) = found.rows[0.5]
    assert tried.options == {"policy": "always", "ratio": 0.5, "grad": {"axis": "rows"}} and not found.alone
    assert 0.05 < tried.error < 5 and saved < 1
    ApproxConfig.of(tried.options)


# --- what it says of sites ---


class Odd(nn.Module):
    """A model with names that mean something else in a pattern, layers called twice, a tied weight, and products in the module's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.site, self.twice = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.table = nn.ModuleDict({"a*b": nn.Linear(64, 64), "a?": nn.Linear(64, 64)})
        self.own = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.linear, self.twice, self.site, self.twice, self.table["a*b"], self.twice, self.table["a?"]):
            x = torch.relu(layer(x))
        return torch.relu(torch.relu(x @ self.own) @ self.own.t()) @ self.linear.weight


@pytest.mark.slow
def test_the_sites_chosen_are_those_sampled() -> None:
    model, x = Odd(), torch.randn(8, 64)
    space = SearchSpace.of({"policy": "always", "group": 1})
    space.survey(Trials(model, (x,), None, torch.sum, space.options({})), 0.25)
    names = [s.name for s in space.sampled]
    assert names == ["linear", "twice", "site", "twice#2", "table.a*b", "twice#3", "table.a?", "mm", "mm#2", "mm#3"]
    draw = random.Random(0)
    for _ in range(5):
        choices = {n: draw.choice([0.25, 0.5, 0.75]) for n in names if draw.random() < 0.4}
        kept_of = {s.name: s.products[0].k for s in plans_of(model, space.options(choices), x)}
        assert kept_of == {n: round(64 * choices.get(n, 1.0)) for n in names}


@pytest.mark.slow
def test_rules_of_the_config_hold() -> None:
    model, x = mlp(64, 64, 64, 64), torch.randn(8, 64)
    rules = [{"layers": "0", "method": "exact"}, {"layers": "2", "sampling": "backward", "grad_weight": {"method": "crs", "min_k": 4}}]
    space = SearchSpace.of({"policy": "always", "method": "wta", "group": 1, "inductor": {"max_autotune": False}, "rules": rules})
    space.survey(Trials(model, (x,), None, torch.sum, space.options({})), 0.25)
    assert [s.name for s in space.sampled] == ["2", "4"] and space.random and "settings" in space.excluded["0"]
    options = space.options({"2": 0.5, "4": 0.25})
    assert options["inductor"] == {"max_autotune": False}
    by_name = {s.name: s.products for s in plans_of(model, options, x)}
    assert [p.method for p in by_name["2"]] == ["exact", "wta", "crs"] and [p.k for p in by_name["2"]][1:] == [32, 4]
    assert by_name["4"][0].method == "wta" and by_name["4"][0].k == 16 and by_name["0"][0].k == 64


def test_a_rules_lowering_beats_that_of_all() -> None:
    model, x = mlp(64, 64, 64), torch.randn(8, 64)
    space = SearchSpace.of({"policy": "always", "lowering": "triton", "rules": [{"layers": "0", "lowering": "auto"}]})
    space.survey(Trials(model, (x,), None, torch.sum, space.options({})), 0.25)
    reasons = [s.reason for s in plans_of(model, space.options({"0": 0.5, "2": 0.5}), x)]
    assert ["triton needs a CUDA device" in r for r in reasons] == [False, True]


# --- what it chooses ---


class Four(nn.Sequential):
    """Four layers, of which two are alike."""

    def __init__(self) -> None:
        super().__init__(*mlp(32, 64, 64, 64, 10))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_sites_are_the_same_whether_a_size_is_a_symbol_or_a_number(seed: int, monkeypatch: pytest.MonkeyPatch, small_work_counts: None) -> None:
    """Rows ask for a symbol for the batch, sites do not; whichever trial comes first, sites are known by the sizes that they were traced with. A batch that
    the user marked as dynamic is a symbol everywhere, and the plan fits the model nevertheless."""
    draw = random.Random(seed)
    monkeypatch.setattr(Trials, "compiled", lambda self, options: self.gradients(options))
    monkeypatch.setattr(Trials, "times", lambda self, step, late: StepTimes(1.0, 0.8, draw.uniform(0.5, 0.9)))
    model, x = Four(), torch.randn(draw.choice([32, 48]), 32)
    planned, flipped = Trials.planned, draw.random() < 0.5

    def marked(self: Trials, options: Any) -> tuple[Any, ...]:
        nonlocal flipped
        flipped = not flipped
        self.inputs = (x.clone(),)
        if flipped:
            torch._dynamo.mark_dynamic(self.inputs[0], 0)
        return planned(self, options)

    monkeypatch.setattr(Trials, "planned", marked)
    plan = tune(model, x, loss=lambda y: y.square().mean(), max_error=5.0, config={"group": 1}, ladder=[0.5], rows=draw.random() < 0.5, progress=False)
    assert plan.tuned is not None and [s.shape for s in plan.tuned.sites] == [f"{len(x)}x32x64", *[f"{len(x)}x64x64"] * 2, f"{len(x)}x64x10"]
    assert [s.ratio for s in plan.tuned.sites if s.name in ("0", "6")] == [1, 1] and plan.tuned.predicted_speedup > 1
    explain(model, x, config={"plan": plan})


# --- the whole of it ---


@pytest.mark.exhaustive
@pytest.mark.serial
def test_a_plan_from_beginning_to_end(tmp_path: Any) -> None:
    """Whatever the times are: state, error and record are right, and the plan file runs."""
    model, x, y = mlp(64, 256, 256, 256), torch.randn(64, 64), torch.randint(10, (64,))
    F.cross_entropy(model(x), y).backward()
    before, shown = ModelState(model), Progress(disable=True)
    plan = tune(model, x, target=y, max_error=5.0, config={"group": 1, "rules": [{"layers": "4", "method": "exact"}]}, ladder=[0.5], rows=False, progress=shown)
    assert before.unchanged() and len(shown.tasks) == 1
    assert plan.tuned is not None and [s.name for s in plan.tuned.sites] == ["0", "2", "4"]
    plan.save(tmp_path / "plan.toml")
    assert TunedPlan.load(tmp_path / "plan.toml") == plan
    sampled = {s.name for s in plans_of(model, {"plan": tmp_path / "plan.toml"}, x) if s.decision == "sampled" and s.products[0].decision == "sampled"}
    assert sampled == {s.name for s in plan.tuned.sites if s.ratio < 1}
    assert all((s.reason is None) == (s.ratio < 1) for s in plan.tuned.sites)
    text = str(plan)
    assert f"predicted {plan.tuned.predicted_speedup:.2f}x, achieved" in text and "at most 5 allowed" in text
    if sampled:
        assert plan.tuned.achieved_speedup is not None and plan.tuned.achieved_speedup > 1 and 0 < (plan.tuned.error or 0) <= 5


@pytest.mark.slow
def test_reasons_are_those_of_the_plan_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes on an exact site, which tell what other sites do to it, are those of the chosen plan, not those of the survey at the lowest ratio."""
    monkeypatch.setattr(margins, "pays", lambda *anything: True)
    space = SearchSpace.of({"method": "topk_weights", "group": 1, "policy": "always", "rules": [{"layers": "0", "method": "exact"}]})
    trials = Trials(mlp(64, 128, 64), (torch.randn(8, 64),), None, torch.sum, space.options({}))
    found = Measurements(trials, space, 10.0, (0.5, 0.25), 1e9, Progress(disable=True))
    space.survey(trials, 0.25)
    assert [s.notes for s in space.sites] == [("only the 32 of 128 channels that 2 keeps",), ()]
    tried = found.alone["2", 0.5] = found.measure_error(space.options({"2": 0.5}))
    for choice, reason in (
        (_Choice(tried.options, {"2": 0.5}, 0.1, tried.error, sites=tried.sites), "exact by the settings; only the 64 of 128 channels that 2 keeps"),
        (_exact_choice(found), "exact by the settings"),
    ):
        tuned = _result(found, choice, None, None).tuned
        assert tuned is not None and tuned.sites[0].reason == reason


@pytest.mark.slow
def test_nothing_within_the_error_allowed() -> None:
    model, x, y = net_and_batch()
    plan = tune(model, x, target=y, max_error=NOTHING, ladder=[0.5], rows=False, progress=False)
    assert plan.tuned is not None and plan.tuned.predicted_speedup == 1 and plan.tuned.error == 0 and plan.tuned.achieved_speedup is None
    assert plan.tuned.sites[1].reason is not None and plan.tuned.sites[1].reason.startswith("gradient error 0.")
    assert [s.reason for s in plan.tuned.sites[::4]] == ["fed with raw data", "the last layer"] and "everything stays exact" in str(plan)


@pytest.mark.slow
def test_a_model_compiled_in_place_is_measured_as_written() -> None:
    """The model is measured as written, not with the code that it was compiled to, whatever its settings."""
    model, x, y = net_and_batch()
    options = {"policy": "always", "method": "exact", "rules": [{"layers": "conv", "method": "topk", "ratio": 0.25, "group": 1}]}
    trials = Trials(model, (x,), y, None, {"method": "exact"})
    before = trials.gradients(options).error(trials.gradients({"method": "exact"}))
    model.compile(backend="eager")
    after = trials.gradients(options).error(trials.gradients({"method": "exact"}))
    assert before == after > 0


@pytest.mark.slow
def test_losses() -> None:
    model, x = nn.Linear(64, 64), torch.randn(8, 64)
    squares = Trials(model, (x,), torch.randn(8, 64), None, {"method": "exact"}).gradients({"method": "exact"})
    assert len(squares.values) == 2 and squares.error(squares) == 0
    with pytest.raises(ValueError, match=r"a tensor of shape \(8, 64\); one number with a gradient is expected"):
        tune(model, x, progress=False)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).square().mean()

    assert tune(Whole(), x, max_error=NOTHING, ladder=[0.5], rows=False, progress=False).tuned is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Linear(4, 4).eval()}, "eval mode"),
        ({"model": 3}, "got int"),
        ({"model": torch.nn.functional.relu}, "a torch.nn.Module is expected, compiled or not"),
        ({"model": nn.ReLU()}, "no parameter requires"),
        ({"max_error": 0}, "max_error: got 0"),
        ({"time_budget_s": "long"}, "time_budget_s: got 'long'"),
        ({"ladder": [0.5, 2.0]}, r"ladder: got \[0.5, 2.0\]"),
        ({"config": {"method": "exact"}}, "nothing to tune"),
        ({"config": {"method": "dropout"}}, "leaves out units"),
        ({"config": {"grad": {"axis": "rows"}}}, "tried by itself"),
        ({"config": {"rules": [{"steps": "::2", "ratio": 0.5}]}}, "beside the plan"),
        ({"config": {"ratios": 0.5}}, "unknown key 'ratios'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = arguments.pop("model", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=message):
        tune(model, torch.randn(2, 4), loss=torch.sum, progress=False, **arguments)
