"""Launch the kernels of conv_kernels.py: which operands they take, in which tiles, and what runs before and after them.

`output`, `grad_input` and `grad_weight` compute the same as the functions of these names in skip_conv.py. They write to a channels-last result that is given
as the first argument; the other arguments are the same. They return False, and compute nothing, if `unsupported_reason` has a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from approx_compile.kernels.availability import CONV_UNITS
from approx_compile.kernels.triton import autotune
from approx_compile.kernels.triton import conv_kernels as kernels
from approx_compile.kernels.triton.autotune import TileConfig, device_context, next_power_of_two

LARGE_TILES = {8: (), 9: (TileConfig(256, 128, 64, 8, 4),)}
COMMON_TILES = (TileConfig(128, 128, 64, 8, 4), TileConfig(128, 64, 64, 4, 4))
"""Tile configurations for entries of two bytes, by major compute capability and for all; `candidate_configs` derives all others from them."""

BLOCK_K_CHOICES = {"output": (64, 32, 16), "grad_input": (64, 32), "grad_weight": (64, 32)}
"""Entries of the contraction axis that a step may read; that axis is the chosen input channels, the output channels, or the places."""

_MIN_PLACES = 1024
"""Least number of places of a share of a weight gradient's sum. With fewer, adding the shares costs as much as computing them."""


class ConvConstants(NamedTuple):
    """A convolution as compile-time constants of the kernels, whose names these are (legend in conv_kernels.py)."""

    C: int
    O: int
    H: int
    W: int
    HO: int
    WO: int
    KH: int
    KW: int
    SH: int
    SW: int
    PH: int
    PW: int
    DH: int
    DW: int


