"""A state is named as the bare model names its parts, so it fits whatever wraps the model, and whatever sizes and precision the graphs were made for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.models import mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import approx_compile
from approx_compile import ApproxWarning, Backend, controls, decisions, load_state_dict, set_phase, set_step, state_dict
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime import metrics
from approx_compile.rows.bare_names import fitted_names, named_owners, relative_names

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


def backend() -> Backend:
    return Backend(None, inner_compile=run_as_is)


class Tagger(nn.Module):
    """An encoder over sequences of any length, with a head for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.mix(self.embed(x))).mean(1))


def train(model: Any, lengths: list[int] | None = None, batch: int = 16, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for length in lengths or [5] * steps:
        model(torch.randint(0, 50, (batch, length))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class LightningModule(nn.Module):
    """Stands for Lightning's class, which is found by its name. The real one is tested in tests/integrations."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


WRAPS: dict[str, Any] = {
    "compiled": lambda m: torch.compile(m, backend=backend()),
    "in place": lambda m: m.compile(backend=backend()) or m,
    "compiled inside": lambda m: LightningModule(torch.compile(m, backend=backend())),
    "compiled outside": lambda m: torch.compile(LightningModule(m), backend=backend()),
    "DDP of compiled": lambda m: DDP(torch.compile(m, backend=backend())),
    "compiled DDP": lambda m: torch.compile(DDP(m), backend=backend()),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", WRAPS)
@torch._dynamo.config.patch(optimize_ddp=False)
def test_a_state_goes_from_any_form_to_any_other(how: str, one_rank: None) -> None:
    bare = Tagger()
    wrapped = WRAPS[how](bare)
    train(wrapped)
    saved = state_dict(wrapped)
    assert state_dict(bare) == saved and len(decisions(wrapped).cuts) == 2  # tokens of the two layers
    ((owner, by_key),) = saved["controls"].items()
    assert owner == "embed.weight" and sum({"step", "passes", "measured", "changes"} <= s.keys() for s in by_key.values()) == 2
    assert saved["clocks"] == [{"step": 3, "phase": None, "parameters": [n for n, _ in bare.named_parameters()]}]
    torch._dynamo.reset()
    twin = Tagger()
    plain = torch.compile(twin, backend=backend())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApproxWarning)
        load_state_dict(plain, saved)
        assert state_dict(twin) == saved
        train(plain, steps=1)
    assert [c.step for c in controls(twin).values()] == [4, 4]
    back = WRAPS[how](Tagger())
    load_state_dict(back, state_dict(plain))
    assert state_dict(back) == state_dict(plain)


def test_lengths_batches_and_precisions_share_one_control() -> None:
    model = Tagger()
    f = torch.compile(model, backend=backend())
    train(f, [5, 7, 9, 11])
    train(f, [5], batch=8)
    with torch.autocast("cpu", torch.bfloat16):
        train(f, [6])
    assert [name.rpartition(":")[2] for name in controls(model)] == ["head", "mix"]
    assert [c.passes for c in controls(model).values()] == [6, 6]


def test_two_graphs_of_a_step_have_controls_of_their_own() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(20, 64, 64), mlp(64, 64, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            torch._dynamo.graph_break()
            return self.b(h)

    model = Broken()
    f = torch.compile(model, backend=backend())
    for _ in range(2):
        f(torch.randn(32, 20)).square().mean().backward()
    assert all(c.passes <= 2 for c in controls(model).values()) and len(state_dict(model)["controls"]) == 2


def test_a_state_of_an_earlier_version_is_taken_up() -> None:
    """It is named by a parameter that the backward pass saved, and by the modules of all calls; it counted passes as steps."""
    model = mlp(20, 64, 2)
    old = {"step": 40, "measured": 0.5, "changes": [[0, 1.0], [30, 0.5]]}
    f = torch.compile(model, backend=backend())
    f(torch.randn(32, 20)).square().mean().backward()
    (control,) = controls(model).values()
    state = {"controls": {"2.weight": {control.former_name: old}}, "clocks": []}
    load_state_dict(f, state)
    assert (control.step, control.passes, control.ratio) == (40, 40, 0.5)
    torch._dynamo.reset()
    twin = mlp(20, 64, 2)
    load_state_dict(twin, {"controls": {f"module.{n}": s for n, s in state["controls"].items()}, "clocks": []})
    torch.compile(twin, backend=backend())(torch.randn(32, 20)).square().mean().backward()
    assert [(c.passes, c.ratio) for c in controls(twin).values()] == [(41, 0.5)]


def test_what_fits_nowhere_is_named() -> None:
    state = {"controls": {"other.layer": {"cut": {"step": 1, "measured": 1.0, "changes": [[0, 1.0]]}}}, "clocks": []}
    with pytest.warns(ApproxWarning, match=r"the state of 'other\.layer' fits nowhere in Linear, which has 'weight', 'bias'"):
        load_state_dict(nn.Linear(2, 2), state)


def test_steps_are_optimizer_steps() -> None:
    model = mlp(20, 64, 2)
    f = torch.compile(model, backend=backend())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for i in range(12):
        f(torch.randn(32, 20)).square().mean().backward()
        if i % 4 == 3:
            optimizer.step()
    (control,) = controls(model).values()
    assert (control.passes, control.step) == (12, 3)
    assert all(step <= 3 for step, _ in control.changes)


@pytest.mark.parametrize("function", [state_dict, decisions, lambda m: load_state_dict(m, {}), lambda m: set_step(m, 1), lambda m: set_phase(m, "x")])
def test_what_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"got function; the model \(a torch.nn.Module, compiled or not\) is expected"):
        function(lambda x: x)


def test_names() -> None:
    inner = mlp(4, 4)
    assert [n for n, _ in named_owners(torch.compile(LightningModule(inner)))] == ["", "", "0", "0.weight", "0.bias", "loss"] or dict(
        named_owners(LightningModule(inner))
    )["0.weight"] is inner[0].weight
    assert relative_names(["a.b.0", "a.b.1", "a.b"]) == ["0", "1", ""]
    assert relative_names(["a.b"]) == relative_names([""]) == [""] and relative_names([]) == []
    assert fitted_names(["m.a", "m.b"], {"a", "b"}) == {"m.a": "a", "m.b": "b"}
    assert fitted_names(["a", "b", "z"], {"x.a", "x.b"}) == {"a": "x.a", "b": "x.b"}
    assert approx_compile.controls(nn.Linear(2, 2)) == {}


def test_metrics_and_tensorboard() -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

    model = mlp(20, 64, 2)
    nothing = approx_compile.metrics(model)
    assert set(nothing) == set(metrics.NAMES) and nothing["approx/kept"] == nothing["approx/speedup"] == 1 and nothing["approx/flops_saved"] == 0
    f = torch.compile(model, backend=backend())
    f(torch.randn(32, 20)).square().mean().backward()
    (control,) = controls(model).values()
    control.load_state_dict({"step": 10, "measured": 0.4, "changes": [[0, 1.0], [5, 0.5]]})
    values = approx_compile.metrics(f)
    assert (values["approx/step"], values["approx/kept"]) == (10, 0.5)
    assert (values["approx/kept_mean"], values["approx/needed"]) == (pytest.approx(control.kept), pytest.approx(0.4))
    forward = 2 * 32 * (20 * 64 + 64 * 2)  # all of the backward pass runs on rows: both weights' gradients, and the gradient between the layers
    backward = forward + 2 * 32 * 64 * 2
    assert values["approx/flops_saved"] == pytest.approx(backward * (1 - control.kept) / (forward + backward))
    assert values["approx/speedup"] == pytest.approx(1 / (1 - values["approx/flops_saved"]))
    writer = Writer()
    decisions(f).to_tensorboard(writer)
    assert writer.scalars == [("approx/kept/whole backward pass", r, s) for s, r in ((0, 1.0), (5, 0.5), (10, 0.5))]


def test_metrics_of_a_fixed_share() -> None:
    model = mlp(20, 64, 2)
    f = torch.compile(model, backend=Backend({"policy": "always", "grad": {"axis": "rows", "ratio": 0.25}}, inner_compile=run_as_is))
    f(torch.randn(32, 20)).square().mean().backward()
    values = approx_compile.metrics(model)
    assert values["approx/kept"] == values["approx/kept_mean"] == 0.25 and 0.3 < values["approx/flops_saved"] < 0.5


def test_metrics_count_a_graph_by_its_passes() -> None:
    """So that a graph for the smaller last batch of an epoch counts for little."""
    models = nn.ModuleList(mlp(20, 64, 2) for _ in range(2))
    saved = []
    for model, ratio, passes in zip(models, (0.25, 0.75), (9, 3), strict=True):
        f = torch.compile(model, backend=Backend({"policy": "always", "grad": {"axis": "rows", "ratio": ratio}}, inner_compile=run_as_is))
        for _ in range(passes):
            f(torch.randn(32, 20)).square().mean().backward()
        saved.append(approx_compile.metrics(model)["approx/flops_saved"])
    values = approx_compile.metrics(models)
    assert values["approx/kept_mean"] == pytest.approx((9 * 0.25 + 3 * 0.75) / 12)
    assert values["approx/flops_saved"] == pytest.approx((9 * saved[0] + 3 * saved[1]) / 12)
