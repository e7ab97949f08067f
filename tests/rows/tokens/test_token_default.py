"""Where the settings do not say which, the default chooses tokens if most of the work is in linear layers that see several of every sample."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import rows_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from helpers.tokens import Block
from torch import Tensor, nn

import approx_compile
from approx_compile import ApproxWarning
from approx_compile.config import ApproxConfig
from approx_compile.reasons.rows import OUTSIDE_REGIONS
from approx_compile.rows.tokens import token_compiler

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


class Merged(nn.Module):
    """Linear layers written as products with the leading axes merged, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8) for _ in range(2)])
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = torch.addmm(self.bias, x.view(-1, 8), w).view(x.shape).relu()
        return x


class Flat(nn.Module):
    """A linear layer that sees each image as one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention over so many positions that most of the work is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Convolutions(nn.Module):
    """Convolutions, and a head that sees positions."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(8, 16, 5, padding=2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


def axes(model: nn.Module, x: Tensor, options: dict[str, Any] | None = None) -> set[str]:
    """What runs on some of its entries, after a step whose gradients are the exact ones because nothing was measured before."""
    f, plans = rows_of(model, options)
    y = f(x)
    y.square().sum().backward()
    got = grads(model)
    model(x).square().sum().backward()
    want = grads(model)
    assert relative(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in want])) < 1e-5
    return {c.axis for plan in plans for c in plan.cuts if c.decision == "rows"}


@pytest.mark.parametrize(
    ("make", "shape", "found"),
    [
        (lambda: Block(8), (8, 6, 8), "tokens"),
        (lambda: Block(8, batch_first=False), (6, 8, 8), "tokens"),
        (lambda: mlp(8, 16, 8), (8, 6, 8), "tokens"),
        (Merged, (8, 6, 8), "tokens"),
        (lambda: mlp(8, 16, 8), (8, 8), "rows"),
        (lambda: mlp(8, 16, 8), (8, 1, 8), "rows"),
        (Flat, (8, 4, 8), "rows"),
        (Attention, (8, 64, 8), "rows"),
        (Convolutions, (8, 6, 8), "rows"),
    ],
    ids=["block", "time first", "layers on positions", "merged", "vectors", "one position", "flattened", "attention", "convolutions"],
)
def test_what_the_default_chooses(make: Any, shape: tuple[int, ...], found: str) -> None:
    assert axes(make(), torch.randn(shape)) == {found}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"grad": {"axis": "rows"}}, {"rows"}),
        ({"grad": {"axis": "tokens"}}, {"tokens"}),
        ({"adaptive": {"tau": "auto"}}, {"rows"}),
        ({"adaptive": {"tau": 0.1}}, {"tokens"}),
        ({"adaptive": {"tau": 0}}, {"tokens"}),
        ({"rules": [{"layers": "out", "method": "exact"}]}, {"tokens"}),
        ({"rules": [{"layers": "out", "grad": "exact"}]}, {"tokens"}),
        ({"grad": "exact"}, set()),
        ({"rules": [{"layers": "out", "grad": {"axis": "rows"}}]}, {"rows"}),
        ({"rules": [{"layers": "*", "method": "exact"}]}, set()),
    ],
    ids=str,
)
def test_settings_that_say_which_hold(options: dict[str, Any], found: set[str]) -> None:
    assert axes(Block(8), torch.randn(8, 6, 8), options) == found


@pytest.mark.parametrize("key", ["method", "grad"])
def test_a_layer_that_a_rule_keeps_exact_is_in_no_region(key: str) -> None:
    f, plans = rows_of(Block(8), {"rules": [{"layers": "out", key: "exact"}]})
    f(torch.randn(8, 6, 8)).sum().backward()
    assert [c.reason for c in plans[0].cuts] == ["tokens of narrow, wide", "tokens of qkv.2, qkv.1, qkv.0"]
    exact = {s.kind: s.reason for s in plans[0].sites if s.decision == "exact"}
    assert "linear" in exact and set(exact.values()) == {OUTSIDE_REGIONS()}


def test_only_settings_without_an_axis_leave_it_open() -> None:
    assert ApproxConfig().leaves_axis_open() and ApproxConfig().on_tokens().asks_for_rows("tokens")
    for given in ({"method": "exact"}, {"policy": "always"}, {"ratio": 0.5}, {"rules": [{"layers": "a", "policy": "always", "ratio": 0.5}]}):
        assert not ApproxConfig(**given).leaves_axis_open()  # type: ignore[arg-type]


def test_a_defect_leads_to_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise KeyError("lost")

    monkeypatch.setattr(token_compiler, "rewrite", broken)
    with pytest.warns(ApproxWarning, match="tokens are not sampled; samples are, where that is possible: .*lost"):
        assert axes(Block(8), torch.randn(8, 6, 8)) == {"rows"}


def test_regions_share_a_control_over_graphs_by_their_layers() -> None:
    block = nn.Sequential(Block(8))
    f, _ = rows_of(block, None)
    for length in (6, 9, 7):
        f(torch.randn(8, length, 8)).square().sum().backward()
    names = [name.rpartition(":")[2] for name in approx_compile.controls(block)]
    assert names == ["narrow+wide", "out", "qkv.0+qkv.1+qkv.2"]
    assert {c.passes for c in approx_compile.controls(block).values()} == {3}


