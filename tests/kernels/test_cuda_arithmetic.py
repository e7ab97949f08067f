"""The arithmetic of the CUDA C++ sources, run on the CPU by a version of the device in which a block's threads take turns (cuda_cpu/device.cuh),
against the same products in fp64. Every case runs with the turns in both orders: threads that miss a barrier give two results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_on_cpu import COMPILER, runs
from torch import Tensor

from approx_compile.kernels.cuda import launch
from approx_compile.kernels.cuda.launch import TILES, LaunchOptions
from approx_compile.kernels.gradient_replacements import ConvGeometry, Replacement
from approx_compile.kernels.gradient_replacements import max_conv_weight as reference

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="the kernels' sources are built for the CPU by g++, which is not installed"),
    pytest.mark.usefixtures("one_thread"),
]
EPS = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """Let torch.empty return NaN, so that an entry that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_both_orders(product: Callable[[Any], Tensor]) -> Tensor:
    y = product(runs(backwards=False))
    torch.testing.assert_close(product(runs(backwards=True)), y, rtol=0, atol=0, equal_nan=True)
    return y


def guarded(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False, device: str = "cpu") -> Tensor:
    """Return (rows, columns) whose lines begin at whole 16 bytes, surrounded by NaN."""
    r, c = (columns, rows) if transposed else (rows, columns)
    around = torch.full((r + 2, -(-c // 8) * 8 + 16), NAN, dtype=dtype, device=device)
    inner = around[1:-1, 8 : 8 + c]
    inner.copy_(torch.randn(r, c))
    return inner.t() if transposed else inner


def close(y: Tensor, expected: Tensor, terms: Tensor | float = 1.0) -> None:
    """Compare up to two roundings of the result and the rounding of the accumulator's terms."""
    assert y.isfinite().equal(expected.isfinite())
    error = (y.double() - expected).abs()[expected.isfinite()]
    allowed = (2 * EPS[y.dtype] * expected.abs() + 1e-5 * terms)[expected.isfinite()]
    assert (error <= allowed).all(), (error - allowed).max()


# skip_matmul


def spread(idx: Tensor, unit: int) -> Tensor:
    return (idx[:, None] * unit + torch.arange(unit)).flatten()


def product64(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None) -> Tensor:
    at = spread(idx, unit)
    factor = torch.ones(len(at)) if scale is None else scale.repeat_interleave(unit)
    y = (a.double()[:, at] * factor) @ b.double()[at]
    return y if bias is None else y + bias.double()


def into64(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int) -> Tensor:
    at = spread(idx, unit)
    factor = torch.ones(len(at)) if scale is None else scale.repeat_interleave(unit)
    shape = (-1, 1) if dim == 0 else (1, -1)
    whole = a.double() @ b.double()
    return torch.zeros_like(whole).index_copy(dim, at, whole.index_select(dim, at) * factor.double().reshape(shape))


LAYOUTS = list(itertools.product((False, True), repeat=2))
LEAST = TILES[-1]


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("at", range(4))
def test_skip(at: int, scaled: bool) -> None:
    tile, (a_t, b_t), dtype = TILES[at], LAYOUTS[at], (torch.float16, torch.bfloat16)[at % 2 ^ scaled]
    m, n = (136, 96) if at in (1, 2) else (135, 93)  # whole chunks of 8 on the contiguous axes, or not
    a, b = guarded(m, 112, dtype, a_t), guarded(112, n, dtype, b_t)
    assert launch.supports_matmul(a, b, 16)
    scale, bias = (torch.tensor([0.5, 3.0, 0.0]) if scaled else None), torch.randn(n).to(dtype)
    idx = torch.tensor([0, 3, 6])
    y = in_both_orders(lambda run: launch.skip_matmul(a, b, idx, scale, 16, bias, LaunchOptions(run, tile)))
    close(y, product64(a, b, idx, scale, 16, bias), terms=30)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("at", range(4))
def test_skip_into(at: int, dim: int) -> None:
    tile, (a_t, b_t), dtype = TILES[at], LAYOUTS[3 - at], (torch.float16, torch.bfloat16)[at % 2 ^ dim]
    other, contracted = (75, 37) if at % 2 else (72, 40)  # no whole chunks of 8 on the contiguous axes, or whole ones
    m, n = (240, other) if dim == 0 else (other, 240)
    a, b = guarded(m, contracted, dtype, a_t), guarded(contracted, n, dtype, b_t)
    idx = torch.tensor([1, 2, 5, 6, 7, 9, 10, 11, 13])  # gaps before, between and after, more units than a tile has
    scale = torch.rand(9) + 0.5 if at % 2 else None
    y = in_both_orders(lambda run: launch.skip_matmul_into(a, b, idx, scale, 16, dim, LaunchOptions(run, tile)))
    close(y, into64(a, b, idx, scale, 16, dim), terms=10)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_longer_units_and_bands() -> None:
    a, b, idx = guarded(64 * 10, 144, torch.float16), guarded(144, 70, torch.float16), torch.tensor([0, 2])
    y = in_both_orders(lambda run: launch.skip_matmul(a, b, idx, None, 48, None, LaunchOptions(run, LEAST)))
    close(y, product64(a, b, idx, None, 48, None), terms=30)
    b = guarded(144, 4 * 48, torch.float16)
    y = in_both_orders(lambda run: launch.skip_matmul_into(a, b, idx, None, 48, 1, LaunchOptions(run, LEAST)))  # tiles begin inside units
    close(y, into64(a, b, idx, None, 48, 1), terms=30)
    a, b, scale = guarded(24, 240, torch.bfloat16), guarded(240, 40, torch.bfloat16), torch.tensor([0.5, 2.0])
    close(launch.skip_matmul(a, b, idx, scale, 80, None, LaunchOptions(runs(False), LEAST)), product64(a, b, idx, scale, 80, None), terms=30)
    a = guarded(40, 24, torch.bfloat16)
    close(launch.skip_matmul_into(b, a, idx, scale, 80, 0, LaunchOptions(runs(False), LEAST)), into64(b, a, idx, scale, 80, 0), terms=30)


@pytest.mark.slow
def test_one_unit_all_units_none() -> None:
    a, b = guarded(20, 96, torch.float16), guarded(96, 24, torch.float16)
    bias = torch.randn(24).half()
    for idx in (torch.tensor([4]), torch.arange(6), torch.arange(0)):
        options = LaunchOptions(runs(False))
        close(launch.skip_matmul(a, b, idx, None, 16, bias, options), product64(a, b, idx, None, 16, bias), terms=30)
        narrow = b[:, :16]
        for dim, (p, q) in ((0, (b[:, :16].t(), b[:, 8:])), (1, (a, guarded(96, 96, torch.float16)))):
            units = idx[idx < p.shape[0] // 16] if dim == 0 else idx
            assert launch.supports_matmul(p, q, 16) and narrow.shape == (96, 16)
            close(launch.skip_matmul_into(p, q, units, None, 16, dim, options), into64(p, q, units, None, 16, dim), terms=30)


def test_only_kept_entries_are_read() -> None:
    a, b = guarded(20, 96, torch.float16), guarded(96, 24, torch.float16)
    idx = torch.tensor([1, 4])
    expected = product64(a, b, idx, None, 16, None)
    a[:, :16], b[32:64] = NAN, INF
    close(launch.skip_matmul(a, b, idx, None, 16, None, LaunchOptions(runs(False))), expected, terms=30)
    a[3, 20] = INF
    y = launch.skip_matmul(a, b, idx, None, 16, None, LaunchOptions(runs(False)))
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()
    assert launch.skip_matmul(a[:0], b, idx, None, 16).shape == (0, 24)


def test_what_is_supported() -> None:
    a, b = torch.randn(32, 64).half(), torch.randn(64, 32).half()
    assert launch.supports_matmul(a, b, 16) and launch.supports_matmul(b.t(), a.t(), 48)
    assert not launch.supports_matmul(a, b, 8) and not launch.supports_matmul(a.float(), b.float(), 16) and not launch.supports_matmul(a, b.bfloat16(), 16)
    assert not launch.supports_matmul(torch.randn(32, 68).half()[:, :64], b, 16)  # rows that begin between 16 bytes
    assert not launch.supports_matmul(torch.randn(32, 72).half()[:, 1:65], b, 16)
    assert not launch.supports_matmul(torch.randn(32, 128).half()[:, ::2], b, 16) and not launch.supports_matmul(a[:1].expand(32, 64), b, 16)


def test_tiles_fit_the_width() -> None:
    chosen = [
        (t.rows, t.columns) for t in (launch.tile_for(1 << 16, 160), launch.tile_for(1 << 13, 1 << 12), launch.tile_for(1 << 16, 64), launch.tile_for(256, 256))
    ]
    assert chosen == [(128, 80), (128, 128), (128, 64), (64, 64)]


# max_conv


def sparse(dy: Tensor, j: int) -> Tensor:
    """Return dy in fp64 with all but the j largest entries of a channel set to zero (NaN is largest; of equal entries the first counts), and an equal share of
    the rest added to these."""
    flat = dy.double().flatten(2)
    size = torch.where(flat.isnan(), torch.tensor(INF).double(), flat.abs().clamp_max(1e300))
    at = size.sort(dim=-1, descending=True, stable=True).indices[..., :j]
    own = flat.gather(-1, at)
    value = own + (flat.sum(-1, keepdim=True) - own.sum(-1, keepdim=True)) / j if j > 1 else flat.sum(-1, keepdim=True)
    return torch.zeros_like(flat).scatter(-1, at, value).reshape(dy.shape)


def max64(x: Tensor, dy: Tensor, j: int, scale: float, w: ConvGeometry) -> Tensor:
    shape = dy.shape[1], x.shape[1] // w.groups, *w.kernel
    return scale * torch.nn.grad.conv2d_weight(x.double(), shape, sparse(dy, j), w.stride, w.padding, w.dilation, w.groups)


SQUARE = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
CASES = {
    "3x3": (3, 16, 8, (9, 7), SQUARE),
    "5x5, stride, batch 1": (1, 8, 40, (5, 6), ConvGeometry((5, 5), (2, 1), (2, 0), (1, 1), 1)),
    "1x1, groups": (4, 6, 4, (8, 8), ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1), 2)),
    "3x2, dilated, groups": (5, 16, 6, (9, 9), ConvGeometry((3, 2), (1, 2), (2, 1), (2, 3), 2)),
    "many samples": (300, 3, 2, (4, 4), SQUARE),
    "many channels": (2, 300, 3, (3, 3), SQUARE),
}


def outputs_of(x: Tensor, channels: int, w: ConvGeometry) -> Tensor:
    return torch.randn(F.conv2d(x.float(), torch.zeros(channels, x.shape[1] // w.groups, *w.kernel), None, w.stride, w.padding, w.dilation, w.groups).shape)


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("j", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_max_conv(case: str, j: int) -> None:
    samples, inputs, outputs, size, w = CASES[case]
    formats = (torch.contiguous_format, torch.channels_last)
    for dtype, form in ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 1)) if j == 1 else ((torch.float16, 1), (torch.float16, 0)):
        x = torch.randn(samples, inputs, *size).to(dtype).contiguous(memory_format=formats[form])
        dy = outputs_of(x, outputs, w).to(dtype).contiguous(memory_format=formats[form])
        assert launch.supports_max_conv(x, dy, j)
        df = in_both_orders(lambda run, x=x, dy=dy: launch.max_conv_weight(x, dy, j, 0.5, w, run))
        close(df, max64(x, dy, j, 0.5, w), terms=30)
        assert df.stride() == reference(x, dy, Replacement("max", j, 0.5), w).stride() and df.shape[1] == inputs // w.groups


@pytest.mark.slow
def test_max_conv_of_more_entries_than_threads() -> None:
    x = torch.randn(10, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(10, 257, 3, 3).contiguous(memory_format=torch.channels_last)  # so many channels that the batch is one slice
    df = in_both_orders(lambda run: launch.max_conv_weight(x, dy, 8, 1.0, SQUARE, run))
    close(df, max64(x, dy, 8, 1.0, SQUARE), terms=30)


@pytest.mark.slow
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("j", [1, 4])
def test_max_conv_of_ties_zeros_and_nan(j: int, form: torch.memory_format) -> None:
    x = torch.randn(3, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    dy = torch.randint(-2, 3, (3, 5, 6, 6)).float()  # ties everywhere
    dy[0, 0] = 0
    dy[:, 1] = 0
    dy[1, 2, 3, 3], dy[1, 2, 0, 0], dy[2, 3, 0, 4] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32), NAN, -INF
    df = in_both_orders(lambda run: launch.max_conv_weight(x, dy.contiguous(memory_format=form), j, 1.0, SQUARE, run))
    close(df[[0, 1, 4]], max64(x, dy, j, 1.0, SQUARE)[[0, 1, 4]], terms=30)
    assert df[1].eq(0).all() and df[2, :, 1, 1].isnan().all() and not df[3, :, 1, 1].isfinite().any()
    if j == 1:  # of two NaN the first: at its corner, the first tap is outside the image
        assert df[2, :, 0, 0].isfinite().all()


def test_max_conv_of_other_layouts() -> None:
    x = torch.randn(6, 3, 5, 8).permute(1, 3, 0, 2)  # no pixel's channels and no row's places lie side by side
    dy = torch.randn(3, 4, 12, 5)[:, :, ::2]
    df = launch.max_conv_weight(x, dy, 1, 1.0, SQUARE, runs(False))
    close(df, max64(x, dy, 1, 1.0, SQUARE), terms=30)
    for height, width in ((6, 1), (1, 6)):  # the stride of an axis of one place may be any number
        x = torch.randn(3, 4, height, width)
        narrow = torch.randn(3, 4, 6)
        dy = narrow.as_strided((3, 4, height, width), (24, 6, 1 if width == 1 else 7, 7 if width == 1 else 1))
        df = launch.max_conv_weight(x, dy, 1, 1.0, SQUARE, runs(False))
        close(df, max64(x, dy, 1, 1.0, SQUARE), terms=30)
    x, dy = torch.randn(3, 5, 6, 8), torch.randn(3, 4, 6, 5)
    assert not launch.supports_max_conv(x.double(), dy.double(), 1) and not launch.supports_max_conv(x, dy, 9)
    assert not launch.supports_max_conv(x[:, :, :, :0], dy, 1) and not launch.supports_max_conv(x, dy[:, :, :1, :2], 4)


# The same on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("at", range(4))
def test_on_a_gpu(at: int) -> None:
    (a_t, b_t), dtype, tile = LAYOUTS[at], (torch.float16, torch.bfloat16)[at % 2], TILES[at]
    idx, scale = torch.tensor([0, 3, 6]), torch.tensor([0.5, 3.0, 0.0])
    a, b, bias = guarded(135, 112, dtype, a_t, "cuda"), guarded(112, 96, dtype, b_t, "cuda"), torch.randn(96, device="cuda", dtype=dtype)
    given = (a, b, idx.cuda(), scale.cuda(), 16)
    expected = product64(a.cpu(), b.cpu(), idx, scale, 16, bias.cpu())
    y = launch.skip_matmul(*given, bias, LaunchOptions(tile=tile))
    close(y.cpu(), expected, terms=30)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = launch.skip_matmul(*given, bias, LaunchOptions(tile=tile))
    graph.replay()
    assert torch.equal(again, y)

    units = idx[:2]
    into = launch.skip_matmul_into(a, b, units.cuda(), None, 16, 1, LaunchOptions(tile=tile))
    close(into.cpu(), into64(a.cpu(), b.cpu(), units, None, 16, 1), terms=30)

    _samples, inputs, outputs, size, w = list(CASES.values())[at]
    x = torch.randn(64, inputs, *size).to(dtype)
    dy = outputs_of(x, outputs, w).to(dtype)
    df = launch.max_conv_weight(x.cuda(), dy.cuda(), 1 + at, 0.5, w)
    close(df.cpu(), max64(x, dy, 1 + at, 0.5, w), terms=30)
