"""Producers that make only what their consumer keeps: the values are those of whole activations, and producers are narrowed only where nothing else reads
them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Choices, compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from approx_compile import Backend, explain, machine
from approx_compile.kernels import availability
from approx_compile.passes.cost import margins
from approx_compile.passes.planning.producer_narrowing import Producers

ALWAYS: dict[str, Any] = {"policy": "always", "method": "topk_weights", "ratio": 0.5, "group": 1, "min_k": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Any], conv: bool = False, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.one = nn.Conv2d(8, 24, 3, padding=1) if conv else nn.Linear(16, 24)
        self.two = nn.Conv2d(24, 12, 3, stride=2, bias=False) if conv else nn.Linear(24, 8)
        self.between, self.norm = between, norm

    def forward(self, x: Tensor) -> Any:
        h = self.one(x)
        made = self.between(h if self.norm is None else self.norm(h))
        return (self.two(made[0]), *made[1:]) if isinstance(made, tuple) else self.two(made)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), 0.2))


def scaled(h: Tensor) -> Tensor:
    """Multiply the activation by operands of every width: one value per channel, one per sample, one for all."""
    channel = torch.linspace(-1, 2, 24)
    return F.leaky_relu(h * channel + h.shape[0] * torch.ones(h.shape[0], 1), 0.1).clamp(max=3.0) ** 2


LINEAR, CONV, TOKENS = (40, 16), (4, 8, 9, 9), (4, 6, 16)
SHRUNK: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "mlp": (lambda: mlp(16, 32, 24, 8), LINEAR, {}, {"2": ("0",), "4": ("2",)}),
    "nothing between": (lambda: Between(lambda h: h), LINEAR, {}, {"two": ("one",)}),
    "gelu, tokens": (lambda: Between(F.gelu), TOKENS, {}, {"two": ("one",)}),
    "dropout": (lambda: Between(lambda h: F.dropout(F.relu(h), 0.3)), TOKENS, {}, {"two": ("one",)}),
    "operands": (lambda: Between(scaled), LINEAR, {}, {"two": ("one",)}),
    "two producers": (Gated, TOKENS, {}, {"down": ("gate", "up")}),
    "convolutions": (lambda: Between(F.relu, True), CONV, {}, {"two": ("one",)}),
    "frozen BatchNorm": (lambda: Between(F.relu, True, nn.BatchNorm2d(24).eval()), CONV, {}, {"two": ("one",)}),
    "producer exact": (lambda: mlp(16, 32, 24), LINEAR, {"rules": [{"layers": "0", "method": "exact"}]}, {"2": ("0",)}),
    "convolution exact": (lambda: Between(F.silu, True), CONV, {"rules": [{"layers": "one", "method": "exact"}]}, {"two": ("one",)}),
    "producer by another method": (lambda: mlp(16, 32, 24), LINEAR, {"rules": [{"layers": "0", "method": "wta"}]}, {"2": ("0",)}),
    "gradients on their own axes": (lambda: mlp(16, 32, 24), LINEAR, {"rules": [{"layers": "0", "sampling": "backward", "method": "topk"}]}, {"2": ("0",)}),
    "gradients exact": (lambda: mlp(16, 32, 24), LINEAR, {"rules": [{"layers": "0", "sampling": "blackbox"}]}, {"2": ("0",)}),
    "an exact gradient of a convolution": (lambda: Between(F.relu, True), CONV, {"rules": [{"layers": "one", "sampling": "blackbox"}]}, {"two": ("one",)}),
    "one gradient exact": (lambda: mlp(16, 32, 24), LINEAR, {"rules": [{"layers": "0", "grad_input": "exact"}]}, {"2": ("0",)}),
    "a convolution's, too": (lambda: Between(F.relu, True), (40, 8, 5, 5), {"rules": [{"layers": "one", "sampling": "backward"}]}, {"two": ("one",)}),
    "gradients replaced": (lambda: mlp(16, 32, 24), LINEAR, {"grad_weight": "zero"}, {"2": ("0",)}),
}


@pytest.fixture(autouse=True)
def shrink_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let narrowing count as worth it, because the models here are too small for it."""
    monkeypatch.setattr(margins, "pays", lambda *anything: True)


