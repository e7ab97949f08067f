"""Where nothing is approximated the backend equals Inductor bit for bit and compiles as often."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.compile import HALF, Plans, compiled, plans_of
from helpers.models import mlp
from torch import Tensor, nn

from approx_compile import ApproxWarning, Backend, controls, load_state_dict, state_dict
from approx_compile.backend import run_as_is

ALWAYS = {"policy": "always", "ratio": 0.5}


class ModeDependent(nn.Module):
    """Linear, convolution, BatchNorm and dropout: every layer that a mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn(self.conv1(x)))
        return self.fc(self.drop(self.conv2(h).mean((2, 3))))


def step(f: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the parameter gradients, where there are any, of one call."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    y = f(x)
    if y.requires_grad:
        y.square().sum().backward()
    return [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Any, Any]:
    model = ModeDependent()
    return model, torch.compile(model, backend="inductor"), torch.compile(model, backend="approx", options=ALWAYS)


@pytest.mark.slow
def test_eval_with_grad_is_inductors(pair: Any) -> None:
    model, exact, approx = pair
    x = torch.randn(8, 3, 8, 8)
    model.eval()
    want, got = step(exact, model, x), step(approx, model, x)
    assert len(want) > 1 and same(want, got)
    model.train()
    assert any(s.decision == "sampled" for s in plans_of(model, ALWAYS, x))  # training is not exact


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_grad_is_inductors(pair: Any, mode: Any, training: bool) -> None:
    model, exact, approx = pair
    x = torch.randn(8, 3, 8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train(training)
    with mode():
        want = step(exact, model, x)
        model.load_state_dict(state)
        got = step(approx, model, x)
    assert same(want, got)


def test_ratio_one_is_inductors() -> None:
    model = ModeDependent()
    x = torch.randn(8, 3, 8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = step(torch.compile(model, backend="inductor"), model, x)
    model.load_state_dict(state)
    got = step(torch.compile(model, backend="approx", options={"policy": "always", "ratio": 1.0}), model, x)
    assert same(want, got)


def test_ratio_one_leaves_the_graph_alone() -> None:
    seen: list[tuple[str, str]] = []

    def listen(plan: Any, before: Any, after: Any) -> None:
        seen.append((str(before), str(after)))

    f = torch.compile(ModeDependent(), backend=Backend({"policy": "always", "ratio": 1}, inner_compile=run_as_is, on_plan=listen, keep_graphs=True))
    f(torch.randn(8, 3, 8, 8))
    assert len(seen) == 1 and seen[0][0] == seen[0][1] and "convolution_backward" in seen[0][0]


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPROX_COMPILE_DISABLE", "1")
    f, choices, plans = compiled(mlp(64, 64, 64), ALWAYS)
    f(torch.randn(8, 64)).sum().backward()
    assert not plans and not choices
    assert os.environ["APPROX_COMPILE_DISABLE"] == "1"


def test_short_axes_are_exact() -> None:
    sites = plans_of(ModeDependent(), ALWAYS, torch.randn(8, 3, 8, 8))
    stem = sites[0]
    assert stem.products[0].decision == "exact" and stem.products[0].reason == "axis of 3, min_k is 16"
    assert sites[1].decision == "sampled"


@pytest.mark.slow
def test_each_mode_compiles_once_and_a_partial_batch_once_more() -> None:
    f, _, plans = compiled(mlp(64, 64, 64), ALWAYS)
    model = f._orig_mod
    x, last = torch.randn(32, 64), torch.randn(20, 64)
    counter = torch._dynamo.testing.CompileCounter()
    counter.frame_count = 0

    def epoch() -> None:
        model.train()
        for batch in (x, x, last):
            f(batch).sum().backward()
        model.eval()
        f(x).sum().backward()
        with torch.no_grad():
            f(x)

    epoch()
    torch._dynamo.utils.counters.clear()
    compiles = len(plans)
    epoch()
    epoch()
    assert len(plans) == compiles
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
    # train static, train with a symbol for the batch, eval with grad (no_grad does not reach the pass)
    assert compiles == 3


def test_partly_eval_models_are_exact_where_eval() -> None:
    model = mlp(64, 64, 64, 64)
    model[2].eval()
    sites = plans_of(model, ALWAYS, torch.randn(32, 64))
    assert [(s.name, s.decision) for s in sites] == [("0", "sampled"), ("2", "exact"), ("4", "sampled")]
    assert sites[1].reason.startswith("the module is in eval mode")


def test_two_models_of_one_class_with_different_options() -> None:
    a, b = mlp(64, 64, 64), mlp(64, 64, 64)
    fa, _, pa = compiled(a, {"policy": "always", "ratio": 0.5, "group": 1})
    fb, _, pb = compiled(b, {"policy": "always", "ratio": 0.25, "group": 1})
    x = torch.randn(32, 64)
    for _ in range(3):
        fa(x).sum().backward()
        fb(x).sum().backward()
    assert [s.products[0].k for s in pa.sites] == [32, 32]
    assert [s.products[0].k for s in pb.sites] == [16, 16]


@pytest.mark.slow
def test_policy_cost_is_modest() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.narrow, self.head = nn.Linear(64, 1024), nn.Linear(1024, 256), nn.Linear(256, 1024), nn.Linear(1024, 10)
            self.norm, self.after = nn.BatchNorm1d(1024), nn.Linear(1024, 1024)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.wide(torch.relu(self.stem(x))))
            return self.head(torch.relu(self.after(self.norm(self.narrow(h)))))

    sites = {s.name: s for s in plans_of(Model(), {"policy": "cost"}, torch.randn(4096, 64))}
    assert {n for n, s in sites.items() if s.decision == "sampled"} == {"wide"}
    assert sites["stem"].reason.startswith("fed with raw data")
    assert sites["head"].reason.startswith("the last layer")
    assert "256 contraction channels" in sites["narrow"].reason
    assert "BatchNorm" in sites["after"].reason
    assert [p.method for p in sites["wide"].products] == ["topk"] * 3
    named = {s.name: s for s in plans_of(Model(), {"rules": [{"layers": ["after", "stem", "head"], "ratio": 0.25}]}, torch.randn(4096, 64))}
    assert named["after"].decision == "sampled" and named["stem"].decision == "exact" and named["head"].decision == "exact"


@pytest.mark.slow
def test_notices_come_once() -> None:
    with pytest.warns(ApproxWarning, match="nothing was approximated in Sequential: .*is over before its rows would be chosen"):
        torch.compile(mlp(8, 8, 8), backend=Backend({}, inner_compile=run_as_is))(torch.randn(4, 8))
    torch._dynamo.reset()
    with pytest.warns(ApproxWarning, match="nothing was approximated in Sequential: .*last layer"):
        torch.compile(mlp(8, 8, 8), backend=Backend({"policy": "cost"}, inner_compile=run_as_is))(torch.randn(4, 8))
    with pytest.warns(ApproxWarning, match=r"'nowhere\.\*' matches no site"):
        options = ALWAYS | {"rules": [{"layers": "nowhere.*", "ratio": 0.3}]}
        torch.compile(mlp(64, 64, 64), backend=Backend(options, inner_compile=run_as_is))(torch.randn(32, 64))


@pytest.mark.slow
def test_one_notice_says_how_many(capfd: pytest.CaptureFixture[str]) -> None:
    f = torch.compile(mlp(64, 64, 64), backend=Backend(ALWAYS, inner_compile=run_as_is))
    f(torch.randn(32, 64))
    f(torch.randn(16, 64))
    text = capfd.readouterr().err
    assert text.count("Sequential: FORWARD PASS SAMPLED in 2 of 2 layers (topk, keeps 50 %), because the options include 'ratio'") == 1
    assert "APPROX_COMPILE_DISABLE=1" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"sampling": "backward", "grad_input": "exact", "grad_weight": {"method": "bernoulli", "ratio": 0.25}},
            "Sequential: forward exact. Gradients sampled in 2 of 2 layers (bernoulli, keeps 25 %). See approx_compile.explain",
        ),
        (
            {"rules": [{"layers": "0", "ratio": 0.25}, {"layers": "1", "method": "crs"}]},
            "Sequential: FORWARD PASS SAMPLED in 2 of 2 layers (crs, topk, keeps 25 % to 50 %), because the options include 'rules'. This can cost accuracy.",
        ),
        ({}, "(topk, keeps 50 %), because the options include 'policy'. This can cost accuracy."),
        (
            {"method": "exact", "rules": [{"layers": "1", "output": {"method": "uniform", "ratio": 0.75}}]},
            "FORWARD PASS SAMPLED in 1 of 2 layers (uniform, keeps 75 %), because the options include 'rules'",
        ),
        (HALF, "Sequential: forward exact. Backward on 50 % of the samples (2 of 2 layers). See approx_compile.explain"),
        ({"policy": "adaptive", "output": "topk", "grad": "exact"}, "forward starts exact; LATER FORWARD PASSES MAY BE SAMPLED in 2 of 2 layers (topk)"),
        ({"output": "exact", "grad_input": "exact", "grad_weight": "zero"}, "Sequential: forward exact. Gradients replaced in 2 of 2 layers. See"),
    ],
)
def test_the_notice_says_how(options: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torch.compile(model, backend=Backend({"policy": "always"} | options, inner_compile=run_as_is))(torch.randn(32, 64))
    assert words in capfd.readouterr().err


def test_the_default_notice_comes_once_for_each_model(small_work_counts: None, capfd: pytest.CaptureFixture[str]) -> None:
    says = (
        "approx: Sequential: forward exact. Backward starts on the whole batch and may use fewer samples later (2 of 2 layers). "
        "See approx_compile.decisions(model). Compare accuracy: APPROX_COMPILE_DISABLE=1."
    )
    for i, width in enumerate((64, 32), 1):
        f = torch.compile(mlp(width, 64, 64), backend=Backend(None, inner_compile=run_as_is))
        for batch in (32, 16):
            f(torch.randn(batch, width))
        assert capfd.readouterr().err.count(says) == 1, i


def test_the_notice_says_where_a_loaded_state_goes_on(small_work_counts: None, capfd: pytest.CaptureFixture[str]) -> None:
    model, x = mlp(64, 64, 64), torch.randn(32, 64)
    compiled = torch.compile(model, backend=Backend(None, inner_compile=run_as_is))
    compiled(x).square().mean().backward()
    (control,) = controls(model).values()
    control.state_dict()  # takes up what the step measured
    control.changes.append((1, 0.18))
    state = state_dict(compiled)
    torch._dynamo.reset()
    again = torch.compile(mlp(64, 64, 64), backend=Backend(None, inner_compile=run_as_is))
    load_state_dict(again, state)
    again(x)
    assert "Backward goes on with the 18 % found before and may use fewer samples later (2 of 2 layers)" in capfd.readouterr().err


def test_warnings_point_at_the_users_line() -> None:
    with pytest.warns(ApproxWarning, match="nothing was approximated") as found:
        torch.compile(mlp(8, 8, 8), backend=Backend({}, inner_compile=run_as_is))(torch.randn(4, 8))
    assert [w.filename for w in found if issubclass(w.category, ApproxWarning)] == [__file__]


def test_user_passes_run_first() -> None:
    ran: list[str] = []

    class Mine(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            ran.append("mine")

        def uuid(self) -> str:
            return "mine"

    plans = Plans()
    with torch._inductor.config.patch(joint_custom_pre_pass=Mine()):
        f = torch.compile(mlp(64, 64, 64), backend=Backend(ALWAYS, inner_compile=run_as_is, on_plan=plans))
        f(torch.randn(32, 64))
    assert ran == ["mine"] and plans[0].sampled == 2


def test_inductors_options_and_modes_are_passed_on() -> None:
    from approx_compile.backend import inductor_patches
    from approx_compile.config import ApproxConfig

    own = ApproxConfig(inductor={"mode": "max-autotune-no-cudagraphs", "shape-padding": False})
    assert inductor_patches(own, None) == torch._inductor.list_mode_options("max-autotune-no-cudagraphs") | {"shape_padding": False}
    assert inductor_patches(ApproxConfig(), "reduce-overhead") == {"triton.cudagraphs": True}
    f = torch.compile(mlp(64, 64, 64), backend=Backend(ALWAYS, inner_compile=run_as_is), mode="max-autotune-no-cudagraphs")
    assert f(torch.randn(32, 64)).shape == (32, 64)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_logs_and_trace(tmp_path: Any) -> None:
    code = """
import torch
from approx_compile import Backend
from approx_compile.backend import run_as_is
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
torch.compile(model, backend=Backend({"policy": "always"}, inner_compile=run_as_is))(torch.randn(32, 64))
"""
    env = os.environ | {"TORCH_LOGS": "+approx_compile", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0: sampled (addmm 32x64x64 output: topk)" in done.stderr
    assert "2.grad_weight: coupled, 32 of 64 (through the entries the output kept)" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    assert '"approx_compile_plan"' in trace.read_text()


class Flat(nn.Module):
    """Products written in the forward of the compiled module, which no module stack names."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.broken = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.randn(64, 64) / 8), broken

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.w1)
        if self.broken:
            torch._dynamo.graph_break()
        return torch.nn.functional.linear(h, self.w2)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("trains_first", [False, True])
def test_the_compiled_modules_own_products_follow_its_mode(broken: bool, trains_first: bool) -> None:
    model, x = Flat(broken), torch.randn(32, 64, requires_grad=True)
    f, _, plans = compiled(model, ALWAYS)
    if trains_first:
        f(x)
        assert [s.decision for s in plans.sites] == ["sampled", "sampled"]
    model.eval()
    torch.testing.assert_close(f(x), model(x))
    assert {s.decision for s in plans.sites[-2:]} == {"exact"}
    model.train()
    compiles = len(plans)
    sampled = f(x)
    assert not torch.allclose(sampled, model(x))
    assert len(plans) == compiles + (0 if trains_first else compiles)


def test_a_root_of_its_own_is_in_the_cache_key() -> None:
    from approx_compile.config import ApproxConfig
    from approx_compile.passes.joint_graph_pass import cache_key
    from approx_compile.passes.sites.site import Context, Module

    keys = {cache_key(ApproxConfig(), Context(root=Module("", reason)), ("",)) for reason in (None, "the module is in eval mode")}
    assert len(keys) == 2


def test_the_rest_of_forward_without_its_module_is_exact() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            h = torch.relu(x @ w)
            torch._dynamo.graph_break()
            return h @ w

    f, _, plans = compiled(Broken(), ALWAYS)
    f(torch.randn(32, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True))
    assert [s.decision for s in plans.sites] == ["sampled", "exact"]
    assert "could not be traced back" in plans.sites[1].reason


@pytest.mark.slow
def test_statistics_collected_anew_are_those_of_the_exact_network() -> None:
    """`torch.optim.swa_utils.update_bn` runs the model in training mode without gradients. The compiled model must run exactly there."""
    model = ModeDependent()
    f, choices, _ = compiled(model, ALWAYS)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    f(batches[0]).sum().backward()
    assert choices
    choices.clear()
    plain = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, f)
    torch.optim.swa_utils.update_bn(batches, plain)
    assert not choices and model.training
    assert torch.allclose(model.bn.running_mean, plain.bn.running_mean, atol=1e-6) and torch.allclose(model.bn.running_var, plain.bn.running_var, atol=1e-6)
