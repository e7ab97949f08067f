"""Gradients are zero outside the channels that the plan lists, and the plan lists them through all that keeps zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Choices, Plans, compiled
from helpers.models import TransformerBlock, mlp
from torch import Tensor, fx, nn

from approx_compile import Backend

WEIGHTS: dict[str, Any] = {"policy": "always", "method": "topk_weights", "ratio": 0.5}


def _listed(model: nn.Module, x: Tensor, options: dict[str, Any] = WEIGHTS) -> set[tuple[str, int, str]]:
    """Train one step; return (parameter, dim, site) of what is listed, after comparing it with the gradients."""
    choices, plans, inputs = Choices(), Plans(), list[str]()
    backend = Backend(options, inner_compile=choices, on_plan=plans)

    def with_names(gm: fx.GraphModule, example_inputs: Any) -> Any:
        inputs.extend(n.name.replace("l_fn_", "l_self_") for n in gm.graph.find_nodes(op="placeholder"))
        return backend(gm, example_inputs)

    torch.compile(model, backend=with_names)(x).square().mean().backward()
    parameters = {_input_name(n): (n, p) for n, p in model.named_parameters()}
    listed = set()
    for kept in (k for plan in plans for k in plan.kept):
        name, p = parameters[inputs[kept.input]]
        idx = choices[f"{kept.site}.output.idx"]
        dropped = torch.ones(kept.size, dtype=torch.bool)
        for i in idx.tolist():
            dropped[i * kept.unit : (i + 1) * kept.unit] = False
        assert p.shape[kept.dim] == kept.size and int((~dropped).sum()) == kept.kept < kept.size
        assert p.grad is not None and not p.grad.index_select(kept.dim, dropped.nonzero()[:, 0]).any(), (name, kept)
        assert p.grad.any()
        listed.add((name, kept.dim, kept.site))
    return listed


def _input_name(parameter: str) -> str:
    """The name that Dynamo gives the input of a parameter."""
    *modules, last = parameter.split(".")
    return "l_self_" + "".join(f"modules_{m}_" for m in modules) + f"parameters_{last}_"


def test_linear_layers_and_what_they_read() -> None:
    assert _listed(mlp(64, 128, 128, 10), torch.randn(32, 64)) == {
        ("0.weight", 1, "0"), ("0.weight", 0, "2"), ("0.bias", 0, "2"), ("2.weight", 1, "2"), ("2.weight", 0, "4"), ("2.bias", 0, "4"), ("4.weight", 1, "4"),
    }  # fmt: skip


class _Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def test_convolutions_with_batch_norm_between() -> None:
    options = WEIGHTS | {"rules": [{"layers": "conv", "ratio": 0.5}]}
    listed = {(n, d) for n, d, _ in _listed(_Convs(), torch.randn(4, 32, 8, 8), options)}
    assert listed == {("a.weight", 1), ("a.weight", 0), ("a.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("b.weight", 1)}


class _TwoReaders(nn.Module):
    """An activation that two layers read: it is zero nowhere, but each weight's gradient is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.a(h) + self.b(h)


def test_an_activation_with_two_readers_keeps_its_producer_whole() -> None:
    assert _listed(_TwoReaders(), torch.randn(32, 64), WEIGHTS | {"share": False}) == {("first.weight", 1, "first"), ("a.weight", 1, "a"), ("b.weight", 1, "b")}


def test_an_activation_with_two_readers_that_share_their_choice() -> None:
    listed = _listed(_TwoReaders(), torch.randn(32, 64), WEIGHTS | {"share": True})
    assert {("first.weight", 0, "a"), ("first.bias", 0, "a"), ("a.weight", 1, "a"), ("b.weight", 1, "a")} <= listed


class _Tied(nn.Module):
    """A weight that two layers use: its gradient is a sum, zero where both parts are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight)


def test_a_weight_that_two_layers_use_is_not_listed_for_either_alone() -> None:
    model = _Tied()
    f, _, plans = compiled(model, WEIGHTS)
    f(torch.randn(32, 64)).square().mean().backward()
    assert [k for plan in plans for k in plan.kept] == []


@pytest.mark.parametrize("change", [{"method": "topk"}, {"sampling": "backward"}, {"sampling": "blackbox"}])
def test_choices_by_the_data_and_exact_outputs_list_nothing(change: dict[str, Any]) -> None:
    assert _listed(mlp(64, 128, 128, 10), torch.randn(32, 64), WEIGHTS | change) == set()


def test_replaced_gradients_are_not_zero_where_their_output_gradient_is() -> None:
    options = WEIGHTS | {"rules": [{"layers": "0", "output": "exact", "grad_weight": "random"}]}
    assert not any(name == "0.weight" for name, _, _ in _listed(mlp(64, 128, 128, 10), torch.randn(32, 64), options))


@pytest.mark.slow
def test_transformer_block() -> None:
    listed = _listed(TransformerBlock(128), torch.randn(2, 16, 128))
    assert {site for _, _, site in listed} == {"qkv", "out", "up", "down"}
    assert {n for n, dim, _ in listed if dim == 0} >= {"up.weight", "up.bias", "n1.weight", "n2.weight"}