def shrinks(sites: list[Any]) -> dict[str, tuple[str, ...]]:
    return {s.name: s.shrinks for s in sites if s.shrinks}


def step(model: nn.Module, options: dict[str, Any], x: Tensor) -> tuple[list[Tensor], Choices, list[Any]]:
    """Return the output and all gradients."""
    torch._dynamo.reset()
    f, choices, plans = compiled(model, options)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    y = f(x)
    y.square().sum().backward()
    return [y.detach(), *grads(model, x)], choices, plans.sites


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a context in which producers make all channels."""

    @contextlib.contextmanager
    def off() -> Any:
        with monkeypatch.context() as m:
            m.setattr(Producers, "narrow", lambda self, plan: plan)
            yield

    return off


@pytest.mark.slow
@pytest.mark.sample(8)
@pytest.mark.parametrize("name", SHRUNK)
@pytest.mark.parametrize("group", [1, 4, 5])  # 5 leaves a tail
def test_values_are_those_of_whole_activations(name: str, group: int, whole: Any) -> None:
    make, shape, more, want = SHRUNK[name]
    model, x = make(), torch.randn(shape)
    options = ALWAYS | more | {"group": group}
    found, choices, sites = step(model, options, x)
    assert shrinks(sites) == want
    with whole():
        expected, same, without = step(model, options, x)
    assert not shrinks(without)
    assert choices.keys() == same.keys() and all(torch.equal(choices[k], same[k]) for k in same)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6


def outputs_too(h: Tensor) -> tuple[Tensor, Tensor]:
    h = F.relu(h)
    return h, h


FORBIDDEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], str]] = {
    "BatchNorm": (lambda: Between(F.relu, True, nn.BatchNorm2d(24)), CONV, {}, "the running statistics of BatchNorm would go stale"),
    "LayerNorm": (lambda: Between(F.gelu, norm=nn.LayerNorm(24)), LINEAR, {}, "a normalisation over channels"),
    "softmax": (lambda: Between(lambda h: h.softmax(-1)), LINEAR, {}, "amax reads its activation as well"),
    "an output": (lambda: Between(outputs_too), LINEAR, {}, "its activation is an output of the graph"),
    "a mean of it": (lambda: Between(lambda h: (h.relu(), h.mean())), LINEAR, {}, "mean reads its activation as well"),
    "channels mixed": (lambda: Between(lambda h: h.relu().flip(-1)), LINEAR, {}, "rev reads its activation as well"),
    "channels merged": (lambda: Between(lambda h: h.view(-1, 12).relu().view(-1, 24)), LINEAR, {}, "view reads its activation as well"),
    "raw gradients": (lambda: Between(F.relu), LINEAR, {"sampling": "blackbox"}, ""),
    "exact output": (lambda: Between(F.relu), LINEAR, {"sampling": "backward"}, ""),
    "a choice by the activation": (lambda: Between(F.relu), LINEAR, {"method": "topk"}, ""),
    "a gradient of the largest": (lambda: Between(F.relu, True), CONV, {"grad_weight": "max"}, ""),
    "groups": (lambda: nn.Sequential(nn.Conv2d(8, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=3)), CONV, {}, "batched or grouped"),
    "a grouped producer": (lambda: nn.Sequential(nn.Conv2d(8, 24, 1, groups=2), nn.ReLU(), nn.Conv2d(24, 8, 3)), CONV, {"min_k": 2}, "batched, grouped or"),
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", FORBIDDEN)
def test_whoever_reads_the_activation_forbids_it(name: str) -> None:
    make, shape, more, why = FORBIDDEN[name]
    sites = plans_of(make(), ALWAYS | more, torch.randn(shape))
    assert not shrinks(sites) and why in sites[-1].reason
    assert ("all channels of" in sites[-1].reason) == bool(why)


def test_kernels_of_ours_read_whole_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
    for layer in ("0", "2"):
        torch._dynamo.reset()
        rules = [{"layers": layer, "lowering": "triton", "group": 32}]
        sites = plans_of(mlp(128, 128, 16), ALWAYS | {"lowering": "inductor", "rules": rules}, torch.randn(40, 128))
        assert not shrinks(sites) and "triton steps over what was not chosen" in sites[1].reason


def with_kernels(by: float) -> Any:
    """Use the tests' machine profile with kernels that run at so many times the rates of its exact products."""
    profile = machine.current()
    known = {n: t for n, t in profile.tables.items() if n.startswith("linear.")}
    tables = {f"triton.{n}": t.model_copy(update={"values": tuple(v * by for v in t.values)}) for n, t in known.items()}
    return machine.use(profile.model_copy(update={"tables": profile.tables | tables}))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "cost"])