def decorated(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    """A forward behind a decorator, as models of Hugging Face have it: the model is the first of the wrapper's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_layers_behind_a_decorator_have_their_names() -> None:
    model = Decorated()
    f, plans = rows_of(model, None)
    f(torch.randn(8, 6, 8)).square().sum().backward()
    assert [c.reason for c in plans[0].cuts] == ["tokens of layers.1, layers.0"]
    assert [name.rpartition(":")[2] for name in approx_compile.controls(model)] == ["0+1"]


class Odd(nn.Module):
    """Views with keywords only, and of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.b = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.a(torch.flatten(input=x, start_dim=0, end_dim=1)).relu() + self.time(t.view(1, 1))
        return self.b(torch.reshape(input=y, shape=(-1, 8))).view(x.shape)  # type: ignore[no-any-return]


def test_views_by_keyword_and_of_a_number() -> None:
    model, x, t = Odd(), torch.randn(8, 6, 8), torch.tensor(0.5)
    f, plans = rows_of(model, None)
    f(x, t).square().sum().backward()
    got = grads(model)
    model(x, t).square().sum().backward()
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, grads(model), strict=True))
    assert len(plans) == 1


@pytest.mark.parametrize("late", [False, True], ids=["before", "after the call"])
@pytest.mark.parametrize("axis", [None, "tokens"])
def test_a_hook_on_an_inputs_gradient_keeps_everything(axis: str | None, late: bool) -> None:
    embed, model, x = nn.Linear(8, 8), mlp(8, 16, 8), torch.randn(8, 6, 8)
    matters = torch.linspace(0, 1, 6).view(1, 6, 1) ** 4 * torch.linspace(0, 1, 8).view(8, 1, 1) ** 4
    f, _ = rows_of(model, {"adaptive": {"tau": 0.5, "probe": 0}} | ({"grad": {"axis": axis}} if axis else {}))

    def step(call: Any, hooked: bool) -> list[Tensor]:
        h = embed(x)
        out = call(h) if late else None
        if hooked:
            h.register_hook(lambda g: g.clamp(-0.05, 0.05))
        out = call(h) if out is None else out
        (out * matters).square().sum().backward()
        return [*grads(embed), *grads(model)]

    for _ in range(24):
        step(f, False)
    assert all(relative(a, b) < 1e-5 for a, b in zip(step(f, True), step(model, True), strict=True))
    assert not all(relative(a, b) < 1e-5 for a, b in zip(step(f, False), step(model, False), strict=True))


@pytest.mark.parametrize("when", [{"steps": ":3"}, {"phase": "warm"}])
def test_a_schedule_with_an_exact_part_keeps_tokens(when: dict[str, str]) -> None:
    block = Block(8)
    f, plans = rows_of(block, {"rules": [{"layers": "*", "method": "exact", **when}]})
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    for _ in range(6):
        f(torch.randn(8, 6, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {c.axis for plan in plans for c in plan.cuts if c.decision == "rows"} == {"tokens"}
    assert [name.rpartition(":")[2] for name in approx_compile.controls(block)] == ["narrow+wide", "out", "qkv.0+qkv.1+qkv.2"]


def test_ranks_that_agree_choose_samples() -> None:
    assert axes(Block(8), torch.randn(8, 6, 8), {"adaptive": {"agree": True}}) == {"rows"}


def test_explain_after_training_says_what_is_kept_now() -> None:
    block, x = Block(8), torch.randn(8, 6, 8)
    f, _ = rows_of(block, {"adaptive": {"tau": 2.0}})
    for _ in range(12):
        (f(x) * torch.linspace(0, 1, 6).view(1, 6, 1) ** 4).square().sum().backward()
    report = approx_compile.explain(block, x)
    assert report.adaptive is not None
    assert report.adaptive.rows == {i: c.ratio for i, c in enumerate(approx_compile.controls(block).values(), 1)}
    assert min(report.adaptive.rows.values()) < 1 and "tokens" in str(report)


def test_metrics_weigh_regions_by_their_flops() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 256), nn.Linear(256, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(F.gelu(self.wide(self.small(x).softmax(1))))  # type: ignore[no-any-return]

    model = Uneven()
    f, plans = rows_of(model, {"adaptive": {"tau": 0.5, "probe": 0}})
    for _ in range(12):
        (f(torch.randn(8, 6, 8)) * torch.rand(8, 6, 1) ** 4).square().sum().backward()
    flops, found = [c.products and c.flops_on_rows for c in plans[0].cuts], [*approx_compile.controls(model).values()]
    assert [c.work.on_rows for c in found] == flops and flops[0] > 20 * flops[1] and found[0].ratio != found[1].ratio
    kept = sum(w * c.ratio for w, c in zip(flops, found, strict=True)) / sum(flops)
    assert approx_compile.metrics(model)["approx/kept"] == pytest.approx(kept)


def test_keys_of_regions() -> None:
    modules = ["net.blocks.0.a", "net.blocks.0.b", "net.blocks.1.a", "net.blocks.1.b", "net.head"]
    regions = [["blocks.1.b", "blocks.1.a"], ["blocks.0.a"], ["head"], ["model.py:8", "model.py:9"], ["model.py:10"]]
    keys = ["blocks.1.a+blocks.1.b", "blocks.0.a", "head", "#1", "#2"]
    assert token_compiler.keys_of_regions(regions, modules) == keys
    assert token_compiler.keys_of_regions(regions[1:2], modules) == keys[1:2]  # whatever other regions there are
    assert token_compiler.keys_of_regions([["head"], ["head"]], modules) == ["head", "head#2"]


class Opaque(nn.Module):
    """Layers on positions, most of them above an op that mixes them in a way that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).cumsum(1)).cumsum(1))  # type: ignore[no-any-return]


def test_samples_are_chosen_where_little_is_in_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 6, 8)
    assert axes(Opaque(), x) == {"tokens"}  # three regions of a layer each
    found = token_compiler.find_regions
    monkeypatch.setattr(token_compiler, "find_regions", lambda *given: found(*given)[:1])
    assert axes(Opaque(), x) == {"rows"}
    assert axes(Opaque(), x, {"grad": {"axis": "tokens"}}) == {"tokens"}
