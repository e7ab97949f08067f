# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels for products of matrices that read or write only chosen units of one axis.

| kernel | sum | chosen |
|---|---|---|
| `skip_kernel` | y[m, n] = sum over the kept entries p of a[m, p] scale_p b[p, n] (+ bias[n]) | entries of the contraction axis |
| `into_kernel` | y[m, p] = scale_p sum over l of a[m, l] b[l, p] for the kept p, zero for the others | columns of the result (rows: its transpose) |
| `pack_kernel` | z[n, k] = b[k, n] of the kept k or n | an operand that Hopper cannot multiply in its own layout |

The loop over the contraction axis steps through the index; in `into_kernel` the columns of a tile are those of the index. If a unit fills whole tiles, a tile
begins at one number, and operands are read by TMA where their layout allows it. Smaller units make tiles of scattered rows, which are read with asynchronous
copies. Sums are fp32 without atomics, and every entry of the result is written by one program.

Operands are not gathered into memory first, with one exception: fp32 on Hopper, which multiplies TF32 only if the contraction axis of both operands is
contiguous. Tiles that come by TMA are transposed on the chip, but copies would move 4 bytes at a time, so the kept part of other operands is packed first.

Names: a unit is UNIT contiguous entries, `count` units are kept; `sa_m` is a's stride over m, and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the row and column of this program's tile; GROUP rows of tiles run close in time, so that they share tiles of b in the L2 cache."""
    pid = tl.program_id(0)
    band = GROUP * tiles_n
    first = pid // band * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + (pid % band) % rows, (pid % band) // rows


@triton.jit
def dropped(idx, count, d, STEPS: tl.constexpr):
    """Return the d-th unit that is not among the `count` sorted units of idx: d plus the number of kept units before it, by bisection of idx[j] - j."""
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
    """Compute y = a[:, idx] diag(scale) b[idx, :] + bias, one tile of y per program.

    Operands, sizes and constants:
        a: (M, K), a pointer or a TMA descriptor.
        b: (K, N), the same.
        y: (M, N), contiguous.
        idx: (count,) int64, sorted.
        scale: (count,) fp32, or None.
        bias: (N,), or None.
        M: Rows of the result.
        N: Columns of the result.
        count: Kept units.
        sa_m: Stride of a over m; likewise sa_k, sb_k and sb_n.
        UNIT: Entries of a unit.
        RUN: A power of two that divides UNIT; tells the compiler how wide loads may be.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Columns of a tile.
        BLOCK_K: Entries of the contraction axis of a step.
        GROUP: Rows of tiles of a band (`program_tile`).
        A_TMA: "rows" if a is a TMA descriptor, "columns" if it is one of the transpose (UNIT is then a multiple of BLOCK_K), "" if it is a pointer.
        B_TMA: The same for b.
        PACKED: Whether a and b hold the kept entries only, then zeros up to a multiple of BLOCK_K.
    """
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
    for step in range(last + 1):  # `at` was loaded one step earlier: a load that waits for another load of its step costs a stage of the pipeline
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
    """Compute y[:, idx] = (a b[:, idx]) diag(scale) and zeros elsewhere, one tile of kept columns per program.

    A program first writes its share of the zeros, so that these stores overlap with its products.

    Operands, sizes and constants:
        a: (M, L), a pointer or a TMA descriptor.
        b: (L, N), or with PACKED its kept columns.
        y: (M, N).
        idx: (count,) int64, sorted.
        scale: (count,) fp32, or None.
        M: Rows of the result.
        N: Columns of the result.
        L: Length of the contraction axis.
        count: Kept units.
        sa_m: Stride of a over m; likewise sa_l, sb_l, sb_n, sy_m and sy_n.
        UNIT: Entries of a unit.
        RUN: A power of two that divides UNIT; tells the compiler how wide loads and stores may be.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Columns of a tile.
        BLOCK_K: Entries of the contraction axis of a step.
        GROUP: Rows of tiles of a band (`program_tile`).
        A_TMA: As for `skip_kernel`.
        STEPS: Steps of the bisection in `dropped`.
        PACKED: Whether b holds the kept columns only.
    """
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
    """Copy the kept part of b, transposed: z[n, k] = b[k, n], with zeros from K up to the length sz of z's rows.

    K and N count the kept entries of b's axes; DIM is the axis on which idx chooses.
    """
    k, n = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_n = k < K, n < N
    if DIM == 0:
        row, col = tl.load(idx + k // UNIT, mask=in_k, other=0) * UNIT + k % UNIT, n.to(tl.int64)
    else:
        row, col = k.to(tl.int64), tl.load(idx + n // UNIT, mask=in_n, other=0) * UNIT + n % UNIT
    tile = tl.load(b + row[:, None] * sb_k + col[None, :] * sb_n, mask=in_k[:, None] & in_n[None, :], other=0.0)
    tl.store(z + n[:, None].to(tl.int64) * sz + k[None, :], tl.trans(tile), mask=in_n[:, None] & (k < sz)[None, :])