def test_kernels_of_ours_or_narrow_producers_whichever_is_faster(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to `auto`, both sites run by a kernel where that saves more than making half of the channels; a lowering that is named is kept."""
    monkeypatch.undo()  # by the model's own margins
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
    options = ALWAYS | {"policy": policy, "group": 32, "rules": [{"layers": "linear"}]}
    model, x = mlp(64, 512, 512, 512, 16), torch.randn(512, 64)

    def planned(by: float, **more: Any) -> tuple[dict[str, tuple[str, ...]], list[str], str]:
        torch._dynamo.reset()
        with with_kernels(by):
            sites = plans_of(model, options | more, x)
        return shrinks(sites), [s.products[0].lowering for s in sites[1:3]], sites[2].reason

    assert planned(1.0)[:2] == ({"4": ("2",), **({"6": ("4",)} if policy == "always" else {"2": ("0",)})}, ["inductor"] * 2)
    assert planned(20.0)[:2] == ({}, ["triton"] * 2) and "triton on whole operands is predicted to be no slower" in planned(20.0)[2]
    assert planned(1.0, lowering="triton")[:2] == ({}, ["triton"] * 2)


@pytest.mark.slow
def test_sites_that_share_a_choice_change_their_code_together(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate has another reader, so only `up` is narrowed. Both keep the same entries of x, which Inductor gathers once."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 16)

        def forward(self, x: Tensor) -> Tensor:
            gate = F.silu(self.gate(x))
            return self.down(gate * self.up(x)) + gate.mean(-1, keepdim=True)

    model, x = Wide(), torch.randn(64, 128)
    options = ALWAYS | {"method": "wta", "group": 32, "share": True, "rules": [{"layers": "down", "method": "topk_weights", "lowering": "inductor"}]}
    with with_kernels(20.0):
        found, choices, sites = step(model, options, x)
        with whole():
            expected, _, without = step(model, options, x)
    assert shrinks(sites) == {"down": ("up",)} and choices.keys() == {"gate.output.idx", "gate.output.scale", "down.output.idx"}
    assert [s.products[0].lowering for s in sites] == ["inductor"] * 3 and [s.products[0].lowering for s in without] == ["triton", "triton", "inductor"]
    assert all("by triton; but by inductor" in s.products[0].reason for s in sites[:2]) and [s.products[0].shares for s in sites] == [None, "gate", None]
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6


def test_a_residual_and_a_second_consumer_forbid_it() -> None:
    class Twice(nn.Module):
        def __init__(self, residual: bool) -> None:
            super().__init__()
            self.one, self.two, self.three, self.residual = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), residual

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).tanh()
            return self.two(h) + (h if self.residual else self.three(h))

    for residual in (True, False):
        sites = plans_of(Twice(residual), ALWAYS, torch.randn(LINEAR))
        assert not shrinks(sites) and "as well" in sites[1].reason


@pytest.mark.slow
def test_a_branch_with_other_readers_stays_whole_beside_one_that_has_none(whole: Any) -> None:
    class Partly(Gated):
        def forward(self, x: Tensor) -> Tensor:
            gate = F.silu(self.gate(x))
            return self.down(gate * self.up(x)) + gate.mean(-1, keepdim=True)

    model, x = Partly(), torch.randn(TOKENS)
    found, _, sites = step(model, ALWAYS, x)
    assert shrinks(sites) == {"down": ("up",)} and "all channels of gate are made: mean" in sites[-1].reason
    with whole():
        expected, _, _ = step(model, ALWAYS, x)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6


@pytest.mark.slow
def test_gradients_that_are_hooked_are_whole(whole: Any) -> None:
    seen: list[Tensor] = []

    def hooked(h: Tensor) -> Tensor:
        h.register_hook(lambda g: seen.append(g.detach().clone()) or g * 2)  # type: ignore[func-returns-value]
        return F.relu(h)

    model, x = Between(hooked), torch.randn(LINEAR)
    found, _, _ = step(model, ALWAYS, x)
    with whole():
        expected, _, _ = step(model, ALWAYS, x)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6
    assert seen[0].shape == seen[1].shape == (40, 24) and relative(*seen) < 2e-6


def test_the_report_says_who_makes_what() -> None:
    report = explain(mlp(16, 32, 24), torch.randn(40, 16, requires_grad=True), config=ALWAYS | {"rules": [{"layers": "0", "method": "exact"}]})
    one, two = report.sites
    assert one.decision == "exact" and "only the 16 of 32 channels that 2 keeps" in one.reason
    assert "0 makes these channels only" in two.reason
    assert [p.skips for p in one.products.values()] == ["2"] * 3
    exact = 2 * 40 * 16 * 32
    assert [p.flops_sampled for p in one.products.values()] == [exact // 2] * 3  # what is put in place costs no FLOPs
    assert "f32[40, 32]" not in report.after[0] and report.after[0].count("f32[40, 16]") > report.before[0].count("f32[40, 16]")


def test_what_is_saved_is_narrow_and_no_mask() -> None:
    saved: list[Any] = []

    def inner(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        saved.append([n.meta["val"] for n in gm.graph.output_node().args[0] if isinstance(n, fx.Node)])
        return Choices()(gm, example_inputs)

    model = mlp(16, 32, 24, 8)
    torch.compile(model, backend=Backend(ALWAYS, inner_compile=inner))(torch.randn(40, 16)).sum().backward()
    forward = [v for v in saved[0] if isinstance(v, Tensor)]
    assert not any(v.dtype == torch.bool for v in forward)
    assert sorted(v.shape[1] for v in forward if v.dim() == 2 and v.shape[0] == 40) == [8, 8, 12, 16]  # the output, x, and both activations


@pytest.mark.slow
def test_under_autocast(whole: Any) -> None:
    model, x = mlp(16, 32, 24), torch.randn(LINEAR)

    def run() -> tuple[list[Tensor], list[Any]]:
        torch._dynamo.reset()
        f, _, plans = compiled(model, ALWAYS)
        with torch.autocast("cpu", torch.bfloat16):
            f(x).float().square().sum().backward()
        return grads(model), plans.sites

    found, sites = run()
    assert shrinks(sites) == {"2": ("0",)} and sites[0].dtype == "bfloat16"
    with whole():
        expected, _ = run()
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-2  # bfloat16 holds 8 bits


class Checkpointed(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        for m in self.models:
            x = checkpoint(m, x, use_reentrant=False)
        return x


@pytest.mark.slow
def test_compiled_with_checkpoints_and_any_batch(whole: Any) -> None:
    """Inductor's code for a dynamic batch equals the rewritten graph of whole activations run op by op."""
    model = Checkpointed(Between(F.gelu))
    plans: list[Any] = []
    f = torch.compile(model, backend=Backend(ALWAYS, on_plan=lambda plan, before, after: plans.extend(plan.sites)), dynamic=True)
    found = []
    with torch._inductor.config.patch(force_disable_caches=True):  # on a hit the pass does not run, and makes no plan
        for batch in (12, 20):
            f(torch.ones(batch, 16).cumsum(0) / batch).square().sum().backward()
            found.append(grads(model))
    assert shrinks(plans)["models.0.two"] == ("models.0.one",) and len(plans) == 2
    torch._dynamo.reset()
    with whole():
        f, _, _ = compiled(model, ALWAYS)
        for batch, got in zip((12, 20), found, strict=True):
            f(torch.ones(batch, 16).cumsum(0) / batch).square().sum().backward()
            assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 2e-6


@pytest.mark.slow
def test_rows_are_sampled_of_what_is_narrow(whole: Any, small_work_counts: None) -> None:
    """The producer's gradients run on the rows kept."""
    model, x = mlp(16, 32, 24), torch.randn(LINEAR)
    options = ALWAYS | {"rules": [{"layers": "0", "output": "exact", "grad": {"axis": "rows", "method": "topk"}}]}
    found, _, sites = step(model, options, x)
    assert shrinks(sites) == {"2": ("0",)} and [p.decision for p in sites[0].products] == ["exact", "rows", "rows"]
    assert [p.flops_sampled for p in sites[0].products[1:]] == [2 * 40 * 16 * 32 // 4] * 2  # half of the channels on half of the rows
    with whole():
        expected, _, _ = step(model, options, x)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6


@pytest.mark.slow
def test_producers_that_share_a_choice_are_predicted_so(whole: Any) -> None:
    """The terms that the second of two producers leaves to the first while its output is whole, it also leaves to it when that is narrow. No value changes."""

    class Plain(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model, x = Plain(), torch.randn(TOKENS)
    found, choices, sites = step(model, ALWAYS | {"share": True}, x)
    with whole():
        expected, _, apart = step(model, ALWAYS | {"share": True}, x)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6 and "up.output.idx" not in choices
    assert shrinks(sites) == {"down": ("gate", "up")}
    for products in (sites[1].products, apart[1].products):
        assert [p.shares for p in products] == ["gate", "gate", None]
        output, grad_input = ({t.partition(":")[0] for t, _ in p.terms} for p in products[:2])
        assert "take B" in output and not {"selection", "take A"} & output and "untake" not in grad_input


def test_why_there_are_no_rows_is_said_of_a_narrowed_site() -> None:
    rules = [{"layers": "0", "output": "exact", "grad": {"axis": "rows"}}]
    site = plans_of(mlp(16, 32, 24), ALWAYS | {"rules": rules}, torch.randn(2, 16))[0]
    assert site.reason_with_notes == "a batch of 2, min_k is 2; only the 16 of 32 channels that 2 keeps"


def test_time_counts_what_producers_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under policy `cost` a layer that is too small to pay by itself is sampled for what the layer before it saves."""
    monkeypatch.undo()  # by the model's own margins
    model, x = mlp(256, 1024, 1024, 2, 4), torch.randn(64, 256)
    options = {"policy": "cost", "method": "topk_weights", "rules": [{"layers": "2", "method": "exact"}]}
    sites = plans_of(model, options, x)
    assert shrinks(sites) == {"4": ("2",)} and "with the sites before it" in sites[2].reason
    assert sites[1].decision == "exact" and sites[1].time_sampled_us < 0.7 * sites[1].time_exact_us
    monkeypatch.setattr(Producers, "producer_time_delta", lambda self, i, products, earlier: (0.0, 0.0))
    torch._dynamo.reset()
    assert plans_of(model, options, x)[2].decision == "exact"
