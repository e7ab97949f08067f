"""The kernels of this folder on tensors: what they take, in which variant, and how they are launched.

`supports_...` asks for dtypes, shapes, strides and alignment only; `unavailable(device)` says what else is missing. Every launcher takes `run`, which
launches a kernel on the GPU, or in the tests on the CPU.

Compiling is for the first call of a variant. CUDA graphs capture calls that have been made before, as torch asks for anyway.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx_compile.kernels.cuda import nvrtc
from approx_compile.kernels.cuda.nvrtc import Program
from approx_compile.utils import warn_once

Run = Callable[[Program, str, tuple[int, int, int], int, Sequence[Any], torch.device], None]
"""(program, kernel, grid, threads of a block, arguments, device): arguments are addresses as int, all else as ctypes numbers of the kernel's types."""

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LEAST_CAPABILITY = (8, 0)
"""Asynchronous copies and bf16 came with it."""

address, i32, i64, f32 = Tensor.data_ptr, ctypes.c_int, ctypes.c_longlong, ctypes.c_float


def unavailable(device: torch.device) -> str | None:
    """Why the kernels can't run on a CUDA device; None if they can."""
    if nvrtc.missing() is not None:
        return f"CUDA C++ can't be compiled ({nvrtc.missing()}): pip install 'approx-compile[cuda]'"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, and the kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    return None


def available(device: torch.device, what: str) -> bool:
    """Whether the kernels can run on a CUDA device; says once for `what` why not."""
    why = unavailable(device)
    if why is not None:
        warn_once(f"approx: {what} is lowered by Inductor in place of CUDA C++: {why}")
    return why is None


@dataclass(frozen=True)
class _Stream:
    """Torch's stream as cuda.core takes it."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@functools.cache
def _kernel(program: Program, kernel: str, arch: int) -> Any:
    return _loaded(program, arch).get_kernel(kernel)


@functools.cache
def _loaded(program: Program, arch: int) -> Any:
    from cuda.core import Device, ObjectCode

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{program.file} is first used while a CUDA graph is captured; run the same step once before the capture, to warm up")
    Device(torch.cuda.current_device()).set_current()  # the context that torch uses
    return ObjectCode.from_cubin(nvrtc.cubin(program, arch), name=program.file)


def on_device(program: Program, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], device: torch.device) -> None:
    """Launch on the device's current stream. Raises RuntimeError for a variant that is first used inside the capture of a CUDA graph."""
    from cuda.core import LaunchConfig, launch

    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        launch(stream, LaunchConfig(grid=grid, block=threads), _kernel(program, kernel, 10 * major + minor), *arguments)


# The weight gradient from few entries (max_conv.cu)

MOST_ENTRIES = 8
_THREADS = 256
_ENOUGH_BLOCKS = 512
"""Blocks that fill a GPU: with fewer the batch is cut into slices, the number of which depends on shapes only."""


