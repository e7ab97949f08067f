# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels for 2-D convolutions in channels-last that skip the input channels not chosen, as implicit matrix products.

y, dx and dw are those of skip_conv.py. A tile of places (pixels of the output or the input) is gathered tap by tap from the image and masked at the border.
The channels of a pixel are contiguous, so a chosen group of them is one contiguous read. Sums are fp32.

Names: C input and O output channels; (H, W) input image, (HO, WO) output image; KH x KW taps; S stride, P padding, D dilation by height and width.
A group is UNIT contiguous input channels; `kept` of them are chosen, and `idx` says which. w_n, w_t, w_k are the weight's strides over the columns of the
result, the taps and the contraction axis. PACKED: the weight holds the chosen channels only.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position_of(group, idx, kept):
    """Return the position of a group in idx, -1 if it is not there."""
    place = -1
    for i in tl.range(0, kept, 32, num_stages=1):
        at = i + tl.arange(0, 32)
        entry = tl.load(idx + at, mask=at < kept, other=-1).to(tl.int32)
        place = tl.maximum(place, tl.max(tl.where(entry == group, at, -1), axis=0))
    return place


@triton.jit
def pack(
    w, idx, scale, out, o_size, w_o, w_c, w_h, w_w, out_o, out_t, out_c,
    KW: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the chosen channels of a weight: out[o, t, i UNIT + c] = scale[i] w[o, idx[i] UNIT + c, t], with any strides."""
    i, tap, o = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(idx + i).to(tl.int32)
    c = tl.arange(0, UNIT)
    inside = (o < o_size)[:, None] & (c >= 0)[None, :]
    at = o[:, None] * w_o + (group * UNIT + c)[None, :] * w_c + tap // KW * w_h + tap % KW * w_w
    value = tl.load(w + at, mask=inside)
    if scale is not None:
        value = (value.to(tl.float32) * tl.load(scale + i)).to(value.dtype)
    tl.store(out + o[:, None] * out_o + tap * out_t + (i * UNIT + c)[None, :] * out_c, value, mask=inside)


@triton.jit(do_not_specialize=["places", "kept"])
def output(
    x, w, idx, y, places, kept, w_n, w_t, w_k,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute y (places, O): rows are places of the output, columns output channels; the loop runs over the chosen groups, in each over the taps."""
    tiles: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    parts: tl.constexpr = UNIT // BLOCK_K
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    top = m // WO % HO * SH - PH
    left = m % WO * SW - PW
    row = ((m // (WO * HO) * H + top) * W + left) * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    coming = tl.load(idx)  # loaded one step ahead: a load that waits for another load of its step costs a stage of the pipeline
    for step in range(kept * (parts * KH * KW)):
        tap = step % (KH * KW)
        part = step // (KH * KW)
        group = coming.to(tl.int32)
        coming = tl.load(idx + tl.minimum((step + 1) // (parts * KH * KW), kept - 1))
        c = group * UNIT + part % parts * BLOCK_K
        h = tap // KW * DH
        v = tap % KW * DW
        inside = m < places
        if PH + PW > 0:
            inside &= (top + h >= 0) & (top + h < H) & (left + v >= 0) & (left + v < W)
        a = tl.load(x + (row + (h * W + v) * C)[:, None] + (c + k)[None, :], mask=inside[:, None], other=0.0)
        if PACKED:
            c = part * BLOCK_K
        b = tl.load(w + tap * w_t + o[None, :] * w_n + (c + k)[:, None] * w_k, mask=(o < O)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32")
    tl.store(y + m[:, None] * O + o[None, :], acc.to(y.dtype.element_ty), mask=(m < places)[:, None] & (o < O)[None, :])


@triton.jit(do_not_specialize=["places", "kept"])
def grad_input(
    dy, w, idx, scale, dx, places, kept, w_n, w_t, w_k,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dx (places, C): rows are input pixels, columns the chosen channels; each program first writes its share of the zeros in the other channels.

    Program axis 1 is the phase (h mod SH, w mod SW) of the pixels: all pixels of a phase meet the same taps, every SH-th and SW-th one from the first that
    fits. D must be 1 where S > 1.
    """
    tiles = tl.cdiv(kept * UNIT, BLOCK_N)
    tile = tl.program_id(0) % tiles
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    HP: tl.constexpr = (H + SH - 1) // SH
    WP: tl.constexpr = (W + SW - 1) // SW
    phase_h = 0
    phase_w = 0
    fit_h = KH
    fit_w = KW
    if SH * SW > 1:
        phase_h = tl.program_id(1) // SW
        phase_w = tl.program_id(1) % SW
        fit_h = tl.maximum(tl.cdiv(KH - (phase_h + PH) % SH, SH), 0)
        fit_w = tl.maximum(tl.cdiv(KW - (phase_w + PW) % SW, SW), 0)
    n = m // (WP * HP)
    h = m // WP % HP * SH + phase_h
    v = m % WP * SW + phase_w
    pixel = ((n * H + h) * W + v) * C
    real = (m < places) & (h < H) & (v < W)
    for group in tl.range(tile, C // UNIT, tiles, num_stages=1):  # these stores overlap with the products
        if position_of(group, idx, kept) < 0:
            zeros = tl.zeros((BLOCK_M, UNIT), dx.dtype.element_ty)
            tl.store(dx + pixel[:, None] + (group * UNIT + tl.arange(0, UNIT))[None, :], zeros, mask=real[:, None])
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < kept * UNIT
    c = tl.load(idx + column // UNIT, mask=valid, other=0).to(tl.int32) * UNIT + column % UNIT
    w_column = column if PACKED else c
    first_h = (phase_h + PH) % SH
    first_w = (phase_w + PW) % SW
    bottom = (h + PH - first_h) // SH
    right = (v + PW - first_w) // SW
    row = ((n * HO + bottom) * WO + right) * O
    blocks: tl.constexpr = (O + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(fit_h * fit_w * blocks):
        k = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        i = step // blocks // fit_w
        j = step // blocks % fit_w
        tap = (first_h + i * SH) * KW + first_w + j * SW
        up = i * DH
        back = j * DW
        inside = real & (bottom - up >= 0) & (bottom - up < HO) & (right - back >= 0) & (right - back < WO)
        to_a = dy + (row - (up * WO + back) * O)[:, None] + k[None, :]
        to_b = w + tap * w_t + w_column[None, :] * w_n + k[:, None] * w_k
        if O % BLOCK_K == 0:
            a = tl.load(to_a, mask=inside[:, None], other=0.0)
            b = tl.load(to_b, mask=valid[None, :], other=0.0)
        else:
            a = tl.load(to_a, mask=inside[:, None] & (k < O)[None, :], other=0.0)
            b = tl.load(to_b, mask=valid[None, :] & (k < O)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32")
    if scale is not None:
        acc *= tl.load(scale + column // UNIT, mask=valid, other=0.0)[None, :]
    tl.store(dx + pixel[:, None] + c[None, :], acc.to(dx.dtype.element_ty), mask=real[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["places", "kept"])
def grad_weight(
    x, dy, idx, sums, places, kept, share,
    C: tl.constexpr, O: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute sums (shares, O, taps, kept UNIT): each program of axis 1 sums over its `share` of the places, a multiple of BLOCK_K."""
    columns = kept * UNIT
    across = tl.cdiv(columns, BLOCK_N)
    tap = tl.program_id(0) // across % (KH * KW)
    o = tl.program_id(0) // across // (KH * KW) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < columns
    c = tl.load(idx + column // UNIT, mask=valid, other=0).to(tl.int32) * UNIT + column % UNIT
    h0 = tap // KW * DH - PH
    v0 = tap % KW * DW - PW
    begin = tl.program_id(1) * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, tl.minimum(begin + share, places), BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        h = p // WO % HO * SH + h0
        v = p % WO * SW + v0
        real = p < places
        inside = real
        if PH + PW > 0:
            inside = real & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        row = ((p // (WO * HO) * H + h) * W + v) * C
        a = tl.load(dy + (p * O)[None, :] + o[:, None], mask=real[None, :] & (o < O)[:, None], other=0.0)
        b = tl.load(x + row[:, None] + c[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32")
    at = ((tl.program_id(1) * O + o) * (KH * KW) + tap) * columns
    tl.store(sums + at[:, None] + column[None, :], acc, mask=(o < O)[:, None] & valid[None, :])


@triton.jit
def add_shares(sums, idx, scale, dw, rows, kept, shares, C: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute dw (rows = O taps, C): the sums of all shares, added in order, times the scale, for chosen groups, and zeros for the others."""
    group = tl.program_id(1)
    place = position_of(group, idx, kept)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, UNIT)
    acc = tl.zeros((BLOCK, UNIT), tl.float32)
    if place >= 0:
        for s in range(shares):
            acc += tl.load(sums + ((s * rows + r) * kept + place)[:, None] * UNIT + c[None, :], mask=(r < rows)[:, None], other=0.0)
        if scale is not None:
            acc *= tl.load(scale + place)
    tl.store(dw + r[:, None] * C + (group * UNIT + c)[None, :], acc.to(dw.dtype.element_ty), mask=(r < rows)[:, None])
