"""The backward pass on all rows that is compiled for the batch's size gives the values of the one with a symbol, and is used where it may be."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from helpers.compile import ADAPTIVE
from helpers.models import ZOO, TransformerBlock, mlp
from helpers.oracles import grads
from helpers.sampling import all_but
from torch import Tensor, fx, nn

from approx_compile import Backend, _torch
from approx_compile.backend import run_as_is
from approx_compile.rows import row_compiler
from approx_compile.rows.batch_dim import BatchSize
from approx_compile.rows.controller import OBSERVE_EVERY
from approx_compile.rows.ownership import controls
from approx_compile.rows.row_backward import RowBackward, WholeBatchBackward
from approx_compile.rows.specialize import specialize_sizes

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


class Passes:
    """Record how every backward pass ran: "whole", or the numbers of rows that its stages had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Any] = []
        run, whole = RowBackward.run, RowBackward.__init__

        def counted(this: Any, values: Any, symbols: Any, counts: Any, *more: Any) -> Any:
            self.found.append(list(counts))
            return run(this, values, symbols, counts, *more)

        def noted(this: Any, *args: Any) -> None:
            given, own, rest = args[:7], args[7], args[8:]
            assert own is None or isinstance(own, WholeBatchBackward)

            def call(inputs: list[Any]) -> list[Any]:
                self.found.append("whole")
                return own.call(inputs)

            whole(this, *given, WholeBatchBackward(call, own.sizes) if own is not None else None, *rest)

        monkeypatch.setattr(RowBackward, "run", counted)
        monkeypatch.setattr(RowBackward, "__init__", noted)


ROWS = ADAPTIVE | {"grad": {"axis": "rows"}}


def compiled(model: nn.Module, options: dict[str, Any] = ROWS, inner: Any = run_as_is) -> Any:
    return torch.compile(model, backend=Backend(options, inner_compile=inner))


