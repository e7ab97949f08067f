"""Launch the kernels of matmul_kernels.py: which operands they take, in which tiles, and how each operand is handed over.

`skip` and `skip_into` compute the ops `skip_matmul` and `skip_matmul_into`; `can_skip` and `can_skip_into` tell whether they take given operands. The tile
configuration is looked up or timed by `autotune`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from approx_compile.kernels.triton import autotune
from approx_compile.kernels.triton.autotune import TileConfig, device_context
from approx_compile.kernels.triton.matmul_kernels import into_kernel, pack_kernel, skip_kernel

TILES_OF_16_BITS = {
    8: (TileConfig(128, 128, 64, 8, 3), TileConfig(64, 128, 64, 8, 4), TileConfig(64, 64, 64, 4, 4)),
    9: (
        TileConfig(128, 256, 64, 8, 4),
        TileConfig(256, 128, 64, 8, 4),
        TileConfig(128, 128, 64, 8, 5),
        TileConfig(64, 128, 64, 4, 5),
        TileConfig(64, 64, 64, 4, 6),
    ),
}
"""Tile configurations for operands of two bytes, by major compute capability; for fp32 (TF32) BLOCK_K is half of these."""

BAND_ROWS = 8
"""Rows of tiles that run close in time (`matmul_kernels.program_tile`)."""


def candidate_configs(itemsize: int, unit: int, arch: int) -> list[TileConfig]:
    """Return the tile configurations for a dtype and a contraction axis.

    If the unit is no multiple of BLOCK_K but of half of it, BLOCK_K is halved and the stages are doubled.

    Args:
        itemsize: Bytes of an entry.
        unit: Entries of a unit of the contraction axis; 0 if that axis is not sampled.
        arch: Compute capability as a number, such as 90.
    """
    configs = []
    for c in TILES_OF_16_BITS[arch // 10]:
        k, stages = c.block_k * 2 // itemsize, c.stages
        if unit % k and unit % (k // 2) == 0:
            k, stages = k // 2, min(2 * stages, 8)
        configs.append(replace(c, block_k=k, stages=stages))
    return list(dict.fromkeys(configs))


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    """Tell whether products of this dtype may use tensor cores: fp16 and bf16, and fp32 if torch's own products may use TF32 (its settings say)."""
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32")


def reads_in_16_bytes(x: Tensor, axis: int, unit: int | None) -> bool:
    """Tell whether a matrix can be read in pieces of 16 bytes.

    One stride must be 1, and the other stride and the length of the contiguous axis multiples of 16 entries, which is what Triton can exploit. If only units
    along `axis` are read and `axis` is contiguous, the units must be multiples of 16 bytes too.

    Args:
        x: The matrix.
        axis: The sampled axis.
        unit: Entries of a unit along `axis`; None if that axis is read as a whole.
    """
    along = 1 if x.stride(1) == 1 else 0
    line = x.stride(1 - along)
    aligned = x.stride(along) == 1 and line > 0 and line % 16 == 0 and x.shape[along] % 16 == 0
    return aligned and (unit is None or along != axis or unit * x.element_size() % 16 == 0)


def can_skip(a: Tensor, b: Tensor, unit: int) -> bool:
    """Tell whether `skip` takes these operands, by device, dtype, sizes and strides alone.

    Args:
        a: (M, K).
        b: (K, N).
        unit: Contiguous entries that one index stands for.
    """
    return _can_multiply(a, b) and reads_in_16_bytes(a, 1, unit) and reads_in_16_bytes(b, 0, unit)


def can_skip_into(a: Tensor, b: Tensor, unit: int, dim: int) -> bool:
    """Tell whether `skip_into` takes these operands, by device, dtype, sizes and strides alone.

    Args:
        a: (M, L).
        b: (L, N).
        unit: Contiguous entries that one index stands for. Chosen columns (dim 1) must be multiples of 16 bytes, since the result is contiguous in rows.
        dim: The sampled dim of the result.
    """
    if dim == 0:
        return _can_multiply(a, b) and reads_in_16_bytes(a, 0, unit) and reads_in_16_bytes(b, 1, None)
    return _can_multiply(a, b) and reads_in_16_bytes(a, 0, None) and reads_in_16_bytes(b, 1, unit) and unit * a.element_size() % 16 == 0


def _can_multiply(a: Tensor, b: Tensor) -> bool:
    """Whether there are kernels for the operands' dtype and device, no axis is empty, and rows of the result can be written in pieces of 16 bytes."""
    return uses_tensor_cores(a.dtype) and min(*a.shape, *b.shape) > 0 and b.shape[1] % 16 == 0 and autotune.device_limits(a).arch // 10 in TILES_OF_16_BITS


