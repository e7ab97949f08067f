"""Replaced gradients: Algorithm 1 of Wang and Nelaturu and meProp written out in numpy, zeros and random numbers, and what they leave alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Plans, compiled, rows_of
from helpers.models import mlp
from helpers.oracles import ChosenRows, grads, relative, spread
from torch import Tensor, fx, nn

from approx_compile import Backend, explain
from approx_compile.backend import run_as_is
from approx_compile.kernels.gradient_replacements import EXACT_IN_FLOAT32, Replacement, divide_whole_floats, select_entries
from approx_compile.passes.planning.gradient_replacement import smallest_useful_tile

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def options(grad_weight: Any, **more: Any) -> dict[str, Any]:
    """An exact forward pass, this weight gradient."""
    return {"policy": "always", "output": "exact", "grad_weight": grad_weight} | more


def run(model: Any, settings: dict[str, Any], lowering: Any = run_as_is) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(settings, inner_compile=lowering))


def algorithm_1(x: Tensor, dy: Tensor, conv: Any, j: int = 1, tile: int | None = None) -> np.ndarray:
    """The weight gradient by loops over channels, samples and taps, in double precision; with `tile`, the algorithm on every tile of a channel by itself."""
    image, gradient = x.detach().double().numpy(), dy.detach().double().numpy()
    df = np.zeros(conv.weight.shape)
    rank, groups = image.ndim - 2, conv.groups
    inputs, outputs = image.shape[1] // groups, gradient.shape[1] // groups
    for c, n, own in itertools.product(range(gradient.shape[1]), range(image.shape[0]), tiles(gradient.shape[2:], tile)):
        plane = np.where(own, gradient[n, c], 0).ravel()
        chosen = [np.argmax(np.where(own.ravel(), np.abs(plane), -1))] if j == 1 else np.argsort(-np.abs(plane))[:j]
        share = (plane.sum() - plane[chosen].sum()) / j
        channels = slice((c // outputs) * inputs, (c // outputs + 1) * inputs)
        for p, tap in itertools.product(chosen, itertools.product(*map(range, conv.kernel_size))):
            value = plane.sum() if j == 1 else plane[p] + share
            place = np.unravel_index(p, gradient.shape[2:])
            pixel = [_pixel(int(place[d]), tap[d], d, conv) for d in range(rank)]
            if all(i is not None and 0 <= i < image.shape[2 + d] for d, i in enumerate(pixel)):
                seen = image[(n, channels, *pixel)] * value
                if conv.transposed:
                    df[(channels, c % outputs, *tap)] += seen
                else:
                    df[(c, slice(None), *tap)] += seen
    return df


def tiles(size: tuple[int, ...], tile: int | None) -> Iterator[np.ndarray]:
    """Masks of the tiles of an image; None: of the image as one."""
    steps = [range(0, s, tile or s) for s in size]
    for corner in itertools.product(*steps):
        mask = np.zeros(size, dtype=bool)
        mask[tuple(slice(c, c + (tile or s)) for c, s in zip(corner, size, strict=True))] = True
        yield mask


def _pixel(place: int, tap: int, d: int, conv: Any) -> int | None:
    stride, padding, dilation = conv.stride[d], conv.padding[d], conv.dilation[d]
    if not conv.transposed:
        return place * stride + tap * dilation - padding
    spread = place + padding - tap * dilation
    return spread // stride if spread % stride == 0 else None


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
    """The weight gradient's error; every other gradient is the exact one."""
    make, size = CONVS[name]
    conv, x = make().to(dtype), torch.randn(size).to(dtype)
    if channels_last:
        conv, x = conv.to(memory_format=LAYOUTS[x.dim()]), x.to(memory_format=LAYOUTS[x.dim()])
    x.requires_grad_()
    y = conv(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = grads(conv, x)
    f = run(conv, options({"method": "max"} | ({"j": j} if tile is None else {"tile": tile})), lowering)
    f(x).backward(dy)
    weight, *others = grads(conv, x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert all(relative(a, b) < tolerance for a, b in zip(others, exact[1:], strict=True))
    assert weight.dtype is dtype and places(weight) == places(exact[0])
    return relative(weight, torch.from_numpy(algorithm_1(x, dy, conv, j, tile)))


def places(x: Tensor) -> list[int]:
    return [t for s, t in zip(x.shape, x.stride(), strict=True) if s > 1]


@pytest.mark.slow
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
def test_max_through_inductor() -> None:
    assert conv_case("conv2d_rectangular", torch.float32, False, lowering=None) < 1e-6
    assert conv_case("conv2d_large", torch.float32, False, lowering=None, tile=9) < 1e-6
    for tile in (4, 8, 16):
        assert conv_case("conv2d_large", torch.float32, False, lowering=None, tile=tile) < 1e-6
    assert conv_case("conv2d", torch.float32, True, lowering=None, tile=2) < 1e-6
    assert conv_case("conv2d_large", torch.float32, True, lowering=None, tile=8) < 1e-6
    assert conv_case("transposed2d_grouped", torch.float32, True, j=2, lowering=None) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "f", "keys"),
    [
        (torch.float32, lambda y: (y.abs() + 0.1) ** 2.5, {"tile": 9}),
        (torch.float32, lambda y: (y.abs() + 0.1) ** 2.5, {}),
        (torch.bfloat16, lambda y: (y * 0.1).exp(), {}),
        (torch.bfloat16, lambda y: (y * 0.1).exp(), {"tile": 9}),
        (torch.bfloat16, lambda y: (y * 0.1).exp(), {"tile": 4}),
    ],
)
def test_max_of_a_gradient_that_nobody_else_reads(dtype: torch.dtype, f: Callable[[Tensor], Tensor], keys: dict[str, Any]) -> None:
    """Below a first layer the output gradient need not be a buffer: then Inductor computes it anew wherever it is read, and not always to the same bits.
    The gradient's entries are far apart: in bf16 what is rounded earlier would else be largest elsewhere."""
    x, found = torch.randn(3, 2, 15, 16).to(dtype), list[Tensor]()
    apart = 1.1 ** torch.rand(3, 9, 13 * 14).argsort(-1).reshape(3, 9, 13, 14)
    for lowering in (run_as_is, None):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(2, 9, 3).to(dtype), Elementwise(f))
        run(model, options({"method": "max"} | keys), lowering)(x).backward(apart.to(dtype))
        found.append(grads(model)[0].double())
    assert relative(found[1], found[0]) < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


