"""Regions of tokens: what a transformer's backward graph is divided into, whatever the order of its axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tokens import Block
from torch import Tensor, fx, nn

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.passes.sites.site import PRODUCT_KEY
from approx_compile.rows.tokens import token_compiler
from approx_compile.rows.tokens.regions import Region, find_regions

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = {"policy": "always", "grad": {"axis": "tokens", "ratio": 0.5}}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """The regions found in the backward graphs compiled in a test, which are then left exact."""
    regions: list[Region] = []

    def look(graph: fx.Graph, products: Any, blocked: Any = None) -> list[Region]:
        regions.extend(find_regions(graph, products, blocked))
        return []

    monkeypatch.setattr(token_compiler, "find_regions", look)
    return regions


def backward(model: nn.Module, x: Tensor, **more: Any) -> None:
    torch.compile(model, backend=Backend(TOKENS, inner_compile=run_as_is, on_plan=lambda *plan: None), **more)(x).square().sum().backward()


def kinds(region: Region) -> list[str]:
    return [str(n.meta[PRODUCT_KEY]) for n in region.products]


@pytest.mark.sample(3)
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_regions_of_a_block(found: list[Region], pre_norm: bool, batch_first: bool, fused: bool) -> None:
    backward(Block(8, pre_norm=pre_norm, batch_first=batch_first, fused=fused), torch.randn(3, 5, 8, requires_grad=True))
    mlp, out, _ = found
    pair = ["grad_input", "grad_weight"]
    assert [sorted(kinds(r)) for r in found] == [sorted(n * pair) for n in (2, 1, 1 if fused else 3)]
    assert all(r.tokens == 15 and r.factors == (3, 5) for r in found)
    assert [len(r.entering) for r in (mlp, out)] == [1, 1]
    summed = sum(layout is None for layout in mlp.members.values())
    assert summed == (6 if pre_norm else 4)  # weights and biases of two layers, and of the norm where it belongs to the branch


def test_a_residual_stream_bypasses_its_regions(found: list[Region]) -> None:
    backward(nn.Sequential(Block(8), Block(8)), torch.randn(3, 5, 8))
    assert len(found) == 6
    assert all(isinstance(n.meta["val"], Tensor) for r in found for n in r.members)
    taken = [n for r in found for n in r.members]
    assert len(taken) == len(set(taken))
    for r in found:
        assert not any(n in r.members for n in r.entering)


def test_layers_in_a_row_are_one_region(found: list[Region]) -> None:
    """The gradient of the lower layer is computed from that of the upper one alone."""
    backward(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 5, 8))
    (region,) = found
    assert len(region.products) == 5 and [n.name.split("_")[0] for n in region.entering] == ["tangents"]


class Mixer(nn.Module):
    """Mixes tokens with a layer over positions, between two layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(8, 8), nn.Linear(5, 5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x).mT).mT)  # type: ignore[no-any-return]


def test_a_layer_over_positions_ends_a_region(found: list[Region]) -> None:
    backward(Mixer(), torch.randn(3, 5, 8))
    assert [(r.tokens, len(r.products)) for r in found] == [(15, 2), (24, 2), (15, 1)]


def test_a_weighted_mean_over_tokens_is_no_part_of_a_region(found: list[Region]) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.high(self.low(x).softmax(1).mean(1))  # type: ignore[no-any-return]

    backward(Pooled(), torch.randn(3, 5, 8))
    assert sorted(r.tokens for r in found) == [3, 15]


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (1 + g.abs())


def test_nothing_is_sampled_above_a_function_that_is_not_linear(found: list[Region]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.high(_Clipped.apply(self.low(x)))  # type: ignore[no-untyped-call, no-any-return]

    backward(Model(), torch.randn(3, 5, 8))
    assert [kinds(r) for r in found] == [["grad_weight"]]


def test_symbolic_sizes(found: list[Region]) -> None:
    backward(Block(8), torch.randn(3, 5, 8), dynamic=True)
    assert [len(r.products) for r in found] == [4, 2, 6]
    assert all(len(r.factors) == 2 and all(f.is_Symbol for f in r.factors) for r in found)
