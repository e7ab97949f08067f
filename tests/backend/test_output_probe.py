"""Sampled outputs under the policy "adaptive": their ratio follows the gradient's error, and measuring it disturbs nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.compile import Choices, Plans
from helpers.models import mlp
from helpers.oracles import grads, relative
from helpers.sampling import all_but
from torch import nn

import approx_compile
from approx_compile import ApproxConfig, Backend, controls
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime.output_probe import AdaptiveOutputs, OutputControl
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.config.words import OUTPUT_LADDER
from approx_compile.rows.ownership import GraphName

pytestmark = pytest.mark.usefixtures("one_thread")


def options(**adaptive):
    rules = [{"layers": "2", "output": {"method": "topk", "min_k": 1, "group": 1}}]
    return {"policy": "adaptive", "adaptive": {"every": 4, "outputs": [0.25, 0.5], **adaptive}, "rules": rules}


def ratios_of_steps(control: OutputControl, errors: dict[float, float], steps: int) -> list[float]:
    """Return the ratios of some steps in which the candidate ratios cause these errors."""
    found = []
    for _ in range(steps):
        found.append(control.start_step())
        if control.should_observe and (candidates := control.candidates()):
            control.observe(candidates, torch.tensor([*(errors[r] for r in candidates), 1.0]))
    return found


def test_a_control_goes_rung_by_rung() -> None:
    control = OutputControl(AdaptiveTable(every=5), "outputs")
    small = dict.fromkeys(OUTPUT_LADDER, 0.001)
    assert ratios_of_steps(control, small, 21) == [1.0] * 1 + [0.7] * 5 + [0.5] * 5 + [0.35] * 5 + [0.25] * 5
    assert ratios_of_steps(control, small | {0.25: 0.5}, 6)[-1] == 0.35
    assert ratios_of_steps(control, dict.fromkeys(OUTPUT_LADDER, float("inf")), 30)[-1] == 1.0
    assert control.candidates() == [0.7]


@pytest.mark.slow
def test_the_error_is_that_of_the_gradient() -> None:
    model, x = mlp(20, 64, 64, 4), torch.randn(32, 20)
    f = torch.compile(model, backend=Backend(options(error=1e-9), inner_compile=run_as_is))
    f(x).square().sum().backward()  # the first step looks: the next rung down from 1 is 0.5
    grads(model)
    out = f(x)
    (control,) = controls(model).values()
    assert control.changes[-1][1] == 1.0 and control.candidates() == [0.5]
    sampled = ApproxConfig(policy="always", method="exact", rules=[{"layers": "2", "method": "topk", "ratio": 0.5, "min_k": 1, "group": 1}])
    g = torch.compile(model, backend=Backend(sampled, inner_compile=run_as_is))
    tangent = 2 * out.detach()
    g(x).backward(tangent)
    want = torch.cat([v.flatten() for v in grads(model)])
    model(x).backward(tangent)
    exact = torch.cat([v.flatten() for v in grads(model)])
    low, high = 0.9 * relative(want, exact) ** 2, 1.1 * relative(want, exact) ** 2
    for error, ratio in ((low, 1.0), (high, 0.5)):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        h = torch.compile(twin, backend=Backend(options(error=error), inner_compile=run_as_is))
        h(x).square().sum().backward()
        h(x)
        assert [c.ratio for c in controls(twin).values()] == [ratio]


@pytest.mark.slow
def test_outputs_follow_what_the_gradient_allows() -> None:
    model = mlp(20, 64, 64, 4)
    choices = Choices()
    f = torch.compile(model, backend=Backend(options(error=1e9, every=2), inner_compile=choices))
    kept = []
    for _ in range(7):
        choices.clear()
        f(torch.randn(32, 20)).square().sum().backward()
        out = choices.copy()  # of this step, and of the candidates measured in it
        kept.append(len(out["2.output.idx"]) if "2.output.idx" in out else 64)
    (control,) = controls(model).values()
    assert [r for _, r in control.changes] == [1.0, 0.5, 0.25]
    assert kept[-1] == 16
    assert "outputs of the forward pass" in str(approx_compile.decisions(model))


@pytest.mark.slow
@pytest.mark.parametrize("lowering", all_but(["op by op"], ["op by op", "inductor"]))
def test_measuring_disturbs_nothing(lowering: str) -> None:
    """Of two runs one never measures. Parameters, BatchNorm's statistics, gradients and random numbers of both stay equal bit for bit."""

    def train(every: int) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        asked = options(error=1e-9, every=every, outputs=[0.5])
        asked["rules"][0]["layers"] = "4"
        f = torch.compile(model, backend=Backend(asked, inner_compile=run_as_is if lowering == "op by op" else None))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(5 if lowering == "op by op" else 3):
            x = torch.randn(32, 20)
            loss = f(x).square().sum()
            loss.backward()
            optimizer.step()
            if i % 2:
                optimizer.zero_grad()
        (control,) = controls(model).values()
        assert isinstance(control, OutputControl) and (control.measured, control.ratio) == (0.0, 1.0)
        grown = [p.grad if p.grad is not None else torch.zeros(()) for p in model.parameters()]
        return [t.clone() for t in (*model.parameters(), *model.buffers(), *grown, torch.rand(3))]

    rarely, often = train(1000), train(1)
    assert all(torch.equal(a, b) for a, b in zip(rarely[:8], often[:8], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(rarely, often, strict=True))


@pytest.mark.slow
def test_state_is_part_of_a_checkpoint() -> None:
    model = mlp(20, 64, 64, 4)
    f = torch.compile(model, backend=Backend(options(error=1e9, every=2), inner_compile=run_as_is))
    for _ in range(4):
        f(torch.randn(32, 20)).square().sum().backward()
    saved = approx_compile.state_dict(f)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    g = torch.compile(twin, backend=Backend(options(error=1e9, every=2), inner_compile=run_as_is))
    approx_compile.load_state_dict(g, saved)
    g(torch.randn(32, 20)).square().sum().backward()
    assert [c.step for c in controls(twin).values()] == [5] and [c.ratio for c in controls(twin).values()] == [0.25]


def test_no_gradient_no_measurement() -> None:
    seen = []
    outputs = AdaptiveOutputs(
        AdaptiveTable(every=1, outputs=(0.5, 1.0)), {1.0: lambda *a: seen.append(1.0) or a[0] * 2, 0.5: lambda *a: a[0] * 3}, [], GraphName("key")
    )
    with torch.no_grad():
        assert torch.equal(outputs(torch.ones(2)), torch.full((2,), 2.0))
    x = torch.ones(2, requires_grad=True)
    outputs(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0)) and seen == [1.0, 1.0, 1.0]
    assert outputs._unowned_control.start_step() == 1.0  # a candidate that is half as large again: |0.5|^2


