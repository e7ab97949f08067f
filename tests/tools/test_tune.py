"""tune: what it measures is what there is, what it chooses is best, and it leaves no trace. Few of these compile; no time decides."""

from __future__ import annotations

import io
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from helpers.oracles import relative
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from approx_compile import ApproxConfig, ConfigError, TunedPlan, explain, tune
from approx_compile.passes.cost import margins
from approx_compile.tools.model_state import training_state_preserved
from approx_compile.tools.tuning import measurements
from approx_compile.tools.tuning.knapsack import Option, solve_knapsack
from approx_compile.tools.tuning.measurements import Measurements
from approx_compile.tools.tuning.search_space import SearchSpace
from approx_compile.tools.tuning.step_time_model import MeasuredPlan, StepTimeModel
from approx_compile.tools.tuning.trial import StepTimes, Trials
from approx_compile.tools.tuning.tune import _Choice, _exact_choice, _result

tune_module = sys.modules[tune.__module__]

pytestmark = pytest.mark.usefixtures("one_thread")

NOTHING = 1e-9
"""A gradient error that no sampling stays under: nothing is timed then, so nothing compiled."""


class Net(nn.Module):
    """Convolutions with BatchNorm and dropout, a layer called twice, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.twice, self.drop, self.head = nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.relu(self.bn(self.conv(torch.relu(self.stem(x))))).mean((2, 3))
        return self.head(self.drop(torch.relu(self.twice(torch.relu(self.twice(h))))))


def net_and_batch() -> tuple[Net, Tensor, Tensor]:
    return Net(), torch.randn(16, 3, 8, 8), torch.randint(10, (16,))


class State:
    """All that must not change, bit for bit, and whether it has."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
        self.objects = dict(model.state_dict(keep_vars=True))
        self.grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
        self.attributes = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
        self.states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def unchanged(self) -> bool:
        now = self.model.state_dict(keep_vars=True)
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        numpy_state = np.random.get_state()
        return (
            all(now[k] is v for k, v in self.objects.items())
            and all(torch.equal(now[k], v) for k, v in self.tensors.items())
            and grads.keys() == self.grads.keys()
            and all(grads[n] is g and torch.equal(g, content) for n, (g, content) in self.grads.items())
            and self.attributes == [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in self.model.modules()]
            and torch.equal(torch.get_rng_state(), self.states[0])
            and random.getstate() == self.states[1]
            and all(np.array_equal(a, b) for a, b in zip(numpy_state, self.states[2], strict=True))
        )


def trained(model: nn.Module, x: Tensor, y: Tensor) -> State:
    """The state of a model that has gradients, all but one, and running statistics."""
    F.cross_entropy(model(x), y).backward()
    model.get_parameter("head.bias").grad = None
    return State(model)


