"""Settings that change over a run: which assignment runs at a step or in a phase, and that nothing is recompiled."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from helpers.compile import Choices, Plans
from helpers.models import Buckets, mlp
from helpers.oracles import grads
from helpers.schedules import EVERY_OTHER, Watched
from torch import nn
from torch._dynamo.utils import counters

import approx_compile
from approx_compile import ApproxConfig, ApproxWarning, Backend, ConfigError, set_phase, set_step
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime import dispatch
from approx_compile.backend.runtime.schedule import MAX_ASSIGNMENTS, Schedule
from approx_compile.rows import step_counter

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.slow
def test_inductor_runs_the_same_assignments() -> None:
    model, x = mlp(20, 64, 4), torch.randn(32, 20)
    rules = [{"layers": "linear[1]", "steps": "1::2", "grad_weight": {"method": "topk", "ratio": 0.25}}]  # a gradient alone, for which few kernels are compiled
    options = {"policy": "always", "method": "exact", "rules": rules}
    f = torch.compile(model, backend="approx", options=options)
    weights = []
    for step in (0, 1, 2):
        set_step(model, step)
        f(x).square().sum().backward()
        got = grads(model)
        torch.compile(model, backend=Backend(ApproxConfig(**options).at(step), inner_compile=run_as_is))(x).square().sum().backward()
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, grads(model), strict=True))
        weights.append(got[2])
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1], rtol=0.1)


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