def pack(b: Tensor, idx: Tensor, unit: int, dim: int) -> Tensor:
    """Copy the chosen rows (dim 0) or columns (dim 1) of a matrix so that columns are contiguous.

    Columns begin at multiples of 64 entries, with zeros between them.

    Args:
        b: The matrix, (K, N).
        idx: Units that are copied, (k,).
        unit: Contiguous entries that one index stands for.
        dim: The axis on which `idx` chooses.

    Returns:
        (k * unit, N) for dim 0, (K, k * unit) for dim 1.
    """
    kept = len(idx) * unit
    k, n = (kept, b.shape[1]) if dim == 0 else (b.shape[0], kept)
    z = b.new_empty(n, -(-k // 64) * 64)
    pack_kernel[z.shape[1] // 32, triton.cdiv(n, 64)](b, z, idx, k, n, *b.stride(), z.stride(0), unit, dim, 32, 64, num_warps=4)
    return z[:, :k].T


def tile_operand(x: Tensor, lines: int, run: int, tma: bool) -> tuple[Any, str]:
    """Return what a kernel is given for a matrix that it reads in tiles of lines x run.

    Args:
        x: The matrix.
        lines: Rows of a tile.
        run: Columns of a tile.
        tma: Whether TMA may be used.

    Returns:
        A TMA descriptor of the matrix and "rows", or one of its transpose and "columns"; or, if its layout allows neither, the tensor and "".
    """
    for order, view, block in (("rows", x, [lines, run]), ("columns", x.T, [run, lines])):
        if tma and view.stride(1) == 1 and view.stride(0) > 0 and view.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
            return TensorDescriptor(view, list(view.shape), list(view.stride()), block), order
    return x, ""


def contiguous_run(unit: int) -> int:
    """Return the largest power of two, at most 16, that divides `unit`."""
    return min(unit & -unit, 16)


def skip(
    a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None, config: TileConfig | None = None, tma: bool | None = None
) -> Tensor:
    """Compute Y = A[:, idx] diag(scale) B[idx, :] + bias; scaled entries of a are rounded to its dtype, sums are fp32.

    `can_skip` must hold for the operands, and `idx` must not be empty.

    Args:
        a: (M, K).
        b: (K, N).
        idx: (k,) int64, sorted and distinct.
        scale: (k,) fp32, or None for 1.
        unit: Contiguous entries that one index stands for.
        bias: (N,), or None.
        config: The tile configuration; None looks it up (`autotune`). Tests set it.
        tma: Whether to use TMA; None uses it where the device has it. Tests set it.

    Returns:
        (M, N), contiguous.
    """
    (m, _), n = a.shape, b.shape[1]
    idx, scale, bias = idx.contiguous(), _contiguous(scale), _contiguous(bias)
    y = torch.empty((m, n), dtype=a.dtype, device=a.device)
    hopper = _uses_tma(a, tma)
    packed = hopper and a.dtype == torch.float32 and unit * a.element_size() % 64 != 0  # other units are read by TMA

    def run(c: TileConfig) -> None:
        by_tma = hopper and not packed and unit % c.block_k == 0
        (x, x_tma), (z, z_tma) = tile_operand(a, c.block_m, c.block_k, by_tma), tile_operand(b, c.block_k, c.block_n, by_tma)
        skip_kernel[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n),)](
            x, z, y, idx, scale, bias, m, n, len(idx), *a.stride(), *b.stride(),
            unit, contiguous_run(unit), c.block_m, c.block_n, c.block_k, BAND_ROWS, x_tma, z_tma, packed, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    with device_context(a):
        a, b = (pack(a.T, idx, unit, 0).T, pack(b, idx, unit, 0)) if packed else (a, b)
        key = ("skip", autotune.next_power_of_two(len(idx) * unit), unit, a.stride(1) == 1, b.stride(1) == 1, scale is None, bias is None)
        run(config or autotune.config_for_result(skip_kernel, a, (m, n), key, lambda d: candidate_configs(a.element_size(), unit, d.arch), run))
    return y


def skip_into(
    a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int, config: TileConfig | None = None, tma: bool | None = None
) -> Tensor:
    """Compute Y[:, idx] = (A B[:, idx]) diag(scale) for dim 1, Y[idx, :] = diag(scale) (A[idx, :] B) for dim 0, and zeros elsewhere.

    `can_skip_into` must hold for the operands, and `idx` must not be empty.

    Args:
        a: (M, L).
        b: (L, N).
        idx: (k,) int64, sorted and distinct.
        scale: (k,) fp32, or None for 1.
        unit: Contiguous entries that one index stands for.
        dim: The sampled dim of the result.
        config: The tile configuration; None looks it up (`autotune`). Tests set it.
        tma: Whether to use TMA; None uses it where the device has it. Tests set it.

    Returns:
        (M, N), contiguous.
    """
    y = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    out, idx, scale = y, idx.contiguous(), _contiguous(scale)
    if dim == 0:  # the transposed product
        a, b, out = b.T, a.T, y.T
    (m, length), n = a.shape, b.shape[1]
    hopper = _uses_tma(a, tma)
    packed = hopper and b.dtype == torch.float32 and b.stride(0) != 1

    def run(c: TileConfig) -> None:
        x, x_tma = tile_operand(a, c.block_m, c.block_k, hopper)
        into_kernel[(triton.cdiv(m, c.block_m) * triton.cdiv(len(idx) * unit, c.block_n),)](
            x, b, out, idx, scale, m, n, length, len(idx), *a.stride(), *b.stride(), *out.stride(),
            unit, contiguous_run(unit), c.block_m, c.block_n, c.block_k, BAND_ROWS, x_tma, len(idx).bit_length(), packed,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    with device_context(a):
        b = pack(b, idx, unit, 1) if packed else b
        lengths = autotune.next_power_of_two(n), autotune.next_power_of_two(length)
        key = ("into", dim, *lengths, unit, a.stride(1) == 1, b.stride(1) == 1, scale is None)
        size = (m, len(idx) * unit)
        run(config or autotune.config_for_result(into_kernel, a, size, key, lambda d: candidate_configs(a.element_size(), 0, d.arch), run))
    return y


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _uses_tma(x: Tensor, given: bool | None) -> bool:
    return autotune.device_limits(x).arch // 10 == 9 if given is None else given