@pytest.mark.slow
@pytest.mark.sample(5)
@pytest.mark.parametrize("name", [n for n in ZOO if n != "dropout"])  # whose masks only Inductor draws like Inductor
def test_nothing_is_left_symbolic_and_gradients_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fx.GraphModule] = []

    def noted(*args: Any) -> Any:
        found = specialize_sizes(*args)
        assert found is not None
        made.append(found[0])
        assert not any(isinstance(v, torch.SymInt) for v in found[1])
        return found

    monkeypatch.setattr(row_compiler, "specialize_sizes", noted)
    passes = Passes(monkeypatch)
    make, data = ZOO[name]
    model, x = make(), data()
    out = model(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    expected = grads(model)
    compiled(model)(x).backward(tangent)
    (gm,) = made
    assert passes.found == ["whole"]
    inputs = gm.graph.find_nodes(op="placeholder")
    assert not any(_torch.size_expr(s).free_symbols for n in inputs for s in sizes(n.meta["val"]))
    assert not any(n.users for n in inputs if not isinstance(n.meta["val"], Tensor))
    for a, b in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(a, b)


def sizes(value: Any) -> list[Any]:
    return [*value.shape, *value.stride()] if isinstance(value, Tensor) else [value]


@pytest.mark.slow
@pytest.mark.parametrize("block", all_but(["mlp"], ["mlp", "transformer"]))
def test_through_inductor_it_is_inductors_own_pass(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    model = nn.Sequential(nn.Embedding(11, 16), TransformerBlock(16) if block == "transformer" else nn.ReLU(), nn.Linear(16, 11))
    x = torch.randint(0, 11, (24, 6))
    found = []
    for f in (compiled(model, inner=None), torch.compile(model, backend="inductor")):
        F.cross_entropy(f(x).flatten(0, 1), x.flatten()).backward()
        found.append(grads(model))
    assert passes.found == ["whole"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_another_batch_or_fewer_rows_run_with_the_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    model = mlp(20, 32, 5)
    f = compiled(model)
    for size in (64, 40, 64):
        x = torch.randn(size, 20)
        f(x).square().sum().backward()
        own = grads(model)
        model(x).square().sum().backward()
        for a, b in zip(own, grads(model), strict=True):
            torch.testing.assert_close(a, b)
    assert passes.found == ["whole", [40], "whole"]
    few = torch.zeros(64, 1)
    few[:8] = 1
    for _ in range(40 * OBSERVE_EVERY):
        (few * f(torch.randn(64, 20))).sum().backward()
    assert passes.found[3] == "whole" and passes.found[-1][0] < 64


def test_the_norms_are_watched_as_often_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control's state after some steps is that of a backward pass that always runs in stages."""
    found = []
    start = mlp(20, 32, 5)
    for without in (False, True):
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        with monkeypatch.context() as patch:
            passes = Passes(patch)
            if without:
                patch.setattr(row_compiler.RowCompiler, "_compile_whole_batch", lambda self, *args: None)
            f = compiled(model, {"policy": "adaptive", "adaptive": {"tau": 1e-9}})
            torch.manual_seed(1)
            for _ in range(3 * OBSERVE_EVERY):
                (f(torch.randn(64, 20)) * torch.rand(64, 1) ** 2).sum().backward()
        assert passes.found == [[64] if without else "whole"] * (3 * OBSERVE_EVERY)
        (control,) = controls(model).values()
        found.append(control.state_dict())
    assert found[0] == found[1] and found[0]["step"] == 3 * OBSERVE_EVERY


def test_a_cut_further_down_is_watched_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that enters the second cut is made by the first stage, so the steps that observe it run in stages, and the others as a whole."""
    passes = Passes(monkeypatch)
    model, x = mlp(20, 32, 32, 5), torch.randn(64, 20)
    f = compiled(model, ADAPTIVE | {"adaptive": {"tau": 1e-9}, "rules": [{"layers": "0", "grad": {"axis": "rows", "method": "topk"}}]})
    for _ in range(2 * OBSERVE_EVERY):
        f(x).square().sum().backward()
    assert len(controls(model)) == 2
    assert passes.found == [[64, 64], *["whole"] * (OBSERVE_EVERY - 1)] * 2


def test_a_fixed_ratio_compiles_none(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    monkeypatch.setattr(row_compiler, "specialize_sizes", lambda *args: pytest.fail("compiled for all rows"))
    model = mlp(20, 32, 5)
    compiled(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5}})(torch.randn(64, 20)).sum().backward()
    assert passes.found == [[32]]


def test_what_cannot_be_pinned_is_left(make_graph: Callable[[], tuple[fx.GraphModule, list[Any]]]) -> None:
    gm, inputs = make_graph()
    assert specialize_sizes(gm, inputs, {}) is None


@pytest.fixture
def make_graph() -> Callable[[], tuple[fx.GraphModule, list[Any]]]:
    def make() -> tuple[fx.GraphModule, list[Any]]:
        from torch.fx.experimental.proxy_tensor import make_fx

        def f(x: Tensor) -> Tensor:
            return x.view(x.shape[0] * 2, -1) / x.shape[0]

        gm = make_fx(f, tracing_mode="symbolic")(torch.randn(4, 6))
        return gm, [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]

    return make


def test_offsets_and_strides_are_kept(make_graph: Callable[[], tuple[fx.GraphModule, list[Any]]]) -> None:
    gm, (x,) = make_graph()
    sizes = {s: n for s, n in zip((_torch.size_expr(d) for d in x.shape), (4, 6), strict=True) if s.is_Symbol}
    found = specialize_sizes(gm, [x], sizes)
    assert found is not None
    new, (fixed,) = found
    assert (fixed.shape, fixed.stride(), fixed.storage_offset()) == ((4, 6), (6, 1), 0) and type(fixed) is type(x)
    given = torch.arange(24.0).view(4, 6)
    assert torch.equal(new(given), given.view(8, 3) / 4)
    shifted = _torch.fake_like(x, (3, 2), (4, 2), 5)
    assert (shifted.shape, shifted.stride(), shifted.storage_offset(), shifted.dtype) == ((3, 2), (4, 2), 5, torch.float32)


class Narrowed(nn.Module):
    """A model whose backward pass takes a size that is known only when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.e = nn.Linear(8, 16), nn.Linear(16, 4), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        k: Any = n.item()
        torch._check(k >= 1)
        torch._check(k <= 15)
        return self.b(torch.relu(self.a(x))) * self.e.narrow(0, 0, k).sin().sum()


@pytest.mark.slow
@pytest.mark.parametrize("inner", all_but([run_as_is], [run_as_is, None]))
def test_a_size_that_only_running_tells_is_not_pinned(inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    model, x = Narrowed(), torch.randn(32, 8)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        f = compiled(model, inner=inner)
        for k in (5, 7):
            f(x, torch.tensor(k)).sum().backward()
            own = grads(model)
            model(x, torch.tensor(k)).sum().backward()
            for a, b in zip(own, grads(model), strict=True):
                torch.testing.assert_close(a, b)
    assert passes.found == [[32], [32]]


class Centred(nn.Module):
    """Long sequences mix samples, so that nothing below can select rows; short ones do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h - (h.mean((0, 1), keepdim=True) if x.shape[1] > 5 else h.mean((1, 2), keepdim=True))
        return self.c(torch.tanh(self.b(h)))


@pytest.mark.slow
def test_a_cut_that_another_compilation_has_is_not_watched_here(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    model = Centred()
    rules = [{"layers": "a", "grad": {"axis": "rows", "method": "topk"}}]
    f = torch.compile(model, backend=Backend(ADAPTIVE | {"rules": rules}, inner_compile=run_as_is), dynamic=False)
    f(torch.randn(64, 4, 8)).sum().backward()
    assert [c.step for c in controls(model).values()] == [1, 1]
    for _ in range(3):
        f(torch.randn(64, 6, 8)).sum().backward()
    assert "whole" in passes.found[1:]


def test_a_fixed_ratio_beside_compiles_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_compiler, "specialize_sizes", lambda *args: pytest.fail("compiled for all rows, which are never kept"))
    passes = Passes(monkeypatch)
    model = mlp(20, 32, 5)
    f = compiled(model, ADAPTIVE | {"rules": [{"layers": "0", "grad": {"axis": "rows", "ratio": 0.5}}]})
    f(torch.randn(64, 20)).square().sum().backward()
    assert passes.found == [[64, 32]]


@pytest.mark.serial
def test_the_search_for_fewer_rows_is_short() -> None:
    s, t = sympy.symbols("s t", positive=True, integer=True)
    size = 1_000_000

    def why(symbol: Any, sizes: dict[sympy.Symbol, int], guards: list[Any], group: int = 1) -> Any:
        return row_compiler._fixed_size_reason(BatchSize(symbol, group), sizes, guards)

    start = time.perf_counter()
    assert why(s, {s: size}, []) is None
    assert why(s, {s: size}, [s > 4096]) is None
    assert why(s, {s: size}, [s >= 600_000]) is None
    assert why(s, {s: size}, [sympy.Eq(sympy.Mod(s, 400), 0)]) is None
    assert why(s, {s: 16}, [s >= 16]) is None  # a larger batch has rows to leave out
    assert why(sympy.Integer(64), {}, []) == "its compiled code is for a batch of 64 only"
    assert why(s, {s: size, t: size}, [t <= s]) == "its code assumes t <= s of the batch's size s"
    assert "of the batch's size s" in str(why(s, {s: 20}, [sympy.Eq(1 / s, sympy.Rational(1, 20))]))
    assert why(s, {s: size}, [sympy.Symbol("u") < s]) is None  # only running tells u
    assert why(s, {s: size}, [sympy.Eq(sympy.Mod(s, 4), 0)], group=4) is None
    assert time.perf_counter() - start < 5
