"""What starts the kernels of conv_kernels.py: which operands they take, in which tiles, and what runs before and after.

`output`, `grad_input` and `grad_weight` compute what the functions of those names in kernels/skip_conv.py do, into a result made before (channels-last),
and take the same arguments after it. They return False, and do nothing, where `unsupported_reason` has a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from approx_compile.kernels.availability import CONV_UNITS
from approx_compile.kernels.triton import conv_kernels as kernels
from approx_compile.kernels.triton.autotune import TileConfig, device_context, device_limits, fastest_config, next_power_of_two, promising_configs

LARGE_TILES = {8: (), 9: (TileConfig(256, 128, 64, 8, 4),)}
COMMON_TILES = (TileConfig(128, 128, 64, 8, 4), TileConfig(128, 64, 64, 4, 4))
"""Tiles for entries of two bytes, by the major compute capability and for all; `candidate_configs` makes the others from them."""

BLOCK_K_CHOICES = {"output": (64, 32, 16), "grad_input": (64, 32), "grad_weight": (64, 32)}
"""Entries of the contraction axis that a step may read: chosen input channels, output channels, places."""

_PLACES = 1024
"""Places that a share of a weight gradient's sum has at least: less, and adding up the shares costs as much."""


class ConvConstants(NamedTuple):
    """Channels, image and its output, taps, stride, padding, dilation, named as in the kernels."""

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
    """From the shapes of the input, the weight and the output."""
    return ConvConstants(x[1], y[1], x[2], x[3], y[2], y[3], w[2], w[3], *stride, *padding, *dilation)


def unsupported_reason(product: str, g: ConvConstants, unit: int, idx: Tensor, *operands: Tensor) -> str | None:
    """Why there is no kernel for a product of such operands, (x, w) for "output", (dy, w) for "grad_input", (x, dy) for "grad_weight"; None: there is one.

    Depends on devices, shapes, dtypes and strides only, so fake tensors will do.
    """
    dtypes = {t.dtype for t in operands}
    activations = operands if product == "grad_weight" else operands[:1]
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"dtypes are {', '.join(sorted(str(d) for d in dtypes))}: one of bfloat16, float16 and float32 is needed"
    if torch.float32 in dtypes and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return "fp32 without tf32 has no tensor cores: torch.backends.cudnn.conv.fp32_precision is not 'tf32'"
    if any(t.is_cuda and device_limits(t).arch // 10 not in LARGE_TILES for t in operands):
        return "there are kernels for compute capability 8.x and 9.x"
    if unit not in CONV_UNITS:  # whole steps of the loop over the contraction axis
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
    """Those whose steps exceed `length`, the contraction axis or the unit in which it is sampled, least at its end; for fp32 a step is 32 at most.

    Shorter steps have more of them in flight, and the smallest tile.
    """
    longest = 128 // itemsize
    run = min((r for r in BLOCK_K_CHOICES[product] if r <= longest), key=lambda r: (-length % r, -r))
    tiles = (*LARGE_TILES[capability], *COMMON_TILES) if run == longest else COMMON_TILES[-1:]  # short steps are those of narrow layers
    return [replace(c, block_k=run, stages=min(c.stages * longest // run, 6)) for c in tiles]


def _best(product: str, x: Tensor, size: tuple[int, int], length: int, key: tuple[Any, ...], launch: Callable[[TileConfig], None]) -> TileConfig:
    """The configuration for a result of `size` rows and columns, the same up to the next powers of two."""
    device, itemsize = device_limits(x), x.itemsize
    m, n = next_power_of_two(size[0]), next_power_of_two(size[1])
    return fastest_config(
        getattr(kernels, product), (*key, m, n, x.dtype),
        lambda: promising_configs(candidate_configs(product, itemsize, length, device.arch // 10), m, n, itemsize, device), device, launch,
    )  # fmt: skip


def output(
    y: Tensor, x: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    config: TileConfig | None = None,
) -> bool:  # fmt: skip
    """y (N, O, Ho, Wo). A weight that has a scale or is not channels-last is first packed to its chosen channels, w scale rounded to its dtype."""
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

        launch(config or _best("output", x, (places, g.O), unit, tuple(constants.values()), launch))
    return True


def grad_input(
    dx: Tensor, dy: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], config: TileConfig | None = None,
) -> bool:  # fmt: skip
    """dx (N, C, *size). fp32 weights are packed too: tensor cores want their contraction axis contiguous."""
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

        launch(config or _best("grad_input", dy, (places, kept), g.O, tuple(constants.values()), launch))
    return True


def grad_weight(
    dw: Tensor, x: Tensor, dy: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    config: TileConfig | None = None, splits: int | None = None,
) -> bool:  # fmt: skip
    """dw (O, C, *kernel). The places are shared out so that all processors work, then the shares are added up in their order: no atomics."""
    g = conv_constants(x.shape, dw.shape, dy.shape, stride, padding, dilation)
    if unsupported_reason("grad_weight", g, unit, idx, x, dy) is not None:
        return False
    idx, scale = idx.contiguous(), None if scale is None else scale.contiguous()
    with device_context(x):
        places, taps, kept = dy.shape[0] * g.HO * g.WO, g.KH * g.KW, idx.numel() * unit
        constants = g._asdict() | {"UNIT": unit}

        def launch(c: TileConfig) -> None:
            tiles = triton.cdiv(g.O, c.block_m) * triton.cdiv(kept, c.block_n) * taps
            shares = splits or max(1, min(2 * device_limits(x).processors // tiles, places // _PLACES))
            share = triton.cdiv(triton.cdiv(places, shares), c.block_k) * c.block_k
            shares = triton.cdiv(places, share)
            sums = torch.empty(shares, g.O, taps, kept, dtype=torch.float32, device=x.device)
            kernels.grad_weight[tiles, shares](x, dy, idx, sums, places, idx.numel(), share, **constants, **launch_constants(c))
            rows = triton.cdiv(g.O * taps, 32)
            kernels.add_shares[rows, g.C // unit](sums, idx, scale, dw, g.O * taps, idx.numel(), shares, C=g.C, UNIT=unit, BLOCK=32)

        length = next_power_of_two(places)  # or the first batch would decide for others, and a resumed run might begin with another
        launch(config or _best("grad_weight", x, (g.O * taps, kept), length, (*constants.values(), length), launch))
    return True


def launch_constants(c: TileConfig) -> dict[str, int]:
    """A launch's compile-time arguments for a configuration."""
    return {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "num_warps": c.warps, "num_stages": c.stages}


def pack_weight(w: Tensor, idx: Tensor, scale: Tensor | None, unit: int, inner: str) -> Tensor:
    """The chosen input channels of a weight of any strides, times their scale: (O, kept, kh, kw), channels-last with `inner` "input", or output
    channels contiguous and input channels outermost with "output"."""
    o, kept, kh, kw = w.shape[0], idx.numel() * unit, w.shape[2], w.shape[3]
    out = w.new_empty(o, kh, kw, kept).permute(0, 3, 1, 2) if inner == "input" else w.new_empty(kept, kh, kw, o).permute(3, 0, 1, 2)
    grid = (idx.numel(), kh * kw, triton.cdiv(o, 64))
    over_o, over_c, _, over_taps = out.stride()
    kernels.pack[grid](w, idx, scale, out, o, *w.stride(), over_o, over_taps, over_c, KW=kw, UNIT=unit, BLOCK=64)
    return out
