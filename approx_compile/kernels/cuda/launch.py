"""Launch the CUDA C++ kernels of this folder on tensors: which operands they take, which variant is compiled, and with which grid and arguments.

`supports_max_conv` and `supports_matmul` look at dtypes, shapes, strides and alignment only; `unavailable_reason` tells what else keeps the kernels from
running on a device. Every launcher takes a function `run` that launches one kernel: on the GPU by default, on the CPU in the tests.

A variant is compiled at its first call. A CUDA graph can capture only calls that have been made before, as torch's own warm-up rule asks for.
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
from approx_compile.kernels.gradient_replacements import ConvGeometry
from approx_compile.reasons import Reason
from approx_compile.reasons.kernels import CUDA_CAPABILITY, NO_NVRTC
from approx_compile.utils import warn_once

Run = Callable[[Program, str, tuple[int, int, int], int, Sequence[Any], torch.device], None]
"""Launches one kernel: (program, name of the kernel, grid, threads of a block, arguments, device). Addresses among the arguments are of type int, all other
arguments are ctypes numbers of the types that the kernel declares."""

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MIN_CAPABILITY = (8, 0)
"""The first compute capability with asynchronous copies and bf16."""

address, i32, i64, f32 = Tensor.data_ptr, ctypes.c_int, ctypes.c_longlong, ctypes.c_float


def unavailable_reason(device: torch.device) -> Reason | None:
    """Say why the kernels cannot run on a CUDA device; None if they can."""
    if (error := nvrtc.compiler_error()) is not None:
        return NO_NVRTC(error=error)
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return CUDA_CAPABILITY(has=".".join(map(str, capability)), needed=".".join(map(str, MIN_CAPABILITY)))
    return None


def available_or_warn(device: torch.device, what: str) -> bool:
    """Tell whether the kernels can run on a CUDA device, and warn once if they cannot.

    Args:
        device: A CUDA device.
        what: What would be computed, as the subject of the warning.
    """
    why = unavailable_reason(device)
    if why is not None:
        warn_once(f"approx: {what} is lowered by Inductor in place of CUDA C++: {'. '.join((why, *why.advice))}")
    return why is None


@dataclass(frozen=True)
class _Stream:
    """A stream of torch, in the protocol that cuda.core accepts."""

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
    Device(torch.cuda.current_device()).set_current()  # makes torch's context current in cuda.core
    return ObjectCode.from_cubin(nvrtc.cubin(program, arch), name=program.file)


def launch_on_gpu(program: Program, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a kernel on torch's current stream of a device; compiles the program first where needed.

    Args:
        program: The source and its macros.
        kernel: Name of the kernel in it.
        grid: Blocks by axis.
        threads: Threads of a block.
        arguments: Addresses as int, all others as ctypes numbers.
        device: The CUDA device of the operands.

    Raises:
        RuntimeError: The program is used for the first time while a CUDA graph is captured.
    """
    from cuda.core import LaunchConfig, launch

    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        launch(stream, LaunchConfig(grid=grid, block=threads), _kernel(program, kernel, 10 * major + minor), *arguments)


# --- the gradient of a convolution's weight from few entries (max_conv.cu) ---

MAX_ENTRIES = 8
_THREADS = 256
_ENOUGH_BLOCKS = 512
"""Blocks that fill a GPU. If there are fewer, the batch is cut into slices whose number depends on shapes only."""


def supports_max_conv(x: Tensor, dy: Tensor, j: int) -> bool:
    """Tell whether `max_conv_weight` takes these operands.

    It takes 2-D convolutions in fp32, fp16 or bf16 without an empty axis, and 1 <= j <= MAX_ENTRIES where a channel has as many entries.

    Args:
        x: Input of the convolution, (N, C, H, W).
        dy: Gradient of its output, (N, O, P, Q).
        j: Entries kept of each channel of each sample.
    """
    sizes = (*x.shape, *dy.shape)
    if x.dim() != 4 or x.dtype != dy.dtype or x.dtype not in ELEMENTS or not 1 <= j <= min(MAX_ENTRIES, dy.shape[2] * dy.shape[3]):
        return False
    narrow = dy.shape[1] < 2**16 and max(x.shape[0] * j, dy.shape[2] * dy.shape[3]) < 2**31  # the kernels count these in 32 bits
    return narrow and all(0 < s < 2**31 for s in sizes)


def max_conv_program(dtype: torch.dtype, j: int, channels_fast: bool, vector: int) -> Program:
    """Return the variant of max_conv.cu for given operands.

    Args:
        dtype: Of x and dy.
        j: Entries kept of each channel of each sample.
        channels_fast: Whether dy's channels lie closer in memory than its places.
        vector: Channels of x that one load reads.
    """
    return Program("max_conv.cu", (("ELEMENT", ELEMENTS[dtype]), ("J", j), ("CHANNELS_FAST", int(channels_fast)), ("VECTOR", vector)))