def conv_constants(
    x: Sequence[int], w: Sequence[int], y: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> ConvConstants:
    """Return the constants of a convolution.

    Args:
        x: Shape of the input, (N, C, H, W).
        w: Shape of the weight, (O, C, kh, kw).
        y: Shape of the output, (N, O, Ho, Wo).
        stride: By height and width.
        padding: By height and width.
        dilation: By height and width.
    """
    return ConvConstants(x[1], y[1], x[2], x[3], y[2], y[3], w[2], w[3], *stride, *padding, *dilation)


def unsupported_reason(product: str, g: ConvConstants, unit: int, idx: Tensor, *operands: Tensor) -> str | None:
    """Say why no kernel takes the operands of a product; None if one does.

    Only devices, shapes, dtypes and strides are read, so the tensors may be fake.

    Args:
        product: "output", "grad_input" or "grad_weight".
        g: The convolution.
        unit: Channels of a unit.
        idx: The chosen units.
        operands: (x, w) for "output", (dy, w) for "grad_input", (x, dy) for "grad_weight".
    """
    dtypes = {t.dtype for t in operands}
    activations = operands if product == "grad_weight" else operands[:1]
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"dtypes are {', '.join(sorted(str(d) for d in dtypes))}: one of bfloat16, float16 and float32 is needed"
    if torch.float32 in dtypes and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return "fp32 without tf32 has no tensor cores: torch.backends.cudnn.conv.fp32_precision is not 'tf32'"
    if any(t.is_cuda and autotune.device_limits(t).arch // 10 not in LARGE_TILES for t in operands):
        return "there are kernels for compute capability 8.x and 9.x"
    if unit not in CONV_UNITS:  # a unit must be whole steps of the loop over the contraction axis
        return f"groups of {unit} channels: there are kernels for {', '.join(map(str, CONV_UNITS))}"
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in activations):
        return "activations are not channels-last"
    if idx.numel() == 0 or any(t.numel() == 0 for t in operands):
        return "there is nothing to compute"
    if operands[0].shape[0] * max(g.H * g.W * g.C, g.HO * g.WO * g.O) >= 2**31:
        return "a tensor has 2**31 entries or more"
    if product == "grad_input" and any(s > 1 and d > 1 for s, d in ((g.SH, g.DH), (g.SW, g.DW))):
        return "stride and dilation are both above 1"
    return None


def candidate_configs(product: str, itemsize: int, length: int, capability: int) -> list[TileConfig]:
    """Return the tile configurations for a product.

    Their step is the one that wastes least at the end of the contraction axis, and the longest of these. For shorter steps more are in flight, and only the
    smallest tile is offered, since it is narrow layers that need them.

    Args:
        product: "output", "grad_input" or "grad_weight".
        itemsize: Bytes of an entry; a step reads at most 128 bytes.
        length: Length of the contraction axis, or of the unit in which it is sampled.
        capability: Major compute capability.
    """
    longest = 128 // itemsize
    step = min((r for r in BLOCK_K_CHOICES[product] if r <= longest), key=lambda r: (-length % r, -r))
    tiles = (*LARGE_TILES[capability], *COMMON_TILES) if step == longest else COMMON_TILES[-1:]
    return [replace(c, block_k=step, stages=min(c.stages * longest // step, 6)) for c in tiles]


def _tuned(product: str, x: Tensor, size: tuple[int, int], length: int, key: tuple[Any, ...], launch: Callable[[TileConfig], None]) -> TileConfig:
    """Look up or time the configuration for a product whose contraction axis has this length (see `candidate_configs`)."""
    return autotune.config_for_result(
        getattr(kernels, product), x, size, key, lambda device: candidate_configs(product, x.itemsize, length, device.arch // 10), launch
    )  # fmt: skip


def output(
    y: Tensor, x: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    config: TileConfig | None = None,
) -> bool:  # fmt: skip
    """Compute y of `skip_conv.output` into y, (N, O, Ho, Wo).

    A weight that has a scale or is not channels-last is packed to its chosen channels first; w scale is then rounded to its dtype.

    Returns:
        Whether a kernel took the operands.
    """
    g = conv_constants(x.shape, w.shape, y.shape, stride, padding, dilation)
    if unsupported_reason("output", g, unit, idx, x, w) is not None:
        return False
    idx, scale = idx.contiguous(), None if scale is None else scale.contiguous()
    with device_context(x):
        packed = scale is not None or not w.is_contiguous(memory_format=torch.channels_last)
        weight = pack_weight(w, idx, scale, unit, inner="input") if packed else w
        over_o, over_taps = weight.shape[1] * g.KH * g.KW, weight.shape[1]
        places = y.shape[0] * g.HO * g.WO
        constants = g._asdict() | {"UNIT": unit, "PACKED": packed}

        def launch(c: TileConfig) -> None:
            grid = (triton.cdiv(places, c.block_m) * triton.cdiv(g.O, c.block_n),)
            kernels.output[grid](x, weight, idx, y, places, idx.numel(), over_o, over_taps, 1, **constants, **launch_constants(c))

        launch(config or _tuned("output", x, (places, g.O), unit, tuple(constants.values()), launch))
    return True


def grad_input(
    dx: Tensor, dy: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], config: TileConfig | None = None,
) -> bool:  # fmt: skip
    """Compute dx of `skip_conv.grad_input` into dx, (N, C, *size).

    A weight in fp32 or not in channels-last is packed first; in fp32 tensor cores need the contraction axis to be contiguous.

    Returns:
        Whether a kernel took the operands.
    """
    g = conv_constants(dx.shape, w.shape, dy.shape, stride, padding, dilation)
    if unsupported_reason("grad_input", g, unit, idx, dy, w) is not None:
        return False
    idx, scale = idx.contiguous(), None if scale is None else scale.contiguous()
    with device_context(dy):
        packed = w.dtype == torch.float32 or not w.is_contiguous(memory_format=torch.channels_last)
        weight = pack_weight(w, idx, None, unit, inner="output") if packed else w
        taps = g.KH * g.KW
        over_c, over_taps, over_o = (taps * g.O, g.O, 1) if packed else (1, g.C, taps * g.C)
        kept = idx.numel() * unit
        places = dx.shape[0] * triton.cdiv(g.H, g.SH) * triton.cdiv(g.W, g.SW)  # of one phase
        constants = g._asdict() | {"UNIT": unit, "PACKED": packed}

        def launch(c: TileConfig) -> None:
            grid = (triton.cdiv(places, c.block_m) * triton.cdiv(kept, c.block_n), g.SH * g.SW)
            kernels.grad_input[grid](dy, weight, idx, scale, dx, places, idx.numel(), over_c, over_taps, over_o, **constants, **launch_constants(c))

        launch(config or _tuned("grad_input", dy, (places, kept), g.O, tuple(constants.values()), launch))
    return True


def grad_weight(
    dw: Tensor, x: Tensor, dy: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    config: TileConfig | None = None, splits: int | None = None,
) -> bool:  # fmt: skip
    """Compute dw of `skip_conv.grad_weight` into dw, (O, C, *kernel).

    The places are divided into shares so that all processors are busy; the shares are then added in order, without atomics.

    Returns:
        Whether a kernel took the operands.
    """
    g = conv_constants(x.shape, dw.shape, dy.shape, stride, padding, dilation)
    if unsupported_reason("grad_weight", g, unit, idx, x, dy) is not None:
        return False
    idx, scale = idx.contiguous(), None if scale is None else scale.contiguous()
    with device_context(x):
        places, taps, kept = dy.shape[0] * g.HO * g.WO, g.KH * g.KW, idx.numel() * unit
        constants = g._asdict() | {"UNIT": unit}

        def launch(c: TileConfig) -> None:
            tiles = triton.cdiv(g.O, c.block_m) * triton.cdiv(kept, c.block_n) * taps
            shares = splits or max(1, min(2 * autotune.device_limits(x).processors // tiles, places // _MIN_PLACES))
            share = triton.cdiv(triton.cdiv(places, shares), c.block_k) * c.block_k
            shares = triton.cdiv(places, share)
            sums = torch.empty(shares, g.O, taps, kept, dtype=torch.float32, device=x.device)
            kernels.grad_weight[tiles, shares](x, dy, idx, sums, places, idx.numel(), share, **constants, **launch_constants(c))
            rows = triton.cdiv(g.O * taps, 32)
            kernels.add_shares[rows, g.C // unit](sums, idx, scale, dw, g.O * taps, idx.numel(), shares, C=g.C, UNIT=unit, BLOCK=32)

        length = next_power_of_two(places)  # rounded, so that the choice does not depend on which batch comes first: a resumed run may begin with another
        launch(config or _tuned("grad_weight", x, (g.O * taps, kept), length, (*constants.values(), length), launch))
    return True


def launch_constants(c: TileConfig) -> dict[str, int]:
    """Return the compile-time arguments of a launch for a configuration."""
    return {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "num_warps": c.warps, "num_stages": c.stages}


def pack_weight(w: Tensor, idx: Tensor, scale: Tensor | None, unit: int, inner: str) -> Tensor:
    """Copy the chosen input channels of a weight, times their scale.

    Args:
        w: The weight, (O, C, kh, kw), with any strides.
        idx: Chosen units of input channels, (n,).
        scale: Their scale, (n,), or None for 1.
        unit: Channels of a unit.
        inner: Which channels are contiguous: "input" (channels-last) or "output" (input channels are then outermost).

    Returns:
        (O, n * unit, kh, kw).
    """
    o, kept, kh, kw = w.shape[0], idx.numel() * unit, w.shape[2], w.shape[3]
    out = w.new_empty(o, kh, kw, kept).permute(0, 3, 1, 2) if inner == "input" else w.new_empty(kept, kh, kw, o).permute(3, 0, 1, 2)
    grid = (idx.numel(), kh * kw, triton.cdiv(o, 64))
    over_o, over_c, _, over_taps = out.stride()
    kernels.pack[grid](w, idx, scale, out, o, *w.stride(), over_o, over_taps, over_c, KW=kw, UNIT=unit, BLOCK=64)
    return out
