"""What the tests share: running the rewritten graphs op by op while noting which indices were chosen, and small models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.rewrite.graph_edit import CHOICE


class Choices(dict[str, Tensor]):
    """An `inner_compile` that interprets the graphs and keeps the indices and scales by name (`site.product.idx`)."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[[list[Any]], Any]:
        choices = self

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if CHOICE in n.meta:
                    choices[n.meta[CHOICE]] = value.detach().clone()
                return value

        def call(args: list[Any]) -> Any:
            given = list(args)
            args.clear()
            return Run(gm).run(*given)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def __hash__(self) -> int:  # backends are compared and hashed
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Plans(list[Plan]):
    """An `on_plan` that keeps the plans."""

    def __call__(self, plan: Plan, before: Any, after: Any) -> None:
        self.append(plan)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def sites(self) -> list[Any]:
        return [s for plan in self for s in plan.sites]


def compiled(model: Any, options: dict[str, Any], **kwargs: Any) -> tuple[Any, Choices, Plans]:
    """The model under the backend, run op by op, with what it chose and planned."""
    choices, plans = Choices(), Plans()
    return torch.compile(model, backend=Backend(options, inner_compile=choices, on_plan=plans), **kwargs), choices, plans


def plans_of(model: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The sites planned for one training forward pass."""
    plans = Plans()
    torch.compile(model, backend=Backend(options, inner_compile=run_as_is, on_plan=plans))(*args, **kwargs)
    return plans.sites


def grads(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Gradients of the parameters and of the inputs that need one, which are cleared."""
    found = []
    for t in [*model.parameters(), *inputs]:
        if t.requires_grad:
            assert t.grad is not None
            found.append(t.grad)
            t.grad = None
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in double precision."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class Buckets(nn.Module):
    """Four layers of 1 MiB, which DDP with `bucket_cap_mb=1` puts in buckets of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.relu(layer(x))
        return x
