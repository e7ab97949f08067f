"""The method `max`: the replaced gradients equal Algorithm 1 of Wang and Nelaturu and meProp, written out in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.compile import compiled
from helpers.models import mlp
from helpers.oracles import grads, relative
from helpers.replacements import LAYOUTS, algorithm_1, compile_afresh, options, tiles
from helpers.sampling import all_but
from torch import Tensor, nn

from approx_compile.backend import run_as_is
from approx_compile.kernels.gradient_replacements import EXACT_IN_FLOAT32, Replacement, divide_whole_floats, select_entries
from approx_compile.passes.planning.gradient_replacement import smallest_useful_tile

pytestmark = pytest.mark.usefixtures("one_thread")


CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=False), (5, 3, 11)),
    "conv1d_dilated_grouped": (lambda: nn.Conv1d(6, 4, 3, padding=2, dilation=2, groups=2), (3, 6, 9)),
    "conv1d_long": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 2, 784)),
    "conv1d_indivisible": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 2, 541)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (4, 3, 7, 5)),
    "conv2d_large": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 45, 64)),
    "conv2d_rectangular": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1)), (3, 4, 11, 7)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 5, 7)),
    "conv2d_of_one": (lambda: nn.Conv2d(7, 5, 1), (1, 7, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (3, 1, 2), stride=(1, 2, 1), padding=(2, 0, 1), bias=False), (3, 2, 4, 5, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1), (3, 4, 5)),
    "transposed2d_grouped": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), dilation=(2, 1), groups=2), (2, 4, 4, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 2, 2, stride=2), (2, 3, 2, 3, 2)),
}


def conv_case(name: str, dtype: torch.dtype, channels_last: bool, j: int = 1, lowering: Any = run_as_is, tile: int | None = None) -> float:
    """Return the error of the weight gradient. Every other gradient must be the exact one."""
    make, size = CONVS[name]
    conv, x = make().to(dtype), torch.randn(size).to(dtype)
    if channels_last:
        conv, x = conv.to(memory_format=LAYOUTS[x.dim()]), x.to(memory_format=LAYOUTS[x.dim()])
    x.requires_grad_()
    y = conv(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = grads(conv, x)
    f = compile_afresh(conv, options({"method": "max"} | ({"j": j} if tile is None else {"tile": tile})), lowering)
    f(x).backward(dy)
    weight, *others = grads(conv, x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert all(relative(a, b) < tolerance for a, b in zip(others, exact[1:], strict=True))
    assert weight.dtype is dtype and places(weight) == places(exact[0])
    return relative(weight, torch.from_numpy(algorithm_1(x, dy, conv, j, tile)))


def places(x: Tensor) -> list[int]:
    return [t for s, t in zip(x.shape, x.stride(), strict=True) if s > 1]


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CONVS)
def test_max_is_algorithm_1(name: str) -> None:
    layouts = (False, True) if len(CONVS[name][1]) in LAYOUTS else (False,)
    for channels_last in layouts:
        assert conv_case(name, torch.float32, channels_last) < 1e-6
        assert conv_case(name, torch.float64, channels_last, j=3) < 1e-12
        assert conv_case(name, torch.float64, channels_last, tile=2) < 1e-12
        assert conv_case(name, torch.float32, channels_last, tile=3) < 1e-6
    assert conv_case(name, torch.bfloat16, channels_last) < 1e-2
    assert conv_case(name, torch.bfloat16, channels_last, tile=2) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels_last", "j", "tile"),
    all_but(
        [],
        [
            ("conv2d_rectangular", False, 1, None),
            *(("conv2d_large", False, 1, tile) for tile in (9, 4, 8, 16)),
            ("conv2d", True, 1, 2),
            ("conv2d_large", True, 1, 8),
            ("transposed2d_grouped", True, 2, None),
        ],
    ),
)
def test_max_through_inductor(name: str, channels_last: bool, j: int, tile: int | None) -> None:
    assert conv_case(name, torch.float32, channels_last, j, None, tile) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "f", "keys"),
    [
        (torch.bfloat16, lambda y: (y * 0.1).exp(), {"tile": 4}),
        *all_but(
            [],
            [
                (torch.float32, lambda y: (y.abs() + 0.1) ** 2.5, {"tile": 9}),
                (torch.float32, lambda y: (y.abs() + 0.1) ** 2.5, {}),
                (torch.bfloat16, lambda y: (y * 0.1).exp(), {"tile": 9}),
                (torch.bfloat16, lambda y: (y * 0.1).exp(), {}),
            ],
        ),
    ],
)
def test_max_of_a_gradient_that_nobody_else_reads(dtype: torch.dtype, f: Callable[[Tensor], Tensor], keys: dict[str, Any]) -> None:
    """Below a first layer the output gradient need not be a buffer: Inductor computes it anew wherever it is read, and not always to the same bits. The
    gradient's entries are far apart, because in bf16 an entry that is rounded earlier could else be largest elsewhere."""
    x, found = torch.randn(3, 2, 15, 16).to(dtype), list[Tensor]()
    apart = 1.1 ** torch.rand(3, 9, 13 * 14).argsort(-1).reshape(3, 9, 13, 14)
    for lowering in (run_as_is, None):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(2, 9, 3).to(dtype), Elementwise(f))
        compile_afresh(model, options({"method": "max"} | keys), lowering)(x).backward(apart.to(dtype))
        found.append(grads(model)[0].double())
    assert relative(found[1], found[0]) < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


