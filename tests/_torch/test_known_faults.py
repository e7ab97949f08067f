"""This torch has the faults that the table names, and nothing that is compiled by this package shows them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import grads, relative
from helpers.sampling import all_but
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomSchedulerPass
from torch._inductor.utils import fresh_cache

from approx_compile import Backend, _torch
from approx_compile._torch import known_faults
from approx_compile._torch.known_faults import FAULTS, PASS, guarded
from approx_compile.utils import ApproxWarning

HAS = {f.name: f.in_version(torch.__version__) for f in FAULTS}
faulty = pytest.mark.skipif(not HAS["lost_order"], reason="this torch does not have the fault")
EXACT = {"policy": "always", "method": "exact"}
ALL_ROWS = {"policy": "adaptive", "adaptive": {"tau": 1e-9}}
NO_SORTING = {"reorder_for_peak_memory": False}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Run with two threads; with one, Inductor generates other code for a scatter."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- the table ---


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_shows_where_the_table_says(fault: Any) -> None:
    """If a fault does not show, the range of versions in the table is wrong: narrow or widen it."""
    assert fault.shows({}) == HAS[fault.name], f"{fault.name} on torch {torch.__version__}: the table says {fault.since} to {fault.until}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_the_guard_avoids_it(fault: Any) -> None:
    assert not fault.shows(guarded({}))


def test_versions() -> None:
    (fault,) = FAULTS
    assert [v for v in ("2.10.0", "2.11.0", "2.12.1", "2.13.0+cpu", "2.13.0a0+git1", "2.14.0", "2.15.0", "3.0.0", "unknown") if fault.in_version(v)] == [
        "2.11.0",
        "2.12.1",
        "2.13.0+cpu",
        "2.13.0a0+git1",
    ]


def test_other_versions_get_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    assert guarded({"max_autotune": True}) == {"max_autotune": True}


# --- orders that the scheduler's nodes keep ---


def places(rows: int, columns: int) -> Tensor:
    return torch.stack([torch.randperm(columns)[: columns // 4] for _ in range(rows)])


def added_to_zeros(mask: Tensor, idx: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(mask.shape[0] * mask.shape[1], mask.shape[2] * mask.shape[3]).scatter_add(1, idx, x.sin())


def overwritten(mask: Tensor, idx: Tensor, x: Tensor) -> Tensor:
    return torch.ones(mask.shape[0] * mask.shape[1], mask.shape[2] * mask.shape[3]).cos().scatter(1, idx, x.sin())


def put_in_place(mask: Tensor, idx: Tensor, x: Tensor) -> Tensor:
    made = torch.ones(mask.shape[0] * mask.shape[1], mask.shape[2] * mask.shape[3]).cos()
    made[torch.arange(len(idx))[:, None], idx] += x.sin()
    return made


def behind_a_product(mask: Tensor, idx: Tensor, x: Tensor) -> Tensor:
    return added_to_zeros(mask, idx, x @ x.t() @ x)


WRITES = [added_to_zeros, overwritten, put_in_place, behind_a_product]


def reads(write: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Loops that read what another loop wrote, in two layouts, beside loops that may run before it."""

    def run(mask: Tensor, idx: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        before = torch.where(mask, 2.0, 3.0)
        after = torch.where(mask, 0.0, write(mask, idx, x).view(mask.shape))
        return before, after, (before + after).contiguous(memory_format=torch.channels_last)

    return run


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    return torch.rand(4, 8, 12, 12) < 0.5, places(32, 144), torch.randn(32, 36)


def off(got: Any, want: Any) -> float:
    return max(relative(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.sample(4)
@pytest.mark.parametrize("options", [{}, NO_SORTING], ids=["", "not sorted for memory"])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_what_is_written_in_place_is_read_after(write: Callable[..., Tensor], options: dict[str, Any], tensors: tuple[Tensor, ...]) -> None:
    f = reads(write)
    with torch.no_grad():
        assert off(torch.compile(f, backend="approx", options={"inductor": options})(*tensors), f(*tensors)) < 1e-6


@pytest.mark.slow
@pytest.mark.exhaustive
@faulty
def test_without_the_guard_some_are_read_before(tensors: tuple[Tensor, ...]) -> None:
    """Without the guard some values are read before they are written, whether or not Inductor sorts loops to save memory."""

    def wrong(write: Callable[..., Tensor], options: dict[str, Any]) -> bool:
        torch._dynamo.reset()
        f = reads(write)
        return off(torch.compile(f, backend="inductor", options=options)(*tensors), f(*tensors)) > 0.01

    assert wrong(overwritten, {}) and wrong(overwritten, NO_SORTING) and wrong(added_to_zeros, NO_SORTING)


@pytest.mark.slow
def test_symbolic_sizes(tensors: tuple[Tensor, ...]) -> None:
    f = reads(overwritten)
    run = torch.compile(f, backend="approx", options={"inductor": NO_SORTING}, dynamic=True)
    with torch.no_grad():
        assert off(run(*tensors), f(*tensors)) < 1e-6


# --- the networks that people have ---

ACTIVATIONS = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "sigmoid": nn.Sigmoid}
"""In front of a pooling whose ReLU's mask `passes.pooling` moves, and two which it leaves."""


def two_convolutions(activation: Callable[[], nn.Module]) -> nn.Module:
    """A small version of the MNIST network of pytorch/examples."""
    convolutions = [nn.Conv2d(1, 4, 3), activation(), nn.Conv2d(4, 8, 3), activation(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(128, 10))


def two_poolings(activation: Callable[[], nn.Module]) -> nn.Module:
    first = [nn.Conv2d(1, 4, 3, padding=1), activation(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(4, 8, 3, padding=1), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 256), nn.ReLU(), nn.Linear(256, 10))


def gradients(model: nn.Module, run: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(run(x), y).backward()
    return grads(model)


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 1, 12, 12), torch.randint(10, (size,))


@pytest.mark.slow
@pytest.mark.exhaustive
@faulty
def test_plain_inductor_gets_them_wrong() -> None:
    """Plain Inductor has the fault that the tests below would show without the guard; Inductor as the baseline of the benchmarks does not have it."""
    model, (x, y) = two_convolutions(nn.LeakyReLU), batch(8)
    want = gradients(model, model, x, y)
    assert off(gradients(model, torch.compile(model, backend="inductor"), x, y), want) > 0.99
    torch._dynamo.reset()
    assert off(gradients(model, torch.compile(model, backend=known_faults.inductor), x, y), want) < 1e-5


CASES = [(two_convolutions, "sigmoid", 8), (two_poolings, "leaky", 16)]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name", "size"), all_but(CASES[:1], CASES))
def test_gradients_are_eagers(make: Callable[..., nn.Module], name: str, size: int) -> None:
    model, (x, y) = make(ACTIVATIONS[name]), batch(size)
    want = gradients(model, model, x, y)
    assert off(gradients(model, torch.compile(model, backend="approx", options=EXACT), x, y), want) < 1e-5


@pytest.mark.slow
def test_disabled(tensors: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPROX_COMPILE_DISABLE", "1")
    f = reads(overwritten)
    with torch.no_grad():
        assert off(torch.compile(f, backend="approx", options={"inductor": NO_SORTING})(*tensors), f(*tensors)) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("small_work_counts")
@pytest.mark.parametrize("name", all_but(["leaky"], ["relu", "leaky"]))
def test_stages_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows whose loss has weight 0 are left out, so the stages must compute eager's gradients, and all their code must be guarded."""
    guards, real = [], _torch.compile_graph

    def compile_graph(*args: Any, **kwargs: Any) -> Any:
        guards.append(getattr(torch._inductor.config, PASS))
        return real(*args, **kwargs)

    monkeypatch.setattr(_torch, "compile_graph", compile_graph)
    model, (x, y) = two_convolutions(ACTIVATIONS[name]), batch(32)
    weights = (torch.arange(32) % 2 == 0).float()

    def step(run: Any) -> list[Tensor]:
        model.zero_grad()
        (F.cross_entropy(run(x), y, reduction="none") * weights).sum().backward()
        return grads(model)

    want = step(model)
    rows = {"policy": "always", "grad": {"axis": "rows", "method": "topk", "ratio": 0.5}}
    assert off(step(torch.compile(model, backend="approx", options=rows)), want) < 1e-5
    assert len(guards) >= 2 and (not HAS["lost_order"] or all(FAULTS[0].guard.uuid() in g.uuid() for g in guards))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("small_work_counts")
def test_adaptive_rows_that_keep_all() -> None:
    model, (x, y) = two_convolutions(nn.LeakyReLU), batch(32)
    want = gradients(model, model, x, y)
    run = torch.compile(model, backend="approx", options=ALL_ROWS)
    for _ in range(2):
        assert off(gradients(model, run, x, y), want) < 1e-5


# --- the cache, the user's own pass, the warning ---


@pytest.mark.slow
@faulty
def test_no_graph_of_an_unguarded_compilation_comes_from_the_cache(tensors: tuple[Tensor, ...]) -> None:
    f, keys = reads(overwritten), ("fxgraph_cache_hit", "fxgraph_cache_miss")
    want = f(*tensors)

    def run(backend: Any, **kwargs: Any) -> tuple[float, list[int]]:
        torch._dynamo.reset()
        counters.clear()
        return off(torch.compile(f, backend=backend, **kwargs)(*tensors), want), [counters["inductor"][k] for k in keys]

    with fresh_cache(), torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        wrong, found = run("inductor", options=NO_SORTING)
        assert wrong > 0.01 and found == [0, 1]
        for hits, misses in ((0, 1), (1, 0)):
            right, found = run("approx", options={"inductor": NO_SORTING})
            assert right < 1e-6 and found == [hits, misses]


class Counts(CustomSchedulerPass):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, nodes: list[Any]) -> list[Any]:
        self.calls += 1
        return nodes

    def uuid(self) -> str:
        return "counts"


@pytest.mark.slow
@pytest.mark.sample(2)
@faulty
@pytest.mark.parametrize("where", ["options", "torch's config"])
@pytest.mark.parametrize("named", [True, False], ids=["with a uuid", "a function"])
def test_a_pass_of_the_users_runs_too(where: str, named: bool, tensors: tuple[Tensor, ...]) -> None:
    theirs = Counts()
    given = theirs if named else lambda nodes: theirs(nodes)
    f = reads(overwritten)
    in_config = {"force_disable_caches": True} | ({PASS: given} if where != "options" else {})
    with torch.no_grad(), torch._inductor.config.patch(in_config):
        options = NO_SORTING | ({PASS: given} if where == "options" else {})
        got = torch.compile(f, backend="approx", options={"inductor": options})(*tensors)
    assert theirs.calls == 1 and off(got, f(*tensors)) < 1e-6
    combined = guarded({PASS: given})[PASS]
    assert isinstance(combined, CustomSchedulerPass) == named  # Inductor caches nothing that a pass without a uuid has touched
    assert not named or "counts" in combined.uuid()


def said(f: Callable[..., Any], *args: Any) -> list[str]:
    """Return the warnings of a compilation without caches."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as found, torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        warnings.simplefilter("always")
        torch.compile(f, backend=Backend())(*args)
    return [str(w.message) for w in found if issubclass(w.category, ApproxWarning)]


@pytest.mark.slow
@faulty
def test_one_warning_where_a_graph_has_it(tensors: tuple[Tensor, ...]) -> None:
    assert said(lambda *given: overwritten(*given), *tensors) == []  # nothing reads what is written
    (text,) = said(reads(overwritten), *tensors)
    assert torch.__version__ in text and "APPROX_COMPILE_DISABLE=1" in text
    assert said(reads(added_to_zeros), *tensors) == []
