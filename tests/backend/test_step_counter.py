"""What counts as a step of a schedule: the completed steps of the optimizer that owns a graph's parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.compile import Choices
from helpers.models import mlp
from helpers.schedules import EVERY_OTHER, Watched
from torch import nn
from torch._dynamo.utils import counters

import approx_compile
from approx_compile import ApproxWarning, Backend, set_phase, set_step
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime import dispatch
from approx_compile.rows import step_counter

pytestmark = pytest.mark.usefixtures("one_thread")


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
    with pytest.raises(KeyError):
        approx_compile.load_state_dict(model, {"clocks": []})
    assert approx_compile.state_dict(model) == {"controls": {}, "clocks": []}
    with pytest.warns(ApproxWarning, match="the state of 'nope' fits nowhere"):
        approx_compile.load_state_dict(model, {"controls": {}, "clocks": [{"step": 3, "phase": None, "parameters": ["0.weight", "nope"]}]})
    assert approx_compile.state_dict(model) == {"controls": {}, "clocks": [{"step": 3, "phase": None, "parameters": ["0.weight"]}]}


def test_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "UNCOUNTED_CALLS", 3)
    w = Watched(EVERY_OTHER)
    w.kept()
    w.kept()
    with pytest.warns(ApproxWarning, match=r"3 training calls of Sequential and no step of a torch.optim optimizer"):
        w.kept()
