"""The backend finds the module whose forward a graph's products are in, and thereby its mode, however that forward is spelled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers.compile import compiled
from torch import Tensor, nn

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5}


class Self(nn.Module):
    """A module whose forward has products of its own, which no stack of modules names, beside those of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(64, 64) / 8), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((x @ self.w).relu() @ self.w)


class Named(Self):
    def forward(module, x: Tensor) -> Tensor:
        return module.o((x @ module.w).relu() @ module.w)


def wrapped(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return f(*args, **kwargs)

    return wrapper


class Decorated(Self):
    forward = wrapped(Self.forward)


class Args(Self):
    def forward(*args: Any) -> Any:
        return args[0].o((args[1] @ args[0].w).relu() @ args[0].w)


class Broken(Self):
    def forward(module, x: Tensor) -> Tensor:
        h = (x @ module.w).relu()
        torch._dynamo.graph_break()
        return module.o(h @ module.w)


class Forgotten(Self):
    """A module that nothing leads to behind the graph break."""

    def forward(module, x: Tensor) -> Tensor:
        w = module.w
        h = module.o((x @ w).relu())
        torch._dynamo.graph_break()
        return h @ h.t()


def hooked() -> nn.Module:
    """A module whose forward is replaced as accelerate's add_hook_to_module does it."""
    module = Self()
    old = module.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old(*args, **kwargs)

    module._old = old
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)
    return module


def replaced() -> nn.Module:
    """A module whose forward is a function on the instance, with the bound method in its closure."""
    module = Self()
    old = module.forward
    module.forward = lambda *args: old(*args)
    return module


class Bare(nn.Module):
    """A module to which no parameter leads."""

    def forward(this, x: Tensor) -> Tensor:
        return x @ x.relu()


def bare_replaced() -> nn.Module:
    module = Bare()
    old = module.forward
    module.forward = lambda *args: old(*args)
    return module


def closure(module: nn.Module) -> Callable[..., Any]:
    return lambda x: module.forward(x)


def deep_closure(module: nn.Module) -> Callable[..., Any]:
    def inner(x: Tensor) -> Any:
        return module.forward(x)

    return lambda x: inner(x)


def around(module: nn.Module) -> Callable[..., Any]:
    """A function around a module, with a last product of its own."""
    weight = torch.randn(5, 64)
    return lambda x: module(x) @ weight


SPELLINGS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{c.__name__: lambda c=c: ((m := c()), m) for c in (Self, Named, Decorated, Args, Broken, Forgotten, Bare, hooked, replaced, bare_replaced)},  # type: ignore[misc]
    "partial": lambda: ((m := Self()), functools.partial(Self.forward, m)),
    "method": lambda: ((m := Self()), m.forward),
    "function": lambda: ((m := Self()), lambda x: Named.forward(m, x)),
    "closure": lambda: ((m := Self()), closure(m)),
    "bare closure": lambda: ((m := Bare()), closure(m)),
    "deep closure": lambda: ((m := Self()), deep_closure(m)),
    "around": lambda: ((m := Self()), around(m)),
    "argument": lambda: ((m := Self()), lambda x, module=m: module.o((x @ module.w).relu() @ module.w)),
    "container": lambda: ((m := Self()), lambda x, held={"m": [m]}: held["m"][0].o(x @ held["m"][0].w)),
}


class Tied(nn.Module):
    """Language models share a weight between the first layer and the last, and a decorator takes their arguments: no parameter leads to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.head.weight = self.table.weight

    @wrapped
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.table(x)).relu())


def test_a_layer_that_shares_its_weight_is_found_behind_a_decorator() -> None:
    model, x = Tied(), torch.randint(0, 32, (64,))
    f, _, plans = compiled(model, ALWAYS)
    for head_trains in (True, False):
        model.head.train(head_trains)
        f(x)
        decisions = {s.name: s.decision for s in plans[-1].sites}
        assert decisions == {"body": "sampled", "head": "sampled" if head_trains else "exact"}
    assert len(plans) == 2


UNKNOWN = ("Forgotten",)
"""Those of which nothing tells the mode: exact in any."""


@pytest.mark.sample(12)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("trains_first", [False, True])
@pytest.mark.parametrize("name", list(SPELLINGS))
def test_the_mode_is_found_however_forward_is_spelled(name: str, trains_first: bool) -> None:
    model, called = SPELLINGS[name]()
    x = torch.randn(64, 64, requires_grad=True)
    f, _, plans = compiled(called, ALWAYS)
    for mode in (trains_first, not trains_first, trains_first, not trains_first):
        model.train(mode)
        before = len(plans)
        found, expected = f(x), called(x)
        if not mode:
            assert torch.equal(found, expected)
        else:
            assert not torch.allclose(found, expected) or name in UNKNOWN
        assert all(s.decision == "exact" for p in plans[before:] for s in p.sites) or mode
    compiles = len(plans)
    for mode in (True, False):
        model.train(mode)
        f(x)
    assert len(plans) == compiles
