"""Compile a model under the backend without Inductor, and record what was planned and which indices were chosen; options that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.rewrite.graph_edit import SELECTION_KEY

HALF: dict[str, Any] = {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5}}
"""Every backward pass runs on half the rows of its batch, also where that does not pay."""

ADAPTIVE: dict[str, Any] = {"policy": "adaptive", "adaptive": {"tau": 0.1}}
"""The share of rows follows the gradients' norms."""


class Choices(dict[str, Tensor]):
    """An `inner_compile` that interprets the graphs op by op and records the chosen indices and scales by name (`site.product.idx`)."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[[list[Any]], Any]:
        choices = self

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if SELECTION_KEY in n.meta:
                    choices[n.meta[SELECTION_KEY]] = value.detach().clone()
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
    """An `on_plan` callback that records the plans."""

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
    """The model under the backend, its graphs interpreted op by op, with the recorded choices and plans."""
    choices, plans = Choices(), Plans()
    return torch.compile(model, backend=Backend(options, inner_compile=choices, on_plan=plans), **kwargs), choices, plans


def plans_of(model: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The sites planned for one training forward pass."""
    plans = Plans()
    torch.compile(model, backend=Backend(options, inner_compile=run_as_is, on_plan=plans))(*args, **kwargs)
    return plans.sites


def rows_of(model: Any, options: dict[str, Any] = HALF, **more: Any) -> tuple[Any, Plans]:
    """The model under the backend, its graphs interpreted by torch, with the plans that were made."""
    plans = Plans()
    return torch.compile(model, backend=Backend(options, inner_compile=run_as_is, on_plan=plans), **more), plans