class Elementwise(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def test_max_between_one_entry_and_all() -> None:
    """The values of a channel always have its sum, so j = all the places is the exact product (and left to it)."""
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
    run(conv, options({"method": "max"} | keys))(x).backward(dy)
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
    """A tile as large as the image is Algorithm 1; tiles of one place are the exact product, and left to it; linear layers have no image."""
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
    """Of equal magnitudes the first place of the tile counts, NaN before all; a tile of zeros has nothing to give, at a place inside the image."""
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
    """The output gradient with the j largest entries of every row only."""
    rows = dy.double().reshape(-1, dy.shape[-1]).numpy()
    kept = np.zeros_like(rows)
    for m, row in enumerate(rows):
        chosen = np.argsort(-np.abs(row))[:j]
        kept[m, chosen] = row[chosen]
    return torch.from_numpy(kept)


class Left(nn.Module):
    """The weight on the left: samples are columns. Or on the right, without a transpose."""

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LINEARS)
def test_max_of_linear_layers_is_meprop(name: str, dtype: torch.dtype) -> None:
    make, size = LINEARS[name]
    layer, x = make().to(dtype), torch.randn(size).to(dtype).requires_grad_()
    shape = layer(x).shape
    dy = ((torch.randperm(shape.numel()) + 1) * (1 - 2 * torch.randint(2, (shape.numel(),)))).to(dtype).reshape(shape)  # no ties, exact in every dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for j in (1, 3):
        run(layer, {"policy": "always", "output": "exact", "grad": {"method": "max", "j": j}})(x).backward(dy)
        weight, *bias, dx = grads(layer, x)
        kept = meprop(dy, j)
        assert relative(weight, kept.t() @ x.detach().double().reshape(-1, 7)) < tolerance
        assert relative(dx.reshape(-1, 7), kept @ layer.weight.detach().double()) < tolerance
        for b in bias:
            assert relative(b, dy.double().sum(0)) < tolerance


