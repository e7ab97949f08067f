"""`tune` ends early by an interrupt, an error or its time budget: it returns what was measured until then, and leaves no trace in the model."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.models import mlp
from helpers.tuning import after, net_and_batch, trained
from rich.console import Console
from rich.progress import Progress

from approx_compile import tune
from approx_compile.tools.model_state import training_state_preserved
from approx_compile.tools.tuning import deadline as deadlines
from approx_compile.tools.tuning import measurements
from approx_compile.tools.tuning.deadline import DeadlineReached, deadline
from approx_compile.tools.tuning.measurements import Measurements
from approx_compile.tools.tuning.trial import StepTimes, Trials

pytestmark = pytest.mark.usefixtures("one_thread")


tune_module = sys.modules[tune.__module__]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, also where the tests were started in the background of a shell, which makes it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.serial
def test_an_interrupt_gives_what_there_is(ctrl_c: None) -> None:
    """After Ctrl-C before anything is timed, the knapsack takes times to be proportional to FLOPs."""
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
    """Trials whose seconds are counted, not spent: a step op by op takes 1 s, a compilation `COMPILING`, a pair of steps 1 s, and there are at most 41 of
    them."""

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
@pytest.mark.sample(3)
@pytest.mark.parametrize(("budget", "rows"), [(2.0, True), (20.0, False), (100.0, True), (100.0, False), (250.0, True), (1e9, True)])
def test_the_time_budget_is_kept(budget: float, rows: bool, monkeypatch: pytest.MonkeyPatch, small_work_counts: None) -> None:
    """The budget is kept to within one trial, by a counted clock, and what was not measured is reported as not measured."""
    monkeypatch.setattr(tune_module, "Trials", Counted)
    monkeypatch.setattr(tune_module, "deadline", lambda seconds: contextlib.nullcontext())  # it goes by the real clock
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
        assert hidden.reason is not None and hidden.reason.startswith("not measured") and "no plan: 1 of 3 layers were not measured" in str(plan)
    if budget == 1e9:
        assert plan.tuned.stopped is None and len(Counted.compiled_for) > 2 and plan.tuned.achieved_speedup == 1.25 and "not measured" not in str(plan)
    if budget <= 20:
        assert not Counted.compiled_for and plan.tuned.achieved_speedup is None and plan.tuned.stopped is not None
    if plan.tuned.achieved_speedup is None and (hidden.ratio < 1 or plan.tuned.rows is not None):
        assert "achieved not measured" in str(plan)


class Endless(Trials):
    """Trials whose compilations take longer than any budget."""

    def compiled(self, options: Any) -> Any:
        time.sleep(60.0)


@pytest.mark.slow
def test_a_compilation_is_interrupted_when_the_time_budget_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "Trials", Endless)
    monkeypatch.setattr(Measurements, "no_time_for", lambda *a: False)  # every estimate is too short
    model, x = mlp(32, 64, 10), torch.randn(32, 32)
    begin, timers = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)[0]
    plan = tune(model, x, loss=torch.sum, max_error=5.0, time_budget_s=2.0, config={"group": 1, "policy": "always"}, ladder=[0.5], rows=False, progress=False)
    assert time.monotonic() - begin < 60.0  # which a single compilation would take
    assert plan.tuned is not None and plan.tuned.stopped == "the time budget of 2 s" and plan.tuned.achieved_speedup is None
    assert "stopped early" in str(plan) and "of 2 layers were not measured" in str(plan)
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timers > 0)


def test_a_deadline_interrupts_and_leaves_other_timers() -> None:
    timers = signal.getitimer(signal.ITIMER_REAL)[0]
    with pytest.raises(DeadlineReached), deadline(0.05):
        time.sleep(5.0)
    with deadline(5.0):
        pass
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timers > 0)
    with contextlib.ExitStack() as outer:  # a timer of the user's own that rings earlier is left alone
        rang: list[int] = []
        handler = signal.signal(signal.SIGALRM, lambda *a: rang.append(1))
        outer.callback(signal.signal, signal.SIGALRM, handler)
        own = signal.setitimer(signal.ITIMER_REAL, 0.05)
        outer.callback(signal.setitimer, signal.ITIMER_REAL, *own)
        with deadline(60.0):
            time.sleep(0.2)
        assert rang == [1]


def test_a_deadline_that_python_drops_rings_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "AGAIN_S", 0.1)
    dropped: list[int] = []

    class Finalized:
        def __del__(self) -> None:
            dropped.append(1)
            time.sleep(0.3)  # the first ring falls into it, and Python only reports the exception

    monkeypatch.setattr(sys, "unraisablehook", lambda given: dropped.append(2))
    begin = time.monotonic()
    with pytest.raises(DeadlineReached), deadline(0.1):
        thing = Finalized()
        del thing
        time.sleep(5.0)
    assert dropped == [1, 2] and time.monotonic() - begin < 2
    assert signal.getitimer(signal.ITIMER_REAL)[1] != 0.1


@pytest.mark.slow
def test_how_long_it_would_take_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "Trials", Counted)
    monkeypatch.setattr(tune_module, "deadline", lambda seconds: contextlib.nullcontext())
    monkeypatch.setattr(measurements, "now", lambda: Counted.clock)
    console = Console(file=io.StringIO(), width=400)
    with Progress(console=console) as shown:
        tune(mlp(32, 64, 64, 10), torch.randn(32, 32), loss=torch.sum, time_budget_s=5.0, config={"group": 1}, ladder=[0.5], rows=False, progress=shown)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tune: up to 13 gradients and 4 compilations, at most about" in text and "the time budget is 5 s; what does not fit" in text
