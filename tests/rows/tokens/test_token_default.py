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
        ({"rules": [{"layers": "out", "grad": {"axis": "rows"}}]}, {"rows"}),
        ({"rules": [{"layers": "*", "method": "exact"}]}, set()),
    ],
    ids=str,
)
def test_settings_that_say_which_hold(options: dict[str, Any], found: set[str]) -> None:
    assert axes(Block(8), torch.randn(8, 6, 8), options) == found


def test_a_layer_that_a_rule_keeps_exact_is_in_no_region() -> None:
    f, plans = rows_of(Block(8), {"rules": [{"layers": "out", "method": "exact"}]})
    f(torch.randn(8, 6, 8)).sum().backward()
    assert [c.reason for c in plans[0].cuts] == ["tokens of narrow, wide", "tokens of qkv.2, qkv.1, qkv.0"]


def test_only_settings_without_an_axis_leave_it_open() -> None:
    assert ApproxConfig().leaves_axis_open() and ApproxConfig().on_tokens().asks_for_rows("tokens")
    for given in ({"method": "exact"}, {"policy": "always"}, {"ratio": 0.5}, {"rules": [{"layers": "a", "policy": "always", "ratio": 0.5}]}):
        assert not ApproxConfig(**given).leaves_axis_open()  # type: ignore[arg-type]


def test_a_defect_leads_to_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise KeyError("lost")

    monkeypatch.setattr(token_compiler, "rewrite", broken)
    with pytest.warns(ApproxWarning, match="tokens are not sampled, samples may be: .*lost"):
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