@dataclass(frozen=True)
class Window:
    """A 2-D convolution: kernel, stride, padding and dilation by (height, width), and its groups."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def supports_max_conv(x: Tensor, dy: Tensor, j: int) -> bool:
    """2-D, fp32, fp16 or bf16, at most MOST_ENTRIES entries (and no more than there are), no axis empty."""
    sizes = (*x.shape, *dy.shape)
    if x.dim() != 4 or x.dtype != dy.dtype or x.dtype not in ELEMENTS or not 1 <= j <= min(MOST_ENTRIES, dy.shape[2] * dy.shape[3]):
        return False
    narrow = dy.shape[1] < 2**16 and max(x.shape[0] * j, dy.shape[2] * dy.shape[3]) < 2**31  # what the kernels count in 32 bits
    return narrow and all(0 < s < 2**31 for s in sizes)


def max_conv_program(dtype: torch.dtype, j: int, channels_fast: bool, vector: int) -> Program:
    """The variant for a dtype and `j` entries; `channels_fast`: of dy; `vector`: channels of x read at once."""
    return Program("max_conv.cu", (("ELEMENT", ELEMENTS[dtype]), ("J", j), ("CHANNELS_FAST", int(channels_fast)), ("VECTOR", vector)))


def max_conv_weight(x: Tensor, dy: Tensor, j: int, scale: float, window: Window, run: Run = on_device) -> Tensor:
    """The weight's gradient (O, C / groups, kh, kw), channels innermost, from the `j` largest entries of every channel of every sample of dy.

    x (N, C, H, W) with a pixel's channels side by side (else it is copied so), dy (N, O, P, Q). The formula stands in max_conv.cu.
    """
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    width, dy = dy.shape[3], dy.flatten(2)  # a view where places have one step, else a copy
    samples, outputs, inputs, taps = x.shape[0], dy.shape[1], x.shape[1] // window.groups, window.kernel[0] * window.kernel[1]
    vector = _vector(x, inputs)
    channels_fast = dy.stride(1) < dy.stride(2)
    program = max_conv_program(x.dtype, j, channels_fast, vector)

    place = torch.empty((outputs, samples, j), dtype=torch.int32, device=x.device)
    value = torch.empty((outputs, samples, j), dtype=torch.float32, device=x.device)
    rows = _ceil(samples * outputs, _THREADS // (8 if channels_fast else 32))
    strides = [i64(s) for s in dy.stride()]
    sizes = [i32(s) for s in (samples, outputs, dy.shape[2])]
    run(program, "largest", (rows, 1, 1), _THREADS, [address(dy), address(place), address(value), *sizes, *strides, f32(scale)], x.device)

    threads = min(_THREADS, _ceil(taps * inputs // vector, 32) * 32)
    blocks = _ceil(taps * inputs // vector, threads)
    slices = max(1, min(samples, _ENOUGH_BLOCKS // (blocks * outputs)))
    each = _ceil(samples, slices)
    slices = _ceil(samples, each)
    df = torch.empty((outputs, *window.kernel, inputs), dtype=x.dtype, device=x.device)
    partial = torch.empty((slices, df.numel()) if slices > 1 else (0,), dtype=torch.float32, device=x.device)
    pairs = (*window.stride, *window.padding, *window.dilation)
    sizes = [i32(s) for s in (samples, each, inputs, outputs // window.groups, x.shape[2], x.shape[3], width, taps, window.kernel[1], *pairs)]
    strides = [i64(s) for s in (x.stride(0), x.stride(2), x.stride(3))]
    tensors = [address(t) for t in (x, place, value, df, partial)]
    run(program, "accumulate", (blocks, outputs, slices), threads, [*tensors, *sizes, *strides], x.device)
    if slices > 1:
        arguments = [address(partial), address(df), i32(slices), i64(df.numel())]
        run(program, "finish", (_ceil(df.numel(), _THREADS), 1, 1), _THREADS, arguments, x.device)
    return df.movedim(-1, 1)


def _vector(x: Tensor, inputs: int) -> int:
    """Channels that 16 bytes hold, if every pixel's group of channels begins at a multiple of 16 bytes; else 1."""
    most = 16 // x.element_size()
    steps = (inputs, x.stride(0), x.stride(2), x.stride(3), address(x) // x.element_size())
    return most if all(s % most == 0 for s in steps) else 1


# Products that skip units (skip_matmul.cu)


@dataclass(frozen=True)
class Tile:
    """What a block computes, by how many warps, with how many buffers, and how many blocks a multiprocessor shall hold (scaled or
    ragged: fewer, of more registers)."""

    rows: int
    columns: int
    warps_rows: int
    warps_columns: int
    stages: int
    blocks: int
    blocks_roomy: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_rows * self.warps_columns


TILES = (Tile(128, 128, 2, 4, 3, 2, 1), Tile(128, 80, 4, 1, 3, 3, 2), Tile(128, 64, 4, 2, 4, 2, 2), Tile(64, 64, 2, 2, 4, 3, 3))
_MULTIPROCESSORS = 128


def tile_for(rows: int, columns: int) -> Tile:
    """By a rule of thumb, not by measurement: tiles take time in proportion to their products and copies, and so many are worked on at once."""

    def time(t: Tile) -> float:
        count = _ceil(rows, t.rows) * _ceil(columns, t.columns)
        return max(1.0, count / _MULTIPROCESSORS) * (t.rows * t.columns + 32 * (t.rows + t.columns))

    return min(TILES, key=time)


def supports_matmul(a: Tensor, b: Tensor, unit: int) -> bool:
    """fp16 or bf16, units of a multiple of 16 entries, and operands of less than 2^31 entries of which one axis is
    contiguous and the other has steps of whole 16 bytes."""
    same = a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)
    return same and unit > 0 and unit % 16 == 0 and _layout(a, 1) is not None and _layout(b, 0) is not None


