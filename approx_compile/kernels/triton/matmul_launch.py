# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Products of matrices of which only chosen indices of one axis are read, or written: Triton kernels and what starts them.

| kernel | sum | chosen |
|---|---|---|
| `skip_kernel` | y[m, n] = sum over the kept entries p of a[m, p] scale_p b[p, n] (+ bias[n]) | entries of the contraction axis |
| `into_kernel` | y[m, p] = scale_p sum over l of a[m, l] b[l, p] for the kept p, zero for the others | columns of the result (rows: its transpose) |
| `pack_kernel` | z[n, k] = b[k, n] of the kept k or n | an operand that Hopper can't multiply as it lies |

Nothing is gathered into memory first, but for fp32 on Hopper, which multiplies TF32 only if the contraction axis of the operands is contiguous: what comes
by TMA is turned on the chip, copies would bring 4 bytes at a time, so the kept part of what does not come so is packed. The loop over the contraction axis
steps through the index (or a tile's columns are those of the index). Where a unit fills whole tiles its start is one number, and operands come by TMA where
their layout allows it; smaller units are tiles of rows that lie apart, read with asynchronous copies. Sums are fp32, no atomics, and every entry of the
result is written by one program.

Legend: a unit is UNIT contiguous entries, `count` units are kept; `sa_m`: a's stride over m, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from approx_compile.kernels.triton import autotune
from approx_compile.kernels.triton.autotune import TileConfig, device_context
from approx_compile.kernels.triton.matmul_kernels import into_kernel, pack_kernel, skip_kernel

# --- what starts them ---

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
"""Configurations for operands of two bytes by major compute capability; for fp32 (tf32) BLOCK_K is half of these."""

BAND_ROWS = 8


def candidate_configs(itemsize: int, unit: int, arch: int) -> list[TileConfig]:
    """Those for a dtype and a sampled contraction axis (unit 0: one that is not sampled). A unit that is no multiple of BLOCK_K but of its half gets that
    half, and twice the stages."""
    made = []
    for c in TILES_OF_16_BITS[arch // 10]:
        k, stages = c.block_k * 2 // itemsize, c.stages
        if unit % k and unit % (k // 2) == 0:
            k, stages = k // 2, min(2 * stages, 8)
        made.append(replace(c, block_k=k, stages=stages))
    return list(dict.fromkeys(made))


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype go through them; those of fp32 where torch's own do (`torch.set_float32_matmul_precision`)."""
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32")


def reads_in_16_bytes(x: Tensor, axis: int, unit: int | None) -> bool:
    """Whether a matrix can be read in pieces of 16 bytes: one stride is 1, the other and the length of a line multiples of 16 (what Triton makes use
    of); and, where only runs of `unit` entries along `axis` are read, so are they."""
    along = 1 if x.stride(1) == 1 else 0
    line = x.stride(1 - along)
    straight = x.stride(along) == 1 and line > 0 and line % 16 == 0 and x.shape[along] % 16 == 0
    return straight and (unit is None or along != axis or unit * x.element_size() % 16 == 0)


def can_skip(a: Tensor, b: Tensor, unit: int) -> bool:
    """Whether `skip` serves these operands: decided by device, dtype, sizes and strides alone."""
    return _can(a, b) and reads_in_16_bytes(a, 1, unit) and reads_in_16_bytes(b, 0, unit)


def can_skip_into(a: Tensor, b: Tensor, unit: int, dim: int) -> bool:
    """Whether `skip_into` serves these operands. The result lies in rows: parts of a row are written in runs like those that are read."""
    if dim == 0:
        return _can(a, b) and reads_in_16_bytes(a, 0, unit) and reads_in_16_bytes(b, 1, None)
    return _can(a, b) and reads_in_16_bytes(a, 0, None) and reads_in_16_bytes(b, 1, unit) and unit * a.element_size() % 16 == 0


def _can(a: Tensor, b: Tensor) -> bool:
    """Lines of the result are written as operands are read."""
    return uses_tensor_cores(a.dtype) and min(*a.shape, *b.shape) > 0 and b.shape[1] % 16 == 0 and autotune.device_limits(a).arch // 10 in TILES_OF_16_BITS


def pack(b: Tensor, idx: Tensor, unit: int, dim: int) -> Tensor:
    """The units `idx` of the rows (dim 0) or columns (dim 1) of b, in columns that are contiguous, and begin at multiples of 64 entries, with zeros between."""
    kept = len(idx) * unit
    k, n = (kept, b.shape[1]) if dim == 0 else (b.shape[0], kept)
    z = b.new_empty(n, -(-k // 64) * 64)
    pack_kernel[z.shape[1] // 32, triton.cdiv(n, 64)](b, z, idx, k, n, *b.stride(), z.stride(0), unit, dim, 32, 64, num_warps=4)
    return z[:, :k].T


def tile_operand(x: Tensor, lines: int, run: int, tma: bool) -> tuple[Any, str]:
    """What a kernel gets for a matrix that it reads in tiles of lines x run: a TMA descriptor of the matrix ("rows") or of its transpose ("columns"), or,
    where its layout allows none, the tensor ("")."""
    for how, view, block in (("rows", x, [lines, run]), ("columns", x.T, [run, lines])):
        if tma and view.stride(1) == 1 and view.stride(0) > 0 and view.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
            return TensorDescriptor(view, list(view.shape), list(view.stride()), block), how
    return x, ""


def contiguous_run(unit: int) -> int:
    """The largest power of two, at most 16, that divides `unit`."""
    return min(unit & -unit, 16)


def skip(
    a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None, config: TileConfig | None = None, tma: bool | None = None
) -> Tensor:
    """Y = A[:, idx] diag(scale) B[idx, :] + bias for a (M, K), b (K, N), none of them empty; scaled entries of a are rounded to its dtype.

    `config` and `tma` are the test's: left out, the one is looked up (`tuning`), and TMA is used where the device has it.
    """
    (m, _), n = a.shape, b.shape[1]
    idx, scale, bias = idx.contiguous(), _packed(scale), _packed(bias)
    y = torch.empty((m, n), dtype=a.dtype, device=a.device)
    hopper = _has_tma(a, tma)
    packed = hopper and a.dtype == torch.float32 and unit * a.element_size() % 64 != 0  # others come by TMA

    def run(c: TileConfig) -> None:
        by_tma = hopper and not packed and unit % c.block_k == 0
        (x, x_tma), (z, z_tma) = tile_operand(a, c.block_m, c.block_k, by_tma), tile_operand(b, c.block_k, c.block_n, by_tma)
        skip_kernel[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n),)](
            x, z, y, idx, scale, bias, m, n, len(idx), *a.stride(), *b.stride(),
            unit, contiguous_run(unit), c.block_m, c.block_n, c.block_k, BAND_ROWS, x_tma, z_tma, packed, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    with device_context(a):
        a, b = (pack(a.T, idx, unit, 0).T, pack(b, idx, unit, 0)) if packed else (a, b)
        what = ("skip", autotune.next_power_of_two(len(idx) * unit), unit, a.dtype, a.stride(1) == 1, b.stride(1) == 1, scale is None, bias is None)
        run(config or _config(skip_kernel, a, m, n, unit, what, run))
    return y


def skip_into(
    a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int, config: TileConfig | None = None, tma: bool | None = None
) -> Tensor:
    """Dim 1: Y[:, idx] = (A B[:, idx]) diag(scale); dim 0: Y[idx, :] = diag(scale) (A[idx, :] B); zeros elsewhere; a (M, L), b (L, N), none of them empty.

    `config` and `tma` as for `skip`.
    """
    y = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    out, idx, scale = y, idx.contiguous(), _packed(scale)
    if dim == 0:  # the transposed product
        a, b, out = b.T, a.T, y.T
    (m, length), n = a.shape, b.shape[1]
    hopper = _has_tma(a, tma)
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
        what = (
            "into",
            dim,
            autotune.next_power_of_two(n),
            autotune.next_power_of_two(length),
            unit,
            a.dtype,
            a.stride(1) == 1,
            b.stride(1) == 1,
            scale is None,
        )
        run(config or _config(into_kernel, a, m, len(idx) * unit, 0, what, run))
    return y


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _has_tma(x: Tensor, given: bool | None) -> bool:
    return autotune.device_limits(x).arch // 10 == 9 if given is None else given


def _config(kernel: Any, a: Tensor, m: int, n: int, unit: int, what: tuple[Any, ...], run: Callable[[TileConfig], None]) -> TileConfig:
    """The configuration for sizes up to the next powers of two."""
    device, size, m, n = autotune.device_limits(a), a.element_size(), autotune.next_power_of_two(m), autotune.next_power_of_two(n)
    return autotune.fastest_config(
        kernel, (*what, m, n), lambda: autotune.promising_configs(candidate_configs(size, unit, device.arch), m, n, size, device), device, run
    )
