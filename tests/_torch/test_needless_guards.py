"""What is compiled for this package has no guard on the batch's size that changes nothing, so rows of convolutional models run in any number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import rows_of
from helpers.oracles import grads, relative
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from approx_compile import Backend
from approx_compile._torch import needless_guards
from approx_compile.rows.row_backward import RowBackward

QUARTER: dict[str, Any] = {"policy": "always", "grad": {"axis": "rows", "method": "topk", "ratio": 0.25, "min_k": 2}}


# --- the convolution of fake tensors ---


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads, on which torch's choice of a backend depends."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_case(draw: random.Random) -> dict[str, Any]:
    dims = draw.choice((1, 2, 2, 2, 3))
    size = draw.choice((1, 1, 2, 3, 7 if dims < 3 else 3))
    kernel = [size] * dims if draw.random() < 0.6 else [draw.choice((1, 3)) for _ in range(dims)]
    return {
        "kernel": kernel,
        "settings": [[v] * dims for v in (draw.choice((1, 1, 2)), draw.choice((0, 1)) if max(kernel) > 1 else 0, draw.choice((1, 1, 2)))],
        "transposed": draw.random() < 0.3,
        "groups": draw.choice((1, 1, 2, 8)),
        "channels": draw.choice((8, 16)),
        "last": (draw.random() < 0.4, draw.random() < 0.4),
        "dtype": draw.choice((torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16)),
    }


def operands(case: dict[str, Any], batch: int) -> tuple[Tensor, Tensor]:
    inner = (8, case["channels"] // case["groups"]) if case["transposed"] else (case["channels"], 8 // case["groups"])
    x = torch.ones(batch, 8, *[15 if len(case["kernel"]) < 3 else 5] * len(case["kernel"]), dtype=case["dtype"])
    return tuple(channels_last(t) if last else t for t, last in zip((x, x.new_ones(*inner, *case["kernel"])), case["last"], strict=True))  # type: ignore[return-value]


def channels_last(t: Tensor) -> Tensor:
    return (
        t.transpose(1, -1).contiguous().transpose(1, -1)
        if t.dim() == 3
        else t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    )


def convolve(case: dict[str, Any], x: Tensor, weight: Tensor) -> list[Tensor]:
    """The result of a convolution and its two gradients."""
    arguments = (*case["settings"], case["transposed"], [0] * len(case["kernel"]), case["groups"])
    out = torch.ops.aten.convolution(x, weight, None, *arguments)
    return [out, *torch.ops.aten.convolution_backward(out, x, weight, None, *arguments, [True, True, False])[:2]]


def with_symbol(case: dict[str, Any], hint: int) -> tuple[Any, Any, list[Tensor]]:
    """Convolve fake tensors whose batch has a symbol; return the symbol, the guards on it and the results."""
    mode, given = FakeTensorMode(shape_env=ShapeEnv()), operands(case, hint)
    dims = [[DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (given[0].dim() - 1), [DimDynamic.STATIC] * given[1].dim()]
    fake = [mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=d)) for t, d in zip(given, dims, strict=True)]
    results = convolve(case, *fake)
    return fake[0].shape[0].node.expr, [g.expr for g in mode.shape_env.guards], results


def layout(t: Tensor, symbol: Any, n: int) -> list[tuple[int, int | None]]:
    """The sizes and strides of a tensor where the symbol stands for n, without the strides of dims of size 1."""
    pairs = [[int(v.node.expr.subs({symbol: n})) if isinstance(v, torch.SymInt) else v for v in both] for both in (t.shape, t.stride())]
    return [(size, step if size > 1 else None) for size, step in zip(*pairs, strict=True)]


@pytest.mark.usefixtures("threads")
def test_fake_convolutions_have_the_layout_of_real_ones_for_every_batch_that_the_guards_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needless_guards, "compiles_for_package", lambda: True)
    draw, free = random.Random(0), 0
    for _ in range(40):
        torch.set_num_threads(draw.choice((1, 1, 1, 2)))
        case = random_case(draw)
        symbol, guards, results = with_symbol(case, draw.choice((2, 15, 16, 40)))
        free += not guards
        for n in (2, 16):
            if all(g.subs({symbol: n}) == True for g in guards):  # noqa: E712 (sympy's truth)
                real = convolve(case, *operands(case, n))
                assert [layout(t, symbol, n) for t in results] == [layout(t, symbol, n) for t in real], (case, n)
    assert free > 35


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("hint", [8, 16])
def test_a_guard_stays_where_the_format_depends_on_the_batch(hint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needless_guards, "compiles_for_package", lambda: True)
    torch.set_num_threads(1)
    pointwise = {"settings": [[1] * 3, [0] * 3, [1] * 3], "transposed": False, "groups": 1, "channels": 8, "dtype": torch.float32}
    symbol, guards, _ = with_symbol(pointwise | {"kernel": [1, 1, 1], "last": (True, False)}, hint)
    assert guards and all((g.subs({symbol: 8}) == True) != (g.subs({symbol: 16}) == True) for g in guards)  # noqa: E712


def test_torchs_own_guards_stay_for_other_backends() -> None:
    found = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(needless_guards.compiles_for_package())
        return gm.forward

    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    run = torch.compile(depthwise, backend=backend, dynamic=True)
    run(torch.randn(16, 4, 8, 8))
    run(torch.randn(15, 4, 8, 8))
    assert found == [False, False] and not needless_guards.compiles_for_package()


@pytest.mark.parametrize("backend", ["approx", Backend()], ids=["by name", "object"])
def test_this_backend_is_known(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(Backend, "__call__", lambda self, gm, inputs, **kwargs: found.append(needless_guards.compiles_for_package()) or gm.forward)
    torch.compile(nn.Linear(4, 4), backend=backend)(torch.randn(20, 4))
    assert found == [True]


# --- models ---


class Block(nn.Module):
    """A block of ConvNeXt: a depthwise convolution, and a perceptron of the channels of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, width, 2, 2), Block(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return y


def gradients(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    """The gradients of a loss in which only each fourth sample has a weight."""
    model.zero_grad()
    weights = (torch.arange(len(x)) % 4 == 0).float()
    (F.cross_entropy(run(x), torch.arange(len(x)) % 5, reduction="none") * weights).sum().backward()
    return grads(model)


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    return relative(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in want]))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of rows that backward passes have kept."""
    counts: list[list[int]] = []
    run = RowBackward.run

    def record(self: Any, values: Any, symbols: Any, kept: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(list(kept))
        return run(self, values, symbols, kept, *args, **kwargs)

    monkeypatch.setattr(RowBackward, "run", record)
    return counts


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_work_counts")
def test_rows_of_a_convnext_through_inductor(kept: list[list[int]]) -> None:
    """16 samples of 16 x 16 pixels are 4,096 pixels, and torch compares both numbers with a threshold."""
    model = ConvNeXt()
    run = torch.compile(model, backend="approx", options=QUARTER)
    for batch in (16, 32, 8):
        x = torch.randn(batch, 3, 32, 32)
        want = gradients(model, model, x)
        assert difference(gradients(model, run, x), want) < 1e-5
    assert kept == [[4], [8], [2]]


@pytest.mark.parametrize("batch", [12, 16])
def test_rows_of_a_model_with_groups(batch: int, kept: list[list[int]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 5))
    run, _ = rows_of(model, QUARTER)
    x = torch.randn(batch, 3, 8, 8)
    want = gradients(model, model, x)
    assert difference(gradients(model, run, x), want) < 1e-5
    assert kept == [[batch // 4]]