def _layout(x: Tensor, contracted: int) -> tuple[bool, int] | None:
    """Whether the contracted axis is the contiguous one, and the step of the other; None for what the kernels can't read."""
    if address(x) % 16:
        return None
    for fast in (contracted, 1 - contracted):
        step = x.stride(1 - fast)
        if x.stride(fast) == 1 and step % 8 == 0 and step >= x.shape[fast] and step * x.shape[1 - fast] < 2**31:
            return fast == contracted, step
    return None


@dataclass(frozen=True)
class How:
    """What a launch of `skip_matmul` is: what launches it, and its tile (None: by shape)."""

    run: Run = on_device
    tile: Tile | None = None


def skip_matmul(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None, how: How = How()) -> Tensor:
    """Y = A[:, idx] diag(scale) B[idx, :] + bias for units of the contraction axis; (M, K), (K, N) -> (M, N), sums in fp32.

    For operands that `supports_matmul`. The scale multiplies fp32 sums, so that it neither rounds nor overflows.
    """
    return _product(a, b, idx, scale, unit, bias, None, how)


def skip_matmul_into(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int, how: How = How()) -> Tensor:
    """Units `idx` of rows (dim 0) or columns (dim 1) of A B, times their scale, and zeros elsewhere; (M, L), (L, N) -> (M, N), sums in fp32.

    For operands that `supports_matmul`; every entry is written once.
    """
    return _product(a, b, idx, scale, unit, None, dim, how)


def matmul_program(dtype: torch.dtype, unit: int, into: int | None, scaled: bool, a_fast: bool, b_fast: bool, ragged: bool, tile: Tile) -> Program:
    """The variant for a dtype, unit and dim `into`; `a_fast`, `b_fast`: whether the contracted axis is the operand's contiguous one; `ragged`: whether
    8 does not divide a contiguous axis."""
    looped = into is None and scaled
    macros = {"ELEMENT": ELEMENTS[dtype], "UNIT": unit, "INTO": {None: 0, 1: 1, 0: 2}[into], "SCALED": int(looped), "A_K": int(a_fast), "B_K": int(b_fast)}
    sizes = {"TILE_M": tile.rows, "TILE_N": tile.columns, "WARPS_M": tile.warps_rows, "WARPS_N": tile.warps_columns}
    return Program(
        "skip_matmul.cu",
        tuple((macros | sizes | {"STAGES": tile.stages, "BLOCKS": tile.blocks_roomy if looped or ragged else tile.blocks, "RAGGED": int(ragged)}).items()),
    )


def _product(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None, into: int | None, how: How) -> Tensor:
    m, n, count = a.shape[0], b.shape[1], idx.shape[0]
    rows, columns = (count * unit if into == 0 else m), (count * unit if into == 1 else n)
    if min(m, n, rows, columns) == 0:
        return a.new_zeros(m, n)
    a_layout, b_layout = _layout(a, 1), _layout(b, 0)
    assert a_layout is not None and b_layout is not None, "supports_matmul comes first"
    tile = how.tile or tile_for(rows, columns)
    ragged = bool(a.shape[a_layout[0]] % 8 or b.shape[1 - b_layout[0]] % 8)
    program = matmul_program(a.dtype, unit, into, scale is not None, a_layout[0], b_layout[0], ragged, tile)
    y = a.new_empty(m, n)
    idx = idx.contiguous()
    scale = None if scale is None else scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(a.dtype).contiguous()
    tensors = [0 if t is None else address(t) for t in (a, b, idx, scale, bias, y)]
    sizes = [i32(s) for s in (m, n, count * unit if into is None else a.shape[1], count)]
    grid = (_ceil(rows, tile.rows) * _ceil(columns, tile.columns), 1, 1)
    how.run(program, "skip_matmul", grid, tile.threads, [*tensors, *sizes, i32(a_layout[1]), i32(b_layout[1])], a.device)
    return y


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
