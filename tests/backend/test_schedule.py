"""Settings that change over a run: what counts as a step, which assignment runs, and that nothing recompiles."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from helpers.compile import Choices, Plans
from helpers.models import Buckets, mlp
from helpers.oracles import grads
from torch import nn
from torch._dynamo.utils import counters

import approx_compile
from approx_compile import ApproxConfig, ApproxWarning, Backend, ConfigError, set_phase, set_step
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime import dispatch, step_counter
from approx_compile.backend.runtime.schedule import MAX_ASSIGNMENTS, Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_OTHER = {"policy": "always", "method": "exact", "rules": [{"layers": "linear[1]", "steps": "1::2", "method": "topk", "ratio": 0.25}]}


class Watched:
    """A compiled model, its optimizer, and which choices each forward pass made."""

    def __init__(self, options, model=None, **kwargs):
        self.choices = Choices()
        self.model = model if model is not None else mlp(20, 64, 64, 4)
        self.f = torch.compile(self.model, backend=Backend(options, inner_compile=self.choices), **kwargs)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def kept(self, x=None):
        """How many entries each site kept in one forward and backward pass."""
        self.choices.clear()
        self.f(torch.randn(32, 20) if x is None else x).sum().backward()
        return {name.split(".")[0]: len(idx) for name, idx in self.choices.items() if name.endswith("output.idx")}

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_step_is_an_optimizer_step() -> None:
    w = Watched(EVERY_OTHER)
    before = counters["stats"]["unique_graphs"]
    for i in range(6):
        want = {"2": 16} if i % 2 else {}
        assert w.kept() == want
        assert w.kept() == want  # a second batch of the same step: gradient accumulation
        w.step()
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.slow
def test_nothing_recompiles_after_the_first_call() -> None:
    options = {"policy": "always", "ratio": 0.5, "rules": [{"steps": "2:4", "ratio": 0.25}, {"steps": "4:", "method": "exact"}]}
    w = Watched(options)
    sizes = []
    for _ in range(3):  # training, a partial batch, evaluation: an entry each, whatever the phase
        w.kept()
        w.kept(torch.randn(20, 20))
        w.model.eval()
        with torch.no_grad():
            w.f(torch.randn(32, 20))
        w.model.train()
        entries = counters["stats"]["unique_graphs"]
        for _ in range(2):
            sizes.append(w.kept()["0" if w.choices else "2"] if w.choices else 0)
            w.step()
        assert counters["stats"]["unique_graphs"] == entries
    assert sizes == [16, 16, 16, 16, 0, 0]


@pytest.mark.slow
def test_three_phases_run_what_each_would_alone() -> None:
    options = {"policy": "always", "ratio": 0.5, "rules": [{"steps": "1:2", "ratio": 0.25, "layers": "linear[1]"}, {"steps": "2:", "method": "exact"}]}
    config = ApproxConfig(**options)
    model, x = mlp(20, 64, 64, 4), torch.randn(32, 20)
    f = torch.compile(model, backend=Backend(options, inner_compile=run_as_is))
    for step in (0, 1, 2, 1, 0):
        set_step(model, step)
        f(x).square().sum().backward()
        got = grads(model)
        torch.compile(model, backend=Backend(config.at(step), inner_compile=run_as_is))(x).square().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(got, grads(model), strict=True))


def test_inductor_runs_the_same_assignments() -> None:
    model, x = mlp(20, 64, 64, 4), torch.randn(32, 20)
    f = torch.compile(model, backend="approx", options=EVERY_OTHER)
    for step in (0, 1, 2):
        set_step(model, step)
        f(x).square().sum().backward()
        got = grads(model)
        torch.compile(model, backend=Backend(ApproxConfig(**EVERY_OTHER).at(step), inner_compile=run_as_is))(x).square().sum().backward()
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, grads(model), strict=True))


@pytest.mark.slow
def test_two_models_of_a_class_are_at_steps_of_their_own() -> None:
    one, two = Watched(EVERY_OTHER), Watched(EVERY_OTHER)
    one.kept()
    one.step()
    assert two.kept() == {} and one.kept() == {"2": 16}
    two.step()
    two.step()
    assert two.kept() == {} and one.kept() == {"2": 16}


def test_the_optimizer_that_owns_the_parameters_counts() -> None:
    w = Watched(EVERY_OTHER)
    other = nn.Linear(2, 2)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    w.kept()
    for _ in range(3):
        other(torch.ones(1, 2)).sum().backward()
        elsewhere.step()
    assert w.kept() == {}
    halves = [torch.optim.SGD(list(w.model.parameters())[:2], lr=0.1), torch.optim.Adam(list(w.model.parameters())[2:], lr=0.1)]
    for i in range(4):  # both step once per iteration: that is one step
        assert w.kept() == ({"2": 16} if i % 2 else {})
        for o in halves:
            o.step()


def steps_of(model: nn.Module) -> set[int]:
    return {c.step for p in model.parameters() if (c := step_counter._step_counts.get(p)) is not None and c.owned}


def test_frozen_layers_have_no_say() -> None:
    w = Watched(EVERY_OTHER)
    w.model[0].requires_grad_(False)
    w.optimizer = torch.optim.SGD(list(w.model.parameters())[2:], lr=1e-3)
    for i in range(3):
        assert w.kept() == ({"2": 16} if i % 2 else {})
        w.step()
    set_phase(w.model, None)
    for i in range(3, 6):
        assert w.kept() == ({"2": 16} if i % 2 else {})
        w.step()
    set_step(w.model, 100)
    assert w.kept() == {}
    w.step()
    assert w.kept() == {"2": 16} and steps_of(w.model) == {101}


def test_optimizers_of_the_same_parameters_count_together() -> None:
    w = Watched(EVERY_OTHER)
    w.kept()
    pair = [torch.optim.SGD(w.model.parameters(), lr=1e-3), torch.optim.Adam(w.model.parameters(), lr=1e-3)]
    for i in range(6):
        pair[i % 2].step()
        assert steps_of(w.model) == {i + 1}


def test_an_optimizer_inside_another_counts_once() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step()

    w = Watched(EVERY_OTHER)
    w.kept()
    outer = Wrapper(w.optimizer)
    for i in range(4):
        outer.step()
        assert steps_of(w.model) == {i + 1}


def test_a_function_of_leaves() -> None:
    choices, weight = Choices(), torch.randn(64, 64, requires_grad=True)
    options = {"policy": "always", "rules": [{"steps": ":1", "method": "exact"}]}
    f = torch.compile(lambda x, w: x @ w, backend=Backend(options, inner_compile=choices))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    for i in range(3):
        choices.clear()
        f(torch.randn(32, 64), weight).sum().backward()
        assert bool(choices) == (i > 0)
        optimizer.step()


def test_a_graph_that_nobody_counts_says_so() -> None:
    class Core(nn.Module):
        def forward(self, q, k):
            return q @ k.mT

    q, k = torch.randn(4, 32, 64, requires_grad=True), torch.randn(4, 32, 64, requires_grad=True)
    f = torch.compile(Core(), backend=Backend({"policy": "always", "rules": [{"steps": ":1", "method": "exact"}]}, inner_compile=run_as_is))
    with pytest.warns(ApproxWarning, match="the function has no parameters in one of its graphs: the settings of step 0"):
        f(q * 1, k * 1)


def test_a_step_that_gradscaler_skips_on_the_host_does_not_count() -> None:
    w = Watched(EVERY_OTHER)
    scaler = torch.amp.GradScaler("cpu")
    for bad in (True, False):
        scaler.scale(w.f(torch.randn(32, 20) * (float("inf") if bad else 1)).sum()).backward()
        scaler.step(w.optimizer)
        scaler.update()
        w.optimizer.zero_grad()
        assert w.kept() == ({} if bad else {"2": 16})
        w.optimizer.zero_grad()


def test_a_compiled_optimizer_counts() -> None:
    w = Watched(EVERY_OTHER)
    w.kept()
    torch.compile(w.optimizer.step, backend="eager")()
    w.optimizer.zero_grad()
    assert w.kept() == {"2": 16}


@pytest.mark.slow
def test_phases_by_name() -> None:
    rules = [{"phase": "coarse", "ratio": 0.25}, {"phase": ["exact", "frozen"], "method": "exact"}]
    w = Watched({"policy": "always", "ratio": 0.5, "min_k": 1, "rules": rules})
    assert w.kept()["2"] == 32
    set_phase(w.f, "coarse")
    w.step()
    assert w.kept()["2"] == 16
    set_phase(w.model, "frozen")
    assert w.kept() == {}
    set_phase(w.model, None)
    assert w.kept()["2"] == 32
    set_phase(w.model, "corse")
    with pytest.warns(ApproxWarning, match="phase 'corse' is set for Sequential, which no rule asks for; rules name 'coarse', 'exact', 'frozen'"):
        assert w.kept()["2"] == 32


@pytest.mark.slow
def test_the_end_of_a_run_of_known_length_is_exact() -> None:
    w = Watched({"policy": "always", "ratio": 0.5, "total_steps": 10})
    seen = [bool((w.kept(), w.step())[0]) for _ in range(12)]
    assert seen == [True] * 8 + [False] * 4
    for more, until in (({"final_exact": 0.5}, 5), ({"final_exact": 0.0}, 12)):
        torch._dynamo.reset()
        w = Watched({"policy": "always", "ratio": 0.5, "total_steps": 10, **more})
        assert sum(bool((w.kept(), w.step())[0]) for _ in range(12)) == until


def test_gradients_sampled_by_themselves_go_on_to_the_end() -> None:
    for options in ({"policy": "always", "sampling": "backward"}, {"policy": "adaptive"}, {"grad": {"axis": "rows"}}):
        assert len(Schedule.of(ApproxConfig(total_steps=10, **options)).assignments) == 1
    assert ApproxConfig(total_steps=10, final_exact=0.1).policy == "adaptive"
    config = ApproxConfig(policy="always", total_steps=10, grad_weight={"method": "bernoulli", "ratio": 0.25}).at(9)
    settings = config.settings([True])
    assert (settings.output.method, settings.grad_input.method, settings.grad_weight.method) == ("exact", "exact", "bernoulli")


def test_shares_of_the_run() -> None:
    config = ApproxConfig(policy="always", method="exact", total_steps=50, final_exact=0.0, rules=[{"steps": "20%:50%:5", "method": "topk"}])
    assert [s for s in range(60) if config.at(s).rules] == [10, 15, 20]


@pytest.mark.slow
def test_rows_by_step(small_work_counts) -> None:
    plans = Plans()
    model = mlp(20, 64, 64, 4)
    options = {"grad": {"axis": "rows", "ratio": 0.25}, "policy": "always", "rules": [{"steps": "1::2", "method": "exact"}]}
    f = torch.compile(model, backend=Backend(options, inner_compile=run_as_is, on_plan=plans))
    x, weights = torch.randn(64, 20), torch.randn(64, 1)
    f(x)
    assert [[c.decision for c in p.cuts] for p in plans] == [["rows"], []]
    for step in range(4):
        set_step(model, step)
        (f(x) * weights).sum().backward()
        got = grads(model)
        (model(x) * weights).sum().backward()
        exact = all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(got, grads(model), strict=True))
        assert exact == bool(step % 2)


def test_rows_that_are_declined_in_every_assignment_leave_static_sizes() -> None:
    plans = Plans()
    options = {"policy": "adaptive", "rules": [{"steps": ":5", "method": "exact"}]}
    f = torch.compile(mlp(20, 64, 4), backend=Backend(options, inner_compile=run_as_is, on_plan=plans))
    f(torch.randn(64, 20)).sum().backward()
    assert len(plans) == 2 and not any(s.decision == "sampled" for s in plans.sites)
    assert any("is over before its rows would be chosen" in c.reason for p in plans for c in p.cuts)


@pytest.mark.slow
def test_a_resumed_schedule_is_the_uninterrupted_one() -> None:
    options = {"policy": "always", "method": "uniform", "ratio": 0.5, "rules": [{"steps": "1::3", "ratio": 0.25}, {"phase": "late", "method": "topk"}]}

    def build():
        w = Watched(options)
        w.optimizer = torch.optim.Adam(w.model.parameters(), lr=1e-2)
        return w

    def train(w, count):
        for _ in range(count):
            w.f(torch.randn(32, 20)).square().sum().backward()
            w.step()

    w = build()
    train(w, 4)
    set_phase(w.model, "late")
    train(w, 1)
    saved = copy.deepcopy((w.model.state_dict(), w.optimizer.state_dict(), approx_compile.state_dict(w.f), torch.get_rng_state()))
    train(w, 5)
    assert saved[2]["clocks"] == [{"step": 5, "phase": "late", "parameters": [n for n, _ in w.model.named_parameters()]}]
    for called_before in (False, True):
        torch._dynamo.reset()
        again = build()
        if called_before:
            train(again, 2)
        again.model.load_state_dict(saved[0])
        again.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        approx_compile.load_state_dict(again.f, saved[2])
        torch.set_rng_state(saved[3])
        train(again, 5)
        assert all(torch.equal(a, b) for a, b in zip(w.model.parameters(), again.model.parameters(), strict=True))


def test_wrong_state_changes_nothing() -> None:
    model = mlp(20, 64, 4)
    for state in ({"clocks": []}, {"controls": {}, "clocks": [{"step": 3, "phase": None, "parameters": ["0.weight", "nope"]}]}):
        with pytest.raises(KeyError):
            approx_compile.load_state_dict(model, state)
    assert approx_compile.state_dict(model) == {"controls": {}, "clocks": []}


@pytest.mark.distributed
def test_buckets_of_ddp(one_rank) -> None:
    plans, choices = Plans(), Choices()
    net = Buckets()
    options = {"policy": "always", "method": "exact", "rules": [{"layers": "body.1", "steps": "1::2", "method": "topk", "ratio": 0.25}]}
    model = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1)
    f = torch.compile(model, backend=Backend(options, inner_compile=choices, on_plan=plans))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for i in range(4):
        choices.clear()
        f(torch.randn(64, 512)).sum().backward()
        assert [len(v) for k, v in choices.items() if k.endswith("output.idx")] == ([8] if i % 2 else [])  # groups of 16
        optimizer.step()
    assert len(plans) == 5  # four buckets, one of which knows the rule and has two assignments


@pytest.mark.slow
def test_evaluation_is_one_graph() -> None:
    plans = Plans()
    model = mlp(20, 64, 64, 4)
    f = torch.compile(model, backend=Backend(EVERY_OTHER, inner_compile=run_as_is, on_plan=plans))
    model.eval()
    f(torch.randn(32, 20)).sum().backward()
    assert len(plans) == 1
    model.train()
    f(torch.randn(32, 20)).sum().backward()
    assert len(plans) == 3


def test_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "UNCOUNTED_CALLS", 3)
    w = Watched(EVERY_OTHER)
    w.kept()
    w.kept()
    with pytest.warns(ApproxWarning, match=r"3 training calls of Sequential and no step of a torch.optim optimizer"):
        w.kept()


def test_explain_says_that_settings_change() -> None:
    model, x = mlp(20, 64, 64, 4), torch.randn(32, 20)
    report = approx_compile.explain(model, x, config=EVERY_OTHER)
    assert report.assignments == 2 and "the first of 2 assignments" in str(report)
    assert {s.decision for s in report.sites} == {"exact"}
    later = approx_compile.explain(model, x, config=ApproxConfig(**EVERY_OTHER).at(1))
    assert [s.decision for s in later.sites] == ["exact", "sampled", "exact"] and later.assignments == 1


@pytest.mark.slow
def test_every_combination_that_ever_holds_is_known() -> None:
    rng = random.Random(0)
    for _ in range(200):
        rules = []
        for _ in range(rng.randint(1, 4)):
            start, length, stride = rng.randint(0, 9), rng.choice([None, rng.randint(1, 9)]), rng.randint(1, 4)
            text = f"{start}:{'' if length is None else start + length}:{stride}"
            rules.append({"steps": text, "ratio": rng.choice([0.25, 0.5])} | ({"phase": rng.choice("ab")} if rng.random() < 0.3 else {}))
        config = ApproxConfig(policy="always", rules=rules)
        found = Schedule.of(config)
        for step, phase in itertools.product(range(60), (None, "a", "b")):
            known = phase if phase in found.phases else None
            assert found.assignments[found.at(step, known)] == config.at(step, known)


@pytest.mark.parametrize(
    ("rules", "more", "message"),
    [
        ([{"steps": "now", "method": "exact"}], {}, r"rules\[0\].steps: got 'now'; a slice over optimizer steps is expected"),
        ([{"steps": "::0", "method": "exact"}], {}, "has a stride of 0"),
        ([{"steps": "5:5", "method": "exact"}], {}, "holds no step"),
        ([{"steps": 3, "method": "exact"}], {}, "got 3; a slice over optimizer steps as a string"),
        ([{"steps": "80%:", "method": "exact"}], {}, r"rules\[0\].steps: '80%:' is a share of the run; set total_steps"),
        ([{"steps": "80%:120%", "method": "exact"}], {"total_steps": 9}, "beyond 100%"),
        ([{"method": "exact"}], {}, "required in a rule without steps or phase"),
        ([{"phase": 3, "method": "exact"}], {}, "the name of a phase"),
        ([], {"total_steps": 0}, "total_steps"),
        ([], {"final_exact": 0.1}, "final_exact: a share of the run; set total_steps"),
        ([{"steps": f"{i}:{i + 1}", "ratio": 0.1 + i / 100} for i in range(MAX_ASSIGNMENTS + 1)], {}, f"more than {MAX_ASSIGNMENTS} different assignments"),
        ([{"steps": "::997", "ratio": 0.1}, {"steps": "::991", "ratio": 0.2}], {}, "repeat only after 988027 steps"),
    ],
)
def test_wrong_schedules(rules, more, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Backend({"policy": "always", "rules": rules, **more})


def test_a_switch_costs_little() -> None:
    model = mlp(20, 64, 64, 4)
    found = Schedule.of(ApproxConfig(**EVERY_OTHER))
    parameters = list(model.parameters())
    set_step(model, 1)
    clock = step_counter.step_count_of(parameters)
    assert clock is not None and found.at(clock.step, clock.phase) == 1
    calls = []
    select = dispatch.Dispatch(found, [lambda *a: calls.append(0), lambda *a: calls.append(1)], [0, 1], [0], "it")
    for step in (0, 1, 1, 2):
        set_step(model, step)
        select(parameters[0])
    assert calls == [0, 1, 1, 0]
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="set_step"):
            set_step(model, wrong)
    with pytest.raises(TypeError, match="set_phase: got function"):
        set_phase(lambda: 0, "a")
    with pytest.raises(ValueError, match="set_phase"):
        set_phase(model, "")