def max_conv_weight(x: Tensor, dy: Tensor, j: int, scale: float, conv: ConvGeometry, run: Run = launch_on_gpu) -> Tensor:
    """Compute the weight gradient of a 2-D convolution from the `j` largest entries of every channel of every sample of dy.

    The formula is in max_conv.cu. `supports_max_conv` must hold for the operands.

    Args:
        x: Input of the convolution, (N, C, H, W); copied to channels-last if its channels are not contiguous.
        dy: Gradient of its output, (N, O, P, Q), in any layout.
        j: Entries kept of each channel of each sample.
        scale: Factor on the result.
        conv: The convolution, which is not transposed.
        run: What launches a kernel.

    Returns:
        The gradient, (O, C / groups, kh, kw), with the channels innermost in memory.
    """
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    width, dy = dy.shape[3], dy.flatten(2)  # a view if one stride leads from place to place, else a copy
    samples, outputs, inputs, taps = x.shape[0], dy.shape[1], x.shape[1] // conv.groups, conv.kernel[0] * conv.kernel[1]
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
    df = torch.empty((outputs, *conv.kernel, inputs), dtype=x.dtype, device=x.device)
    partial = torch.empty((slices, df.numel()) if slices > 1 else (0,), dtype=torch.float32, device=x.device)
    pairs = (*conv.stride, *conv.padding, *conv.dilation)
    sizes = [i32(s) for s in (samples, each, inputs, outputs // conv.groups, x.shape[2], x.shape[3], width, taps, conv.kernel[1], *pairs)]
    strides = [i64(s) for s in (x.stride(0), x.stride(2), x.stride(3))]
    tensors = [address(t) for t in (x, place, value, df, partial)]
    run(program, "accumulate", (blocks, outputs, slices), threads, [*tensors, *sizes, *strides], x.device)
    if slices > 1:
        arguments = [address(partial), address(df), i32(slices), i64(df.numel())]
        run(program, "finish", (_ceil(df.numel(), _THREADS), 1, 1), _THREADS, arguments, x.device)
    return df.movedim(-1, 1)


def _vector(x: Tensor, inputs: int) -> int:
    """Return how many channels 16 bytes hold if every pixel's group of channels begins at a multiple of 16 bytes, else 1."""
    most = 16 // x.element_size()
    steps = (inputs, x.stride(0), x.stride(2), x.stride(3), address(x) // x.element_size())
    return most if all(s % most == 0 for s in steps) else 1


# --- products of matrices that skip units (skip_matmul.cu) ---


@dataclass(frozen=True)
class Tile:
    """The part of the result that a thread block computes, and the resources that it has.

    Attributes:
        rows: Rows of the result.
        columns: Columns of the result.
        warps_rows: Warps that share the rows.
        warps_columns: Warps that share the columns.
        stages: Buffers in shared memory that asynchronous copies fill in turn.
        blocks: Blocks that a multiprocessor should hold at once, which bounds the registers of a thread.
        blocks_roomy: The same for variants that need more registers: scaled inside the loop, or ragged.
    """

    rows: int
    columns: int
    warps_rows: int
    warps_columns: int
    stages: int
    blocks: int
    blocks_roomy: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_rows * self.warps_columns


TILES = (Tile(128, 128, 2, 4, 3, 2, 1), Tile(128, 80, 4, 1, 3, 3, 2), Tile(128, 64, 4, 2, 4, 2, 2), Tile(64, 64, 2, 2, 4, 3, 3))
_MULTIPROCESSORS = 128
"""Of a large GPU, for the rule of thumb in `tile_for`."""


def tile_for(rows: int, columns: int) -> Tile:
    """Choose the tile for a result of rows x columns, by a rule of thumb that was not fitted to measurements.

    A tile is assumed to take time in proportion to its multiplications and copies, and `_MULTIPROCESSORS` tiles to run at a time.
    """

    def time(t: Tile) -> float:
        count = _ceil(rows, t.rows) * _ceil(columns, t.columns)
        return max(1.0, count / _MULTIPROCESSORS) * (t.rows * t.columns + 32 * (t.rows + t.columns))

    return min(TILES, key=time)


def supports_matmul(a: Tensor, b: Tensor, unit: int) -> bool:
    """Tell whether `skip_matmul` and `skip_matmul_into` take these operands.

    They take fp16 and bf16, units of a multiple of 16 entries, and operands of less than 2^31 entries that begin at a multiple of 16 bytes, with one
    contiguous axis and a stride of a multiple of 16 bytes along the other.

    Args:
        a: Left operand, (M, K).
        b: Right operand, (K, N).
        unit: Contiguous entries that one index stands for.
    """
    same = a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)
    return same and unit > 0 and unit % 16 == 0 and _memory_layout(a, 1) is not None and _memory_layout(b, 0) is not None


def _memory_layout(x: Tensor, contracted: int) -> tuple[bool, int] | None:
    """Return whether the contracted axis is the contiguous one, and the stride of the other axis; None if the kernels cannot read the operand."""
    if address(x) % 16:
        return None
    for fast in (contracted, 1 - contracted):
        stride = x.stride(1 - fast)
        if x.stride(fast) == 1 and stride % 8 == 0 and stride >= x.shape[fast] and stride * x.shape[1 - fast] < 2**31:
            return fast == contracted, stride
    return None


@dataclass(frozen=True)
class LaunchOptions:
    """Options of a launch of `skip_matmul` or `skip_matmul_into`, which tests set.

    Attributes:
        run: What launches a kernel.
        tile: The tile; None lets `tile_for` choose by shape.
    """

    run: Run = launch_on_gpu
    tile: Tile | None = None


def skip_matmul(
    a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None, options: LaunchOptions = LaunchOptions()
) -> Tensor:
    """Compute Y = A[:, idx] diag(scale) B[idx, :] + bias, a product whose contraction axis is sampled in units.

    Sums are fp32. The scale multiplies these sums, so that it neither rounds an operand nor overflows.

    Args:
        a: (M, K); `supports_matmul` must hold for a, b and unit.
        b: (K, N).
        idx: (k,) int64, sorted and distinct: the kept units of the contraction axis.
        scale: (k,), or None for 1.
        unit: Contiguous entries that one index stands for.
        bias: (N,), or None.
        options: What launches the kernel, and the tile.

    Returns:
        (M, N), contiguous, in the operands' dtype.
    """
    return _product(a, b, idx, scale, unit, bias, None, options)


def skip_matmul_into(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int, options: LaunchOptions = LaunchOptions()) -> Tensor:
    """Compute chosen units of the rows (dim 0) or columns (dim 1) of A B, times their scale, with zeros elsewhere.

    Sums are fp32, and every entry of the result is written once.

    Args:
        a: (M, L); `supports_matmul` must hold for a, b and unit.
        b: (L, N).
        idx: (k,) int64, sorted and distinct: the units of `dim` that are computed.
        scale: (k,), or None for 1.
        unit: Contiguous entries that one index stands for.
        dim: 0 for rows of the result, 1 for columns.
        options: What launches the kernel, and the tile.

    Returns:
        (M, N), contiguous, in the operands' dtype.
    """
    return _product(a, b, idx, scale, unit, None, dim, options)


def matmul_program(dtype: torch.dtype, unit: int, into: int | None, scaled: bool, a_fast: bool, b_fast: bool, ragged: bool, tile: Tile) -> Program:
    """Return the variant of skip_matmul.cu for given operands.

    Args:
        dtype: fp16 or bf16.
        unit: Contiguous entries that one index stands for.
        into: None if the contraction axis is sampled, else the dim of the result that is (0 or 1).
        scaled: Whether there is a scale.
        a_fast: Whether the contracted axis is a's contiguous one.
        b_fast: Whether the contracted axis is b's contiguous one.
        ragged: Whether the length of a contiguous axis is no multiple of 8.
        tile: The tile.
    """
    looped = into is None and scaled
    macros = {"ELEMENT": ELEMENTS[dtype], "UNIT": unit, "INTO": {None: 0, 1: 1, 0: 2}[into], "SCALED": int(looped), "A_K": int(a_fast), "B_K": int(b_fast)}
    sizes = {"TILE_M": tile.rows, "TILE_N": tile.columns, "WARPS_M": tile.warps_rows, "WARPS_N": tile.warps_columns}
    return Program(
        "skip_matmul.cu",
        tuple((macros | sizes | {"STAGES": tile.stages, "BLOCKS": tile.blocks_roomy if looped or ragged else tile.blocks, "RAGGED": int(ragged)}).items()),
    )


def _product(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None, into: int | None, options: LaunchOptions) -> Tensor:
    m, n, count = a.shape[0], b.shape[1], idx.shape[0]
    rows, columns = (count * unit if into == 0 else m), (count * unit if into == 1 else n)
    if min(m, n, rows, columns) == 0:
        return a.new_zeros(m, n)
    a_layout, b_layout = _memory_layout(a, 1), _memory_layout(b, 0)
    assert a_layout is not None and b_layout is not None, "supports_matmul comes first"
    tile = options.tile or tile_for(rows, columns)
    ragged = bool(a.shape[a_layout[0]] % 8 or b.shape[1 - b_layout[0]] % 8)
    program = matmul_program(a.dtype, unit, into, scale is not None, a_layout[0], b_layout[0], ragged, tile)
    y = a.new_empty(m, n)
    idx = idx.contiguous()
    scale = None if scale is None else scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(a.dtype).contiguous()
    tensors = [0 if t is None else address(t) for t in (a, b, idx, scale, bias, y)]
    sizes = [i32(s) for s in (m, n, count * unit if into is None else a.shape[1], count)]
    grid = (_ceil(rows, tile.rows) * _ceil(columns, tile.columns), 1, 1)
    options.run(program, "skip_matmul", grid, tile.threads, [*tensors, *sizes, i32(a_layout[1]), i32(b_layout[1])], a.device)
    return y


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