def after(calls: int, act: Callable[[], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that draws random numbers of all kinds, and does something at its n-th call."""
    counter = itertools.count(1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(())
        if next(counter) == calls:
            act()
        return F.cross_entropy(output, target)

    return loss


# --- what it measures ---


@pytest.fixture
def measured() -> tuple[Measurements, nn.Module, Tensor, Tensor]:
    model, x, y = net_and_batch()
    space = SearchSpace.of({"group": 1})
    trials = Trials(model, (x,), y, None, space.options({}))
    return Measurements(trials, space, NOTHING, [0.5, 0.25], 1e9, Progress(disable=True)), model, x, y


@pytest.mark.slow
def test_errors_are_those_of_the_gradients(measured: Any) -> None:
    """Against the gradients of the model trained by hand with the same random numbers, all of them in one vector."""
    found, model, x, y = measured
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
def test_rows_are_measured(small_work_counts: None) -> None:
    model, x, y = mlp(64, 64, 10), torch.randn(32, 64), torch.randint(10, (32,))
    space = SearchSpace.of({"rules": [{"layers": "site", "method": "exact"}]})
    trials = Trials(model, (x,), y, None, space.options({}))
    found = Measurements(trials, space, 10.0, [0.5], 1e9, Progress(disable=True))
    found.measure_all(rows=True)
    (tried, saved) = found.rows[0.5]
    assert tried.options == {"policy": "always", "ratio": 0.5, "grad": {"axis": "rows"}} and not found.alone
    assert 0.05 < tried.error < 5 and saved < 1
    ApproxConfig.of(tried.options)


# --- what it says of sites ---


class Odd(nn.Module):
    """Names that mean something else in a pattern, layers called twice, a tied weight, and products in the module's own forward."""

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
    """Two kinds of sites of which one saves twice as much per FLOP: found from four steps, right for a plan not among them."""
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


class Four(nn.Sequential):
    """Four layers of which two are alike."""

    def __init__(self) -> None:
        super().__init__(*mlp(32, 64, 64, 64, 10))


@pytest.mark.slow
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


@pytest.mark.serial
def test_a_plan_from_beginning_to_end(tmp_path: Any) -> None:
    """Whatever the times: state, error and record are right, and the file runs."""
    model, x, y = mlp(64, 256, 256, 256), torch.randn(64, 64), torch.randint(10, (64,))
    F.cross_entropy(model(x), y).backward()
    before, shown = State(model), Progress(disable=True)
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
    """What the others do to an exact site is said as the plan chosen has it, whatever the survey, at the lowest ratio, had planned."""
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


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started in the background of a shell, which then ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.serial
def test_an_interrupt_gives_what_there_is(ctrl_c: None) -> None:
    """Ctrl-C before anything is timed: the knapsack takes times to go with FLOPs."""
    model, x, y = net_and_batch()
    before = trained(model, x, y)
    plan = tune(model, x, target=y, loss=after(4, interrupt), max_error=5.0, config={"group": 1}, ladder=[0.5], rows=False, progress=False)
    assert before.unchanged() and plan.tuned is not None
    assert plan.tuned.stopped == "a keyboard interrupt" and plan.tuned.achieved_speedup is None and plan.tuned.error is None
    ratios = {s.name: s.ratio for s in plan.tuned.sites}
    assert ratios["conv"] == 0.5 and plan.tuned.predicted_speedup > 1.1  # most of the FLOPs, measured first
    assert ratios["stem"] == ratios["head"] == 1 and "not measured" in str(plan)
    early = tune(model, x, target=y, loss=after(1, interrupt), progress=False)
    assert before.unchanged() and "rules" not in early.options


@pytest.mark.slow
def test_an_exception_leaves_no_trace() -> None:
    def fail() -> None:
        raise RuntimeError("the user's own")

    model, x, y = net_and_batch()
    before = trained(model, x, y)
    with pytest.raises(RuntimeError, match="the user's own"):
        tune(model, x, target=y, loss=after(3, fail), progress=False)
    assert before.unchanged()


def test_kept_puts_everything_back() -> None:
    model, x, y = net_and_batch()
    before = trained(model, x, y)
    with training_state_preserved(model), torch.no_grad():
        model.conv.weight.mul_(2)
        model.conv.weight.grad = None
        model.bn(torch.randn(4, 32, 2, 2))
        model.calls, model.extra = 7, 1
        random.random(), np.random.rand(), torch.rand(())
        assert not before.unchanged()
    assert before.unchanged()


@pytest.mark.slow
def test_the_time_budget_ends_it() -> None:
    model, x, y = net_and_batch()
    before = trained(model, x, y)
    plan = tune(model, x, target=y, time_budget_s=1e-6, progress=False)
    assert before.unchanged() and plan.tuned is not None and plan.tuned.stopped == "the time budget of 1e-06 s"
    assert plan.options == {"policy": "always", "method": "exact"} and plan.tuned.sites[1].reason == "not measured"


class Counted(Trials):
    """Trials whose seconds are counted, not spent: a step op by op takes 1, a compilation `COMPILING`, a pair of steps 1 and 41 of them at most."""

    COMPILING = 20.0
    clock = 0.0
    compiled_for: ClassVar[list[str]] = []

    def gradients(self, options: Any, draw: int = 0) -> Any:
        Counted.clock += 1.0
        return super().gradients(options, draw)

    def compiled(self, options: Any) -> Any:
        Counted.clock += self.COMPILING
        Counted.compiled_for.append(str(options))
        return lambda: None

    def times(self, step: Any, late: Callable[[], bool]) -> StepTimes:
        _ = self.exact
        for pair in range(41):
            if pair >= 5 and late():
                break
            Counted.clock += 1.0
        return StepTimes(1.0, 0.8, 0.8)


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "rows"), [(2.0, True), (20.0, False), (100.0, True), (100.0, False), (250.0, True), (1e9, True)])
def test_the_time_budget_is_kept(budget: float, rows: bool, monkeypatch: pytest.MonkeyPatch, small_work_counts: None) -> None:
    """To one trial, by a clock of its own; and what was not measured is said to be so."""
    monkeypatch.setattr(tune_module, "Trials", Counted)
    monkeypatch.setattr(measurements, "now", lambda: Counted.clock)
    monkeypatch.setattr(Counted, "clock", 0.0)
    monkeypatch.setattr(Counted, "compiled_for", [])
    model, x = mlp(32, 64, 64, 10), torch.randn(32, 32)
    plan = tune(model, x, loss=lambda y: y.square().mean(), max_error=5.0, time_budget_s=budget, config={"group": 1}, ladder=[0.5], rows=rows, progress=False)
    assert plan.tuned is not None and Counted.clock <= max(budget + Counted.COMPILING, 2.0)
    assert plan.tuned.stopped is None or plan.tuned.stopped == f"the time budget of {budget:g} s"
    hidden = plan.tuned.sites[1]
    assert hidden.name == "2"
    if not Counted.compiled_for and hidden.ratio == 1:
        assert hidden.reason is not None and hidden.reason.startswith("not measured") and "1 of 3 sites for want of a measurement" in str(plan)
    if budget == 1e9:
        assert plan.tuned.stopped is None and len(Counted.compiled_for) > 2 and plan.tuned.achieved_speedup == 1.25 and "not measured" not in str(plan)
    if budget <= 20:
        assert not Counted.compiled_for and plan.tuned.achieved_speedup is None and plan.tuned.stopped is not None
    if plan.tuned.achieved_speedup is None and (hidden.ratio < 1 or plan.tuned.rows is not None):
        assert "achieved not measured" in str(plan)