@pytest.mark.slow
def test_max_of_linear_layers_through_inductor() -> None:
    model, x = mlp(12, 20, 5), torch.randn(9, 12)
    settings = {
        "policy": "always",
        "output": "exact",
        "rules": [{"layers": "0", "grad": {"method": "max", "j": 2}}, {"layers": "2", "grad_input": {"method": "max", "j": 3}}],
    }
    found = []
    for lowering in (run_as_is, None):
        run(model, settings, lowering)(x).square().sum().backward()
        found.append(grads(model))
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 1e-6


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 6))


class Saved:
    """An `inner_compile` that notes what the forward pass saves, and the products of the backward graph."""

    def __init__(self) -> None:
        self.bytes, self.products = 0, 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, *, is_backward: bool = False, **kwargs: Any) -> Any:
        if is_backward:
            saved = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder") if "tangents" not in n.name and "primals" not in n.name]
            self.bytes = sum(v.numel() * v.dtype.itemsize for v in saved)
            masks = [n.args[10] for n in gm.graph.nodes if n.target is aten.convolution_backward.default]
            self.products = sum(m[0] + m[1] for m in masks) + sum(n.target in (aten.mm.default, aten.addmm.default) for n in gm.graph.nodes)
            assert not any(m[2] and not m[1] for m in masks)  # a bias alone would cost as much as the weight on CPUs
        return run_as_is(gm)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", [run_as_is, None])
def test_zero_is_gone_with_the_activation_it_kept(lowering: Any) -> None:
    model, x = cnn(), torch.randn(16, 3, 12, 12)
    exact, zero = Saved(), Saved()
    run(model, {"method": "exact"}, exact)(x).square().sum().backward()
    want = grads(model)
    rule = {"layers": ["2", "3", "5"], "output": "exact", "grad_weight": "zero"}
    settings = {"policy": "always", "rules": [{"layers": "site", "output": "exact"}, rule]}
    run(model, settings, zero)(x).square().sum().backward()
    grads(model)
    run(model, settings, lowering)(x).square().sum().backward()
    names = [n for n, _ in model.named_parameters()]
    for name, got, expected in zip(names, grads(model), want, strict=True):
        if name in ("2.weight", "3.weight", "5.weight"):
            assert torch.equal(got, torch.zeros_like(expected))
        else:
            assert relative(got, expected) < 1e-5
    assert zero.products == exact.products - 3
    assert exact.bytes - zero.bytes == 4 * 16 * (8 * 64 + 36)  # two of the three inputs; a ReLU's backward reads the other (on CPUs its mask is worse)


def test_zero_under_optimizers() -> None:
    def after(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 4), torch.randn(8, 6)
        before = layer.weight.detach().clone()
        optimizer = make(list(layer.parameters()))
        run(layer, options("zero"))(x).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        assert norm > 1 and relative(norm, 2 * layer(x).detach().sum(0).norm()) < 1e-5  # the bias alone counts
        optimizer.step()
        return before, layer.weight.detach()

    before, now = after(lambda p: torch.optim.Adam(p, lr=0.1))
    assert torch.equal(before, now)  # no moments yet
    before, now = after(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    torch.testing.assert_close(now, before * (1 - 0.1 * 0.5))
    before, now = after(lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5))
    torch.testing.assert_close(now, before - 0.1 * before.sign(), atol=1e-5, rtol=1e-5)  # decay is all its gradient: a whole step