def test_explain_shows_the_smallest_ratio() -> None:
    report = approx_compile.explain(mlp(20, 64, 64, 4), torch.randn(32, 20), config=options())
    assert [(s.name, s.k, s.size) for s in report.sites if s.decision == "sampled"] == [("2", 16, 64)]


def test_with_a_schedule() -> None:
    model = mlp(20, 64, 64, 4)
    asked = options(error=1e9, every=1) | {"total_steps": 10}
    f = torch.compile(model, backend=Backend(asked, inner_compile=run_as_is))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(10):
        f(torch.randn(32, 20)).square().sum().backward()
        optimizer.step()
    (control,) = controls(model).values()
    assert control.step == 8 and control.ratio == 0.25  # the last fifth is exact, with nothing to choose


@pytest.mark.slow
def test_rows_and_outputs_together(small_work_counts) -> None:
    model, x = mlp(20, 64, 64, 4), torch.randn(32, 20)
    plans = Plans()
    asked = options(error=1e9, every=1, outputs=[0.5], tau=10.0, ladder=[0.25])
    f = torch.compile(model, backend=Backend(asked, inner_compile=run_as_is, on_plan=plans))
    (f(x) * torch.linspace(1, 50, 32)[:, None]).sum().backward()
    first = grads(model)
    (model(x) * torch.linspace(1, 50, 32)[:, None]).sum().backward()
    assert max(relative(a, b) for a, b in zip(first, grads(model), strict=True)) < 1e-5  # all rows, exact outputs
    assert [[c.decision for c in p.cuts] for p in plans] == [["rows"], ["rows"]]
    for _ in range(80):
        (f(x) * torch.linspace(1, 50, 32)[:, None]).sum().backward()
        got = grads(model)
    kinds = {type(c).__name__: c.ratio for c in controls(model).values()}
    assert kinds == {"OutputControl": 0.5, "RowControl": 0.25}
    assert all(bool(g.isfinite().all()) for g in got) and relative(got[0], first[0]) > 1e-3


@pytest.mark.slow
def test_a_checkpointed_block_runs_again_as_it_ran() -> None:
    model = mlp(20, 64, 64, 4)
    f = torch.compile(model, backend=Backend(options(error=1e9, every=1), inner_compile=run_as_is))
    for _ in range(4):
        torch.utils.checkpoint.checkpoint(f, torch.randn(32, 20), use_reentrant=False).sum().backward()
    (control,) = controls(model).values()
    assert control.step == 4 and control.ratio == 0.25


class Strided(Choices):
    """An `inner_compile` whose code compares the strides of its inputs with those that the graph was compiled for."""

    def __call__(self, gm, example_inputs, **kwargs):
        call = super().__call__(gm, example_inputs, **kwargs)
        want = [tuple(v.stride()) if isinstance(v, torch.Tensor) else None for v in example_inputs]

        def checked(args):
            assert [tuple(v.stride()) if isinstance(v, torch.Tensor) else None for v in args] == want
            return call(args)

        checked._boxed_call = True
        return checked


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["op by op", "inductor"])
def test_inputs_keep_their_strides_and_may_be_written_to(lowering: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(20, 64), nn.Linear(64, 64)

        def forward(self, x, scale):
            x = torch.relu_(x)
            return self.second(torch.relu(self.first(x))) * scale

    model, before = Net(), nn.Linear(24, 24)
    asked = options(error=1e9, every=1, outputs=[0.5])
    asked["rules"][0]["layers"] = "second"
    f = torch.compile(model, backend=Backend(asked, inner_compile=Strided() if lowering == "op by op" else None))
    for _ in range(3):
        f(before(torch.randn(32, 24))[:, :20], torch.ones(1, 64).expand(32, 64)).sum().backward()
    (control,) = controls(model).values()
    assert control.ratio == 0.5


def test_an_exact_phase_leaves_the_ratio_alone() -> None:
    model = mlp(20, 64, 64, 4)
    asked = options(error=1e-9, every=1)
    asked["rules"].append({"layers": "2", "phase": "exact", "method": "exact"})
    f = torch.compile(model, backend=Backend(asked, inner_compile=run_as_is))
    for phase in (None, "exact", None):
        approx_compile.set_phase(model, phase)
        for _ in range(4):
            f(torch.randn(32, 20)).square().sum().backward()
        assert [c.ratio for c in controls(model).values()] == [1.0]


def test_state_of_another_ladder() -> None:
    control = OutputControl(AdaptiveTable(outputs=(0.3, 0.7)), "outputs")
    control.load_state_dict({"step": 7, "measured": 0.0, "changes": [[0, 1.0], [3, 0.25]]})
    assert control.ratio == 0.3 and control.start_step() == 0.3
