"""Where Dynamo gives the backend nothing, the user is told once, after the first optimizer steps."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.models import mlp
from torch import nn

from approx_compile import ApproxWarning, Backend
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime import coverage_notice

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_notice, "_classes", set())


def train(f: nn.Module, x: torch.Tensor, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    for _ in range(steps):
        out = f(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        optimizer.step()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(x)[0]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_skipped_lstm(in_place: bool) -> None:
    model = Tagger()
    model.compile(backend=Backend(inner_compile=run_as_is)) if in_place else None
    f = model if in_place else torch.compile(model, backend=Backend(inner_compile=run_as_is))
    with pytest.warns(ApproxWarning, match=r"no graph of Tagger in 3 optimizer steps.*LSTM unless torch\._dynamo\.config\.allow_rnn") as caught:
        train(f, torch.randn(5, 3, 4))
    assert len([w for w in caught if "no graph" in str(w.message)]) == 1


def test_a_sequential_that_is_compiled_in_place() -> None:
    model = mlp(20, 8, 2)
    model.compile(backend=Backend({"method": "exact"}, inner_compile=run_as_is))
    with pytest.warns(ApproxWarning, match=r"skips a torch\.nn\.Sequential that is compiled in place; use model = torch\.compile"):
        train(model, torch.randn(8, 20))


def test_nothing_is_said_of_what_is_compiled_or_is_not_meant_to_be() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="approx: torch.compile")
        train(nn.LSTM(4, 4), torch.randn(5, 3, 4))
        for _ in range(2):  # the second model shares the code of the first
            train(torch.compile(mlp(20, 8, 2), backend=Backend({"method": "exact"}, inner_compile=run_as_is)), torch.randn(8, 20))


@torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False)
def test_the_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(20, 8, 2)
    f = torch.compile(model, backend=Backend({"method": "exact"}, inner_compile=run_as_is))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch._dynamo.utils.counters.clear()
    with pytest.warns(ApproxWarning, match="has met its limit of recompilations"):
        for size in range(2, 7):
            f(torch.randn(size, 20)).sum().backward()
        for _ in range(3):
            optimizer.step()
    torch._dynamo.utils.counters.clear()
