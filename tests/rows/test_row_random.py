"""Random numbers that select rows are a separate stream: the user's random numbers stay those of an exact run, and a resumed run repeats the uninterrupted
one."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers.oracles import ChosenRows
from helpers.rows import generator, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import approx_compile
from approx_compile import Backend
from approx_compile._torch import random_state
from approx_compile.backend import run_as_is

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


def trained(model: nn.Module, options: dict[str, Any] | None, count: int, inner: Any = run_as_is) -> tuple[Any, list[Tensor]]:
    """Train some passes with fixed weights, in which every fourth row has a gradient; return the compiled model, and the outputs of all passes."""
    f = torch.compile(model, backend=Backend(options, inner_compile=inner))
    return f, passes(f, count)


def passes(f: Any, count: int) -> list[Tensor]:
    found = []
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        out = f(torch.randn(64, 8, generator=g))
        out.backward(torch.randn(out.shape, generator=g) * (torch.arange(64) < 16)[:, None])
        found.append(out.detach())
    return found


EXACT: dict[str, Any] = {"policy": "always", "sampling": "backward", "grad": "exact"}


LEFT_OUT: dict[str, dict[str, Any]] = {
    **{method: rows(method) for method in ("bernoulli", "uniform", "wta")},
    "all rows": {"adaptive": {"ladder": (1.0,)}},
    "adaptive": {"adaptive": {"tau": 0.5}},
}


class Dropped(nn.Module):
    """A model with random numbers in the forward pass, also in a checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.3), nn.Tanh()), nn.Sequential(nn.Linear(32, 4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.first, x, use_reentrant=False)  # type: ignore[assignment]
        out: Tensor = self.last(h)
        return out


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("make", [generator, Dropped])
def test_the_users_random_stream_is_that_of_an_exact_run(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model = make()
    torch.manual_seed(5)
    _, want = trained(model, EXACT, 40)
    after = torch.rand(5)
    torch._dynamo.reset()
    torch.manual_seed(5)
    _, got = trained(model, LEFT_OUT[name], 40)
    assert torch.equal(torch.rand(5), after)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # the same masks
    assert (chosen.choices == []) == (name == "all rows")


@pytest.mark.slow
def test_dropout_masks_are_those_of_inductor() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5)), torch.randn(64, 8)
    found = []
    for backend in ("inductor", Backend(rows())):
        torch._dynamo.reset()
        torch.manual_seed(5)
        f = torch.compile(model, backend=backend)
        for _ in range(3):
            out = f(x)
            out.sum().backward()
            found.append(out == 0)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True)) and not torch.equal(found[0], found[1])


def drawn(chosen: ChosenRows, f: Any, count: int) -> list[list[int]]:
    seen = len(chosen.choices)
    g = torch.Generator().manual_seed(2)
    x, tangent = torch.randn(64, 8, generator=g), torch.rand(64, 4, generator=g)
    for _ in range(count):
        f(x).backward(tangent)
    return [idx.tolist() for idx, _ in chosen.choices[seen:]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bernoulli", "uniform", "wta"])
def test_a_seed_tells_which_rows_are_drawn(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call draws other rows every time, and the same rows after the same seed, in this model and in another one of its class."""
    chosen = ChosenRows(monkeypatch)
    f = torch.compile(generator(), backend=Backend(rows(method), inner_compile=run_as_is))
    torch.manual_seed(3)
    first = drawn(chosen, f, 4)
    assert all(a != b for a, b in itertools.combinations(first, 2))
    more = drawn(chosen, f, 4)
    assert all(a != b for a, b in zip(first, more, strict=True))
    torch.manual_seed(3)
    assert drawn(chosen, f, 4) == first and drawn(chosen, f, 4) == more
    torch.manual_seed(4)
    assert all(a != b for a, b in zip(first, drawn(chosen, f, 4), strict=True))
    torch.manual_seed(3)
    again = generator()
    with torch.no_grad():
        for p, q in zip(again.parameters(), f.parameters(), strict=True):
            p.copy_(q)
    assert drawn(chosen, torch.compile(again, backend=Backend(rows(method), inner_compile=run_as_is)), 4) == first


def test_a_stretch_of_random_numbers_of_its_own_disturbs_no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    f = torch.compile(generator(), backend=Backend(rows(), inner_compile=run_as_is))
    torch.manual_seed(3)
    want = drawn(chosen, f, 4)
    torch.manual_seed(3)
    got = drawn(chosen, f, 2)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        torch.rand(3)
    assert got + drawn(chosen, f, 2) == want


def test_torch_may_not_tell_that_it_was_seeded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that information the count of draws goes on; another seed still draws other rows."""
    monkeypatch.setattr(random_state, "_SEED_TRACKERS", [])
    chosen = ChosenRows(monkeypatch)
    f = torch.compile(generator(), backend=Backend(rows(), inner_compile=run_as_is))
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(drawn(chosen, f, 1)[0])
    assert all(a != b for a, b in itertools.combinations(found, 2))


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_draws_the_rows_of_the_uninterrupted_one(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is a number; a state that was saved without it can be loaded, too."""
    chosen = ChosenRows(monkeypatch)
    model = generator()
    f = torch.compile(model, backend=Backend(rows(), inner_compile=run_as_is))
    torch.manual_seed(3)
    drawn(chosen, f, 5)
    saved, random = copy.deepcopy((model.state_dict(), approx_compile.state_dict(f))), torch.get_rng_state()
    assert [state for own in saved[1]["controls"].values() for state in own.values()] == [{"draws": 5}]
    want = drawn(chosen, f, 3)
    torch._dynamo.reset()
    torch.manual_seed(8)
    twin = generator()
    g = torch.compile(twin, backend=Backend(rows(), inner_compile=run_as_is))
    if before:
        drawn(chosen, g, 1)
    twin.load_state_dict(saved[0])
    approx_compile.load_state_dict(g, saved[1])
    torch.set_rng_state(random)
    assert approx_compile.state_dict(g) == saved[1]
    assert drawn(chosen, g, 3) == want
    approx_compile.load_state_dict(g, {"controls": {}, "clocks": []})
    drawn(chosen, g, 1)