def test_zero_with_moments_coasts() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    run(layer, options("zero"))(x).square().sum().backward()
    optimizer.step()
    assert (layer.weight.detach() - before).abs().min() > 0.01


@pytest.mark.parametrize("lowering", [run_as_is, None])
def test_random_is_normal_and_comes_from_the_seed(lowering: Any) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 40)), torch.randn(25, 16, 6, 6)
    f = run(model, options("random") | {"rules": [{"layers": "3", "grad_weight": {"method": "random", "std": 0.5}}]}, lowering)

    def step() -> list[Tensor]:
        f(x).sum().backward()
        return grads(model)

    torch.manual_seed(5)
    first, second = step(), step()
    torch.manual_seed(5)
    again = step()
    model(x).sum().backward()
    exact = grads(model)
    for i, std in ((0, 1 / 25), (2, 0.5)):
        n = first[i].numel()
        assert torch.equal(first[i], again[i]) and (first[i] - second[i]).std() > std
        assert first[i].mean().abs() < 4 * std / n**0.5 and (first[i].std() / std - 1).abs() < 4 / (2 * n) ** 0.5
        assert relative(first[i + 1], exact[i + 1]) < 1e-5  # the bias


def test_composes_with_a_sampled_output() -> None:
    model, x = nn.Conv2d(8, 6, 3, bias=False), torch.randn(3, 8, 7, 5, requires_grad=True)
    dy = torch.randn(3, 6, 5, 3)
    f, choices, plans = compiled(model, {"policy": "always", "ratio": 0.5, "min_k": 2, "grad_weight": "max"})
    y = f(x)
    y.backward(dy)
    weight, dx = grads(model, x)
    idx = choices[f"{plans.sites[0].name}.output.idx"]
    sampled = F.conv2d(x[:, idx], model.weight[:, idx])
    assert relative(y, sampled) < 1e-6 and relative(dx, torch.autograd.grad(sampled, x, dy)[0]) < 1e-6
    assert relative(weight, torch.from_numpy(algorithm_1(x, dy, model))) < 1e-6
    assert [p.decision for p in plans.sites[0].products] == ["sampled", "coupled", "replaced"]


def test_zeros_of_later_sites_leave_replacements_alone() -> None:
    """The layer below a sampled one skips the channels that were dropped; a replaced product has none to skip."""
    model, x = mlp(24, 32, 40, 5), torch.randn(64, 24)
    f, _, plans = compiled(
        model, {"policy": "always", "min_k": 4, "rules": [{"layers": "0", "grad_weight": {"method": "max", "j": 40}}, {"layers": "2", "grad_weight": "zero"}]}
    )
    f(x).square().sum().backward()
    got = grads(model)
    assert not got[2].any() and got[0].any()
    assert all(p.skips is None for s in plans.sites for p in s.products if p.decision == "replaced")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "images"), [*itertools.product(("zero", "random", "max"), (False, True)), ("tile", True)])
