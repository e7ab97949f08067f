# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels that select units: squared norms in one read of a matrix, and the k largest scores in one program, each with its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from approx_compile.kernels.triton.autotune import device_context

MAX_UNITS = 8192
"""Scores that one program ranks at most; more are sorted faster."""


@triton.jit
def topk_kernel(score, idx, units, k, BLOCK: tl.constexpr):
    """Write the indices of the k largest of `units` scores to idx, ascending; NaN ranks above inf, and of equal scores the first are taken.

    Scores are mapped to integers in the same order. The k-th largest integer t is found bit by bit: t keeps a bit if at least k integers are not below it.
    All scores above t are chosen, and the first of those equal to t until there are k.
    """
    place = tl.arange(0, BLOCK)
    there = place < units
    value = tl.load(score + place, mask=there, other=0.0) + 0.0  # -0 + 0 = 0
    bits = value.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    order = tl.where(value != value, 0xFFFFFFFF, order)
    order = tl.where(there, order, -1)
    t = tl.zeros((), tl.int64)
    for step in tl.range(32, num_stages=1):
        with_bit = t | (tl.full((), 1, tl.int64) << (31 - step))
        t = tl.where(tl.sum((order >= with_bit).to(tl.int32)) >= k, with_bit, t)
    above = order > t
    equal = order == t
    left = k - tl.sum(above.to(tl.int32))
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= left))
    tl.store(idx + tl.cumsum(chosen.to(tl.int32)) - 1, place.to(tl.int64), mask=chosen)


@triton.jit
def norms_sq_kernel(x, part, kept, summed, chunk, sx_kept, sx_summed, BLOCK_KEPT: tl.constexpr, BLOCK_SUMMED: tl.constexpr):
    """Compute partial sums of squares: part[c, i] = sum of x[i, j]^2 over the j of chunk c."""
    i = tl.program_id(0) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    first = tl.program_id(1) * chunk
    rows = x + i[:, None].to(tl.int64) * sx_kept
    acc = tl.zeros((BLOCK_KEPT, BLOCK_SUMMED), tl.float32)
    for start in range(first, min(first + chunk, summed), BLOCK_SUMMED):
        j = start + tl.arange(0, BLOCK_SUMMED)
        v = tl.load(rows + j[None, :].to(tl.int64) * sx_summed, mask=(i[:, None] < kept) & (j[None, :] < summed), other=0.0).to(tl.float32)
        acc += v * v
    tl.store(part + tl.program_id(1).to(tl.int64) * kept + i, tl.sum(acc, 1), mask=i < kept)


def largest_indices(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores.

    Args:
        score: (units,) fp32, at most `MAX_UNITS`.
        k: Number of indices, at least 1.

    Returns:
        (k,) int64, ascending.
    """
    idx = torch.empty(k, dtype=torch.int64, device=score.device)
    units = score.shape[0]
    with device_context(score):
        block = max(triton.next_power_of_2(units), 128)
        topk_kernel[(1,)](score.contiguous(), idx, units, k, block, num_warps=min(max(block // 256, 1), 16))
    return idx


def norms_sq(x: Tensor, dim: int, group: int, programs: int = 1024) -> Tensor:
    """Return sums of squares along the other dim, over `group` entries each along this one.

    About `programs` programs read x once, each computing a part of a sum; the parts are then added, always in the same order.

    Args:
        x: (R, C), not empty.
        dim: 0 or 1.
        group: Contiguous entries of a unit; entries at the end that fill no unit are left out.
        programs: About how many programs read x.

    Returns:
        (R // group,) for dim 0, (C // group,) for dim 1, fp32.
    """
    kept, summed = x.shape[dim], x.shape[1 - dim]
    block_kept, block_summed = (128, 32) if x.stride(dim) == 1 else (16, 256)  # neighbours in memory are read by neighbouring threads
    tiles = triton.cdiv(kept, block_kept)
    chunk = triton.cdiv(triton.cdiv(summed, triton.cdiv(programs, tiles)), block_summed) * block_summed
    parts = triton.cdiv(summed, chunk)
    part = torch.empty((parts, kept), dtype=torch.float32, device=x.device)
    with device_context(x):
        norms_sq_kernel[(tiles, parts)](x, part, kept, summed, chunk, x.stride(dim), x.stride(1 - dim), block_kept, block_summed, num_warps=8)
    if parts == group == 1:
        return part[0]
    units = kept // group
    return part[:, : units * group].view(parts, units, group).sum((0, 2))