class Elementwise(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def test_max_between_one_entry_and_all() -> None:
    """The values of a channel always have its sum, so with j = all places the result is the exact product, which then runs as it is."""
    conv, x = nn.Conv2d(3, 4, 3, bias=False), torch.randn(5, 3, 5, 4)
    dy = torch.randn(5, 4, 3, 2)
    (exact,) = torch.autograd.grad(conv(x), conv.weight, dy)
    assert relative(torch.from_numpy(algorithm_1(x, dy, conv, 6)), exact) < 1e-6
    f, _, plans = compiled(conv, options({"method": "max", "j": 6}))
    f(x).backward(dy)
    assert torch.equal(conv.weight.grad, exact)
    assert "no more than 6 entries" in plans.sites[0].reason and plans.sites[0].decision == "exact"


def max_of(conv: nn.Module, x: Tensor, dy: Tensor, **keys: Any) -> Tensor:
    conv.zero_grad()
    compile_afresh(conv, options({"method": "max"} | keys))(x).backward(dy)
    assert isinstance(conv.weight.grad, Tensor)
    return conv.weight.grad


@pytest.mark.slow
def test_ties_zeros_nan_and_scale() -> None:
    conv, x = nn.Conv2d(3, 4, 3, bias=False), torch.randn(2, 3, 6, 5)
    dy = torch.randint(0, 2, (2, 4, 4, 3)) * 2.0 - 1  # all of one magnitude: the first counts
    dy[:, 1] = 0
    dy[1, 3, 2, 1] = math.nan
    got, want = max_of(conv, x, dy), torch.from_numpy(algorithm_1(x, dy, conv)).float()
    torch.testing.assert_close(got, want, equal_nan=True)
    assert not got[1].any() and got[3].isnan().all() and got[:3].isfinite().all()
    torch.testing.assert_close(max_of(conv, x, dy[:1].expand(2, 4, 4, 3), scale=0.25)[0], 0.25 * max_of(conv, x, dy[:1].expand(2, 4, 4, 3))[0])


@pytest.mark.parametrize("length", [4, 784, 1024])
def test_ties_and_nan_however_long(length: int) -> None:
    dy = torch.randint(-3, 4, (5, 6, length)).float()
    dy[0, 1] = 0
    dy[1, 2, length // 2 :: length // 4] = math.nan
    dy[2, 3, -1], dy[2, 4, 1:3] = math.inf, -math.inf
    place, value = select_entries(dy, Replacement("max"))
    size = dy.abs().transpose(0, 1)
    assert torch.equal(place.squeeze(-1), torch.where(size.isnan(), torch.inf, size).argmax(-1).where(~size.isnan().any(-1), size.isnan().int().argmax(-1)))
    torch.testing.assert_close(value.squeeze(-1), dy.sum(-1).transpose(0, 1), equal_nan=True)


def test_division_in_floats_is_exact() -> None:
    for by in (1, 2, 3, 7, 224, 1000, 2047, 2**21 + 1):
        near = torch.arange(EXACT_IN_FLOAT32 // by - 300, EXACT_IN_FLOAT32 // by + 1).clamp(min=0) * by
        n = torch.cat([torch.arange(-5000, 5000), (near + torch.arange(-2, 3).reshape(-1, 1)).flatten()]).clamp(max=EXACT_IN_FLOAT32)
        rest, quotient = divide_whole_floats(n.float(), by)
        assert torch.equal(quotient.long(), n // by) and torch.equal(rest.long(), n % by)


@pytest.mark.slow
def test_tiles_between_the_image_and_its_places() -> None:
    """A tile as large as the image gives Algorithm 1; tiles of one place give the exact product, which then runs as it is; linear layers have no image."""
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 8, 6)
    dy = torch.randn(5, 4, 6, 4)
    assert torch.equal(max_of(conv, x, dy, tile=6), max_of(conv, x, dy, tile=60))
    assert relative(max_of(conv, x, dy, tile=6), max_of(conv, x, dy)) < 1e-6
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(96, 5))
    for tile, said in (
        (1, "max with tile 1: there are no more than 24 entries"),
        ("auto", "max, 2 of 24 entries of the output gradient, one of every tile of 4"),
        (0.5, "max, 4 of 24 entries of the output gradient, one of every tile of 3"),
        (0.4, "max, 4 of 24 entries of the output gradient, one of every tile of 3"),
    ):
        f, _, plans = compiled(model, options({"method": "max", "tile": tile}))
        f(x)
        first, last = plans.sites
        assert said in first.reason and (first.decision == "exact") == (tile == 1)
        assert "tile is for convolutions" in last.reason and last.decision == "exact"


@pytest.mark.parametrize(
    ("sizes", "tile", "entries"),
    [
        ((32, 32), 8, 16),
        ((28, 28), 7, 16),
        ((16, 16), 4, 16),
        ((8, 8), 4, 4),
        ((7, 7), 4, 4),
        ((1, 64), 4, 16),
        ((784,), 49, 16),
        ((8, 8, 8), 4, 8),
        ((0, 8), 4, 0),
    ],
)
def test_smallest_useful_tile(sizes: tuple[int, ...], tile: int, entries: int) -> None:
    assert smallest_useful_tile(sizes) == tile
    assert Replacement("max", tile=tile).entries(sizes) == entries


@pytest.mark.parametrize(
    ("shape", "tile", "channels_last"),
    [
        ((4, 3, 12), 2, False),
        ((4, 3, 9, 7), 2, False),
        ((4, 3, 9, 7), 2, True),
        ((3, 5, 21, 18), 8, False),
        ((3, 5, 21, 18), 8, True),
        ((3, 5, 27, 23), 11, True),
        ((4, 3, 9, 7), 4, False),
        ((3, 5, 15, 18), 7, False),
        ((3, 5, 21, 18), 16, False),
        ((2, 3, 37, 70), 32, False),
        ((2, 3, 4, 5, 3), 2, False),
        ((2, 3, 9, 17, 5), 12, True),
    ],
)
def test_ties_and_nan_in_tiles(shape: tuple[int, ...], tile: int, channels_last: bool) -> None:
    """Of equal magnitudes the first place of the tile counts, and NaN before all others; a tile of zeros contributes nothing, at a place inside the image."""
    dy = torch.randint(-2, 3, shape).float()
    dy[0, 1] = 0
    dy[1, 2, shape[2] // 2] = math.nan
    dy[2 % shape[0], 0, -1], dy[0, 0, 0] = math.inf, -math.inf
    dy = dy.contiguous(memory_format=LAYOUTS[dy.dim()]) if channels_last else dy
    place, value = select_entries(dy, Replacement("max", tile=tile))
    flat = dy.flatten(2)
    size = torch.where(flat.isnan(), math.nan, flat.abs())
    masks = list(tiles(shape[2:], tile))
    assert place.shape == value.shape == (shape[1], shape[0], len(masks))
    for i, own in enumerate(masks):
        inside = torch.from_numpy(own.ravel())
        first = torch.where(inside, size, -1).argmax(-1)
        assert torch.equal(place[..., i].long(), first.t())
        torch.testing.assert_close(value[..., i], flat[..., inside].sum(-1).t(), equal_nan=True)


def meprop(dy: Tensor, j: int) -> Tensor:
    """Return the output gradient with only the j largest entries of every row."""
    rows = dy.double().reshape(-1, dy.shape[-1]).numpy()
    kept = np.zeros_like(rows)
    for m, row in enumerate(rows):
        chosen = np.argsort(-np.abs(row))[:j]
        kept[m, chosen] = row[chosen]
    return torch.from_numpy(kept)


class Left(nn.Module):
    """The weight is on the left, so samples are columns; or on the right, without a transpose."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.left, self.weight = left, nn.Parameter(torch.randn(9, 7))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.t()).t() if self.left else x @ self.weight.t().contiguous()


LINEARS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 9), (13, 7)),
    "tokens": (lambda: nn.Linear(7, 9, bias=False), (3, 5, 7)),
    "left": (lambda: Left(True), (13, 7)),
    "right": (lambda: Left(False), (13, 7)),
    "of_two": (lambda: nn.Linear(7, 9), (2, 7)),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LINEARS)
def test_max_of_linear_layers_is_meprop(name: str, dtype: torch.dtype) -> None:
    make, size = LINEARS[name]
    layer, x = make().to(dtype), torch.randn(size).to(dtype).requires_grad_()
    shape = layer(x).shape
    dy = ((torch.randperm(shape.numel()) + 1) * (1 - 2 * torch.randint(2, (shape.numel(),)))).to(dtype).reshape(shape)  # no ties, exact in every dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for j in (1, 3):
        compile_afresh(layer, {"policy": "always", "output": "exact", "grad": {"method": "max", "j": j}})(x).backward(dy)
        weight, *bias, dx = grads(layer, x)
        kept = meprop(dy, j)
        assert relative(weight, kept.t() @ x.detach().double().reshape(-1, 7)) < tolerance
        assert relative(dx.reshape(-1, 7), kept @ layer.weight.detach().double()) < tolerance
        for b in bias:
            assert relative(b, dy.double().sum(0)) < tolerance


@pytest.mark.slow
def test_max_of_linear_layers_through_inductor() -> None:
    model, x = mlp(12, 5), torch.randn(9, 12, requires_grad=True)
    settings = {"policy": "always", "output": "exact", "grad_weight": {"method": "max", "j": 2}, "grad_input": {"method": "max", "j": 3}}
    found = []
    for lowering in (run_as_is, None):
        compile_afresh(model, settings, lowering)(x).square().sum().backward()
        found.append(grads(model, x))
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 1e-6