def test_beside_rows_of_the_batch(method: str, images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go on past a replaced gradient, which is that of the output gradient with the dropped rows at zero."""
    model, x = (cnn(), torch.randn(36, 3, 12, 12)) if images else (mlp(12, 20, 20, 5), torch.randn(36, 12))
    layers = ["2", "3"] if images else ["2"]
    chosen = ChosenRows(monkeypatch)
    tables = {"max": {"method": "max", "j": 2}, "tile": {"method": "max", "tile": 4}}
    rules = [{"layers": layers, "grad_weight": tables.get(method, method)}]
    f, plans = rows_of(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5, "method": "topk"}, "rules": rules})
    torch.manual_seed(7)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    assert [c.decision for c in plans[0].cuts] == ["rows"]
    g = run(model, {"policy": "always", "rules": [{"layers": "site", "output": "exact"}, *rules]})
    g(x).backward(tangent * spread(chosen.mask(36), tangent))
    for name, a, b in zip((n for n, _ in model.named_parameters()), got, grads(model), strict=True):
        if method == "random" and name in [f"{layer}.weight" for layer in layers]:
            assert a.std() > 0 and (a.std() * 36 - 1).abs() < 0.2
        else:
            assert relative(a, b) < 1e-5, name


@pytest.mark.slow
def test_a_batch_of_any_size() -> None:
    model, settings = cnn(), options({"method": "max", "j": 2}, rules=[{"layers": "3", "grad_weight": "zero"}])
    f, _, plans = compiled(model, settings)
    for size in (4, 9):
        x = torch.randn(size, 3, 12, 12)
        torch._dynamo.mark_dynamic(x, 0)
        f(x).square().sum().backward()
        got = grads(model)
        torch.compile(model, backend=Backend(settings, inner_compile=run_as_is), dynamic=False)(x).square().sum().backward()
        assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
    assert len(plans) == 1 and [s.products[-1].decision for s in plans.sites] == ["replaced"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero", "random", "max"])
@pytest.mark.parametrize("lowering", [run_as_is, None])
def test_an_empty_batch_has_no_gradient(method: str, lowering: Any) -> None:
    """At once, and after others: code for a batch of any size is for at least two."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    f = run(model, options(method), lowering)
    for size in (0, 6, 4, 0):
        f(torch.randn(size, 3, 6, 6)).sum().backward()
        found = grads(model)
        assert all(bool(g.any()) is (size > 0 and not (method == "zero" and g.dim() > 1)) for g in found)


def test_images_of_any_size() -> None:
    model, settings = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), options("max", rules=[{"layers": "2", "grad_weight": "zero"}])
    f, _, plans = compiled(model, settings, dynamic=True)
    x = torch.randn(4, 3, 9, 8)
    f(x).square().sum().backward()
    got = grads(model)
    model(x).square().sum().backward()
    exact = grads(model)
    assert "dynamic size" in plans.sites[0].reason and not got[2].any()
    assert all(relative(got[i], exact[i]) < 1e-5 for i in (0, 1, 3))


@pytest.mark.slow
def test_obeyed_under_every_policy_with_the_reason() -> None:
    model, x = cnn(), torch.randn(4, 3, 12, 12)
    for policy in ("cost", "always", "adaptive"):
        rule = {"layers": ["conv", "linear"], "output": "exact", "grad_input": "exact", "grad_weight": "max"}
        report = explain(model, x, config={"policy": policy, "rules": [rule]})
        assert [s.products["grad_weight"].decision for s in report.sites] == ["replaced"] * 4
        assert all("grad_weight: max" in s.reason for s in report.sites)
        assert all(p.decision != "sampled" for s in report.sites for p in s.products.values())
    assert [(s.k, s.size) for s in report.sites] == [(1, 100), (1, 64), (1, 9), (1, 6)]
    assert all(s.flops_sampled < s.flops_exact for s in report.sites)
    zero = explain(model, x, config=options("zero")).sites[1].products["grad_weight"]
    assert (zero.decision, zero.method, zero.flops_sampled) == ("replaced", "zero", 0)


@pytest.mark.slow
def test_what_can_not_be_replaced_is_exact_with_the_reason() -> None:
    def reason(model: Any, settings: dict[str, Any], *args: Tensor) -> str:
        plans = Plans()
        torch._dynamo.reset()
        torch.compile(model, backend=Backend(settings, inner_compile=run_as_is, on_plan=plans))(*args)
        assert plans.sites[0].decision == "exact"
        return str(plans.sites[0].reason)

    a, b = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    assert "products with a weight" in reason(torch.bmm, options("exact", grad_input="max"), a, b)
    image = torch.randn(2, 3, 5, 5, requires_grad=True)
    assert "linear layers" in reason(nn.Conv2d(3, 4, 3), options("exact", grad_input="max"), image)

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, a: Tensor) -> Tensor:
            return torch.bmm(a, self.weight)

    assert "batched" in reason(Batched(), options("max"), a)
    model = Batched()
    run(model, options("zero"))(a).sum().backward()
    assert model.weight.grad is not None and not model.weight.grad.any()