@pytest.mark.slow
def test_how_long_it_would_take_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "Trials", Counted)
    monkeypatch.setattr(measurements, "now", lambda: Counted.clock)
    console = Console(file=io.StringIO(), width=400)
    with Progress(console=console) as shown:
        tune(mlp(32, 64, 64, 10), torch.randn(32, 32), loss=torch.sum, time_budget_s=5.0, config={"group": 1}, ladder=[0.5], rows=False, progress=shown)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tune: up to 13 gradients and 4 compilations, at most about" in text and "the time budget is 5 s; what does not fit" in text


@pytest.mark.slow
def test_nothing_within_the_error_allowed() -> None:
    model, x, y = net_and_batch()
    plan = tune(model, x, target=y, max_error=NOTHING, ladder=[0.5], rows=False, progress=False)
    assert plan.tuned is not None and plan.tuned.predicted_speedup == 1 and plan.tuned.error == 0 and plan.tuned.achieved_speedup is None
    assert plan.tuned.sites[1].reason is not None and plan.tuned.sites[1].reason.startswith("gradient error 0.")
    assert [s.reason for s in plan.tuned.sites[::4]] == ["fed with raw data", "the last layer"] and "everything stays exact" in str(plan)


@pytest.mark.slow
def test_a_model_compiled_in_place_is_measured_as_written() -> None:
    """Not with the code that it was compiled to, under any settings."""
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
        ({"model": torch.compile(nn.Linear(4, 4))}, "before torch.compile"),
        ({"model": nn.ReLU()}, "no parameter requires"),
        ({"max_error": 0}, "max_error: got 0"),
        ({"time_budget_s": "long"}, "time_budget_s: got 'long'"),
        ({"ladder": [0.5, 2.0]}, r"ladder: got \[0.5, 2.0\]"),
        ({"config": {"method": "exact"}}, "nothing to tune"),
        ({"config": {"grad": {"axis": "rows"}}}, "tried by itself"),
        ({"config": {"rules": [{"steps": "::2", "ratio": 0.5}]}}, "beside the plan"),
        ({"config": {"ratios": 0.5}}, "unknown key 'ratios'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = arguments.pop("model", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=message):
        tune(model, torch.randn(2, 4), loss=torch.sum, progress=False, **arguments)
