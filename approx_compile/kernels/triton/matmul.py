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
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from approx_compile.kernels.triton import autotune
from approx_compile.kernels.triton.autotune import TileConfig, device_context


@triton.jit
def program_tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """This program's tile, in an order that keeps GROUP rows of tiles close in time: they share tiles of b in the L2 cache."""
    pid = tl.program_id(0)
    band = GROUP * tiles_n
    first = pid // band * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + (pid % band) % rows, (pid % band) // rows


@triton.jit
def dropped(idx, count, d, STEPS: tl.constexpr):
    """The d-th of the units that are not among the `count` sorted ones: d plus how many kept ones lie before it, by bisection of idx[j] - j."""
    low = tl.zeros_like(d)
    high = low + count
    for _ in tl.range(STEPS, num_stages=1):
        middle = (low + high) // 2
        open = low < high
        before = open & (tl.load(idx + middle, mask=open, other=0) - middle <= d)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & ~before, middle, high)
    return d + low


@triton.jit
def skip_kernel(
    a, b, y, idx, scale, bias, M, N, count, sa_m, sa_k, sb_k, sb_n,
    UNIT: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`A_TMA`, `B_TMA`: "rows" where a TMA descriptor stands in place of the pointer, "columns" where one of the operand's transpose does (UNIT is then a
    multiple of BLOCK_K), else "". `RUN`: a power of two that divides UNIT, for the width of loads. `PACKED`: a and b have the kept entries only, then zeros up
    to a multiple of BLOCK_K."""
    tile_m, tile_n = program_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    rm, rn, rk = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = m0 + rm < M, n0 + rn < N
    if A_TMA == "":
        a += m0.to(tl.int64) * sa_m
    if B_TMA == "":
        b += n0.to(tl.int64) * sb_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    RUNS: tl.constexpr = UNIT % BLOCK_K == 0
    kept = count * UNIT
    last = tl.cdiv(kept, BLOCK_K) - 1
    at = tl.load(idx) if RUNS else tl.load(idx + rk // UNIT, mask=rk < kept, other=0)
    for step in range(last + 1):  # `at` was loaded in the step before: a load that waits for another in its step costs a stage of the pipeline
        following = min(step + 1, last)
        if RUNS:
            start = at * UNIT + step % (UNIT // BLOCK_K) * BLOCK_K
            at = tl.load(idx + following // (UNIT // BLOCK_K))
            if A_TMA == "rows":
                x = a.load([m0, start.to(tl.int32)])
            elif A_TMA == "columns":
                x = a.load([start.to(tl.int32), m0]).T
            else:
                x = tl.load(a + start * sa_k + rm[:, None] * sa_m + rk[None, :] * sa_k, mask=in_m[:, None], other=0.0)
            if B_TMA == "rows":
                z = b.load([start.to(tl.int32), n0])
            elif B_TMA == "columns":
                z = b.load([n0, start.to(tl.int32)]).T
            else:
                z = tl.load(b + start * sb_k + rk[:, None] * sb_k + rn[None, :] * sb_n, mask=in_n[None, :], other=0.0)
            if scale is not None:
                x = (x * tl.load(scale + step // (UNIT // BLOCK_K))).to(x.dtype)
        else:
            entry = step * BLOCK_K + rk
            in_k = entry < kept
            pos = tl.max_contiguous(tl.multiple_of(at * UNIT + entry % UNIT, RUN), RUN)
            coming = following * BLOCK_K + rk
            at = tl.load(idx + coming // UNIT, mask=coming < kept, other=0)
            if PACKED:
                x = tl.load(a + rm[:, None] * sa_m + entry[None, :] * sa_k, mask=in_m[:, None], other=0.0)
                z = tl.load(b + entry[:, None] * sb_k + rn[None, :] * sb_n, mask=in_n[None, :], other=0.0)
            else:
                x = tl.load(a + rm[:, None] * sa_m + pos[None, :] * sa_k, mask=in_m[:, None] & in_k[None, :], other=0.0)
                z = tl.load(b + pos[:, None] * sb_k + rn[None, :] * sb_n, mask=in_k[:, None] & in_n[None, :], other=0.0)
            if scale is not None:
                x = (x * tl.load(scale + entry // UNIT, mask=in_k, other=0.0)[None, :]).to(x.dtype)
        acc = tl.dot(x, z, acc, input_precision="tf32")
    if bias is not None:
        acc += tl.load(bias + n0 + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out = y + m0.to(tl.int64) * N + n0 + rm[:, None] * N + rn[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def into_kernel(
    a, b, y, idx, scale, M, N, L, count, sa_m, sa_l, sb_l, sb_n, sy_m, sy_n,
    UNIT: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    A_TMA: tl.constexpr, STEPS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`PACKED`: b has the kept columns only. A program first writes its share of the zeros, whose stores then run beside its products."""
    tiles_n = tl.cdiv(count * UNIT, BLOCK_N)
    tile_m, tile_n = program_tile(tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    m0 = tile_m * BLOCK_M
    rm, rn, rk = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m = m0 + rm < M
    y += m0.to(tl.int64) * sy_m

    others = N - count * UNIT
    for chunk in tl.range(tile_n, tl.cdiv(others, BLOCK_N), tiles_n, num_stages=1):
        entry = chunk * BLOCK_N + rn
        in_n = entry < others
        col = dropped(idx, count, (entry // UNIT).to(tl.int64), STEPS) * UNIT + entry % UNIT
        col = tl.max_contiguous(tl.multiple_of(col, RUN), RUN)
        zero = tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty)
        tl.store(y + rm[:, None] * sy_m + col[None, :] * sy_n, zero, mask=in_m[:, None] & in_n[None, :])

    entry = tile_n * BLOCK_N + rn
    in_n = entry < count * UNIT
    col = tl.load(idx + entry // UNIT, mask=in_n, other=0) * UNIT + entry % UNIT
    col = tl.max_contiguous(tl.multiple_of(col, RUN), RUN)
    columns = b + rk[:, None] * sb_l + (entry.to(tl.int64) if PACKED else col)[None, :] * sb_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(L, BLOCK_K)):
        l0 = step * BLOCK_K
        in_l = l0 + rk < L
        if A_TMA == "rows":
            x = a.load([m0, l0])
        elif A_TMA == "columns":
            x = a.load([l0, m0]).T
        else:
            rows = a + m0.to(tl.int64) * sa_m + l0.to(tl.int64) * sa_l
            x = tl.load(rows + rm[:, None] * sa_m + rk[None, :] * sa_l, mask=in_m[:, None] & in_l[None, :], other=0.0)
        z = tl.load(columns + l0.to(tl.int64) * sb_l, mask=in_l[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x, z, acc, input_precision="tf32")
    if scale is not None:
        acc *= tl.load(scale + entry // UNIT, mask=in_n, other=0.0)[None, :]
    tl.store(y + rm[:, None] * sy_m + col[None, :] * sy_n, acc.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def pack_kernel(
    b, z, idx, K, N, sb_k, sb_n, sz, UNIT: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """K and N count what is kept; `DIM`: the one of b's axes on which idx chooses. Zeros from K to the line's end, sz."""
    k, n = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_n = k < K, n < N
    if DIM == 0:
        row, col = tl.load(idx + k // UNIT, mask=in_k, other=0) * UNIT + k % UNIT, n.to(tl.int64)
    else:
        row, col = k.to(tl.int64), tl.load(idx + n // UNIT, mask=in_n, other=0) * UNIT + n % UNIT
    tile = tl.load(b + row[:, None] * sb_k + col[None, :] * sb_n, mask=in_k[:, None] & in_n[None, :], other=0.0)
    tl.store(z + n[:, None].to(tl.int64) * sz + k[None, :], tl.trans(tile), mask=in_n[:, None] & (k < sz)[None, :])


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
