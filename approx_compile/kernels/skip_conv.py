"""Convolutions that compute with chosen input channels only, as custom ops, and their references in readable torch.

| op | result |
|---|---|
| `skip_conv(x, w, ..)` | y = conv(x[:, idx], w[:, idx] scale), (N, O, Ho, Wo) |
| `skip_conv_input(dy, w, ..)` | dx[:, idx] = scale conv_input(dy, w[:, idx]), zeros elsewhere, (N, C, *size) |
| `skip_conv_weight(x, dy, ..)` | dw[:, idx] = scale conv_weight(x[:, idx], dy), zeros elsewhere, (O, C, *kernel) |

Convolutions are 2-D, of one group and not transposed: x (N, C, H, W), w (O, C, kh, kw), dy (N, O, Ho, Wo), all of one dtype. Results are channels-last,
whatever the operands are. `idx` (n,), int64, sorted and distinct, counts units of `unit` contiguous channels, of which C is a multiple. `scale` is (n,), fp32,
or None for 1. Dropped channels are never read, so a NaN in them does not spread. The ops raise ValueError for operands that do not fit together.

On a CPU an op runs its reference: `output`, `grad_input` or `grad_weight` below. On a GPU it runs the function of the same name in triton/conv_launch.py
where that takes the operands' shapes, dtypes and strides, else the reference as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approx_compile.kernels.gather import Axis, take, untake
from approx_compile.kernels.skip_matmul import check_index, triton_module

_CHANNELS = Axis(1)


def output(
    x: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Compute y of `skip_conv`; the scale is multiplied into w in fp32 and the product rounded to w's dtype.

    Args:
        x: Input, (N, C, H, W).
        w: Weight, (O, C, kh, kw).
        idx: Units of input channels that are used, (n,).
        scale: Their scale, (n,), or None.
        unit: Channels of a unit.
        stride: By height and width.
        padding: By height and width.
        dilation: By height and width.

    Returns:
        (N, O, Ho, Wo), channels-last.
    """
    kept = take(x, _CHANNELS, idx, None, unit), take(w, _CHANNELS, idx, scale, unit)
    return _channels_last(torch.ops.aten.convolution(*kept, None, stride, padding, dilation, False, [0, 0], 1))


def grad_input(
    dy: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Compute dx of `skip_conv_input`.

    Args:
        dy: Gradient of the output, (N, O, Ho, Wo).
        w: Weight, (O, C, kh, kw).
        idx: Units of input channels that are computed, (n,).
        scale: Their scale, (n,), or None; it multiplies the result.
        unit: Channels of a unit.
        size: Height and width of the input.
        stride: By height and width.
        padding: By height and width.
        dilation: By height and width.

    Returns:
        (N, C, *size), channels-last, with zeros in the other channels.
    """
    part = take(w, _CHANNELS, idx, None, unit)
    shape_only = dy.new_empty(1).expand(dy.shape[0], part.shape[1], *size)
    dx = torch.ops.aten.convolution_backward(dy, shape_only, part, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False])[0]
    return _channels_last(untake(dx, _CHANNELS, idx, scale, unit, w.shape[1]))


def grad_weight(
    x: Tensor, dy: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Compute dw of `skip_conv_weight`.

    Args:
        x: Input, (N, C, H, W).
        dy: Gradient of the output, (N, O, Ho, Wo).
        idx: Units of input channels that are computed, (n,).
        scale: Their scale, (n,), or None; it multiplies the result.
        unit: Channels of a unit.
        kernel: Height and width of the kernel.
        stride: By height and width.
        padding: By height and width.
        dilation: By height and width.

    Returns:
        (O, C, *kernel), channels-last, with zeros in the other channels.
    """
    part = take(x, _CHANNELS, idx, None, unit)
    shape_only = x.new_empty(1).expand(dy.shape[1], part.shape[1], *kernel)
    dw = torch.ops.aten.convolution_backward(dy, part, shape_only, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False])[1]
    return _channels_last(untake(dw, _CHANNELS, idx, scale, unit, x.shape[1]))


def empty_output(x: Tensor, w: Tensor, idx: Tensor, scale: Any, unit: int, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Allocate the result of `output`; takes the same arguments. Also the fake of its op."""
    taps = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    return _empty(x, x.shape[0], w.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in taps))


def empty_grad_input(dy: Tensor, w: Tensor, idx: Tensor, scale: Any, unit: int, size: Any, *geometry: Any) -> Tensor:
    """Allocate the result of `grad_input`; takes the same arguments. Also the fake of its op."""
    return _empty(dy, dy.shape[0], w.shape[1], *size)


def empty_grad_weight(x: Tensor, dy: Tensor, idx: Tensor, scale: Any, unit: int, kernel: Any, *geometry: Any) -> Tensor:
    """Allocate the result of `grad_weight`; takes the same arguments. Also the fake of its op."""
    return _empty(x, dy.shape[1], x.shape[1], *kernel)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    """Return x with the strides that `_empty` gives its shape, also for dims of size 1, whose strides channels-last leaves open."""
    expected = _empty(x, *x.shape)
    return x if x.stride() == expected.stride() else expected.copy_(x)


def _checked(function: Callable[..., Tensor], product: str) -> Callable[..., Tensor]:
    """Wrap a function of a product so that operands that do not fit together raise a ValueError which says what does not."""
    common = {"output": (1, 1), "grad_input": (1, 0), "grad_weight": (0, 0)}[product]  # dims of the two operands that are the same axis

    @wraps(function)
    def run(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, *rest: Any) -> Tensor:
        if a.dim() != 4 or b.dim() != 4 or a.shape[common[0]] != b.shape[common[1]] or (a.dtype, a.device) != (b.dtype, b.device):
            raise ValueError(
                f"operands {tuple(a.shape)} {a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}; "
                "expected two of x (N, C, H, W), w (O, C, kh, kw) and dy (N, O, Ho, Wo), of one dtype, on one device; "
                "1-D and 3-D convolutions, and those in groups, have no op of this kind"
            )
        check_index(idx, scale, unit, (b if product == "grad_input" else a).shape[1], a.device)
        return function(a, b, idx, scale, unit, *rest)

    return run


def triton_or_reference(reference: Callable[..., Tensor], empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that runs the Triton kernel named like the reference where it takes the operands, else the reference.

    Args:
        reference: `output`, `grad_input` or `grad_weight`.
        empty: What allocates its result.
    """

    def run(*args: Any) -> Tensor:
        launchers = triton_module("conv_launch")
        if launchers is None:
            return reference(*args)
        result = empty(*args)
        return result if getattr(launchers, reference.__name__)(result, *args) else reference(*args)

    return run


def _flops(product: str) -> Callable[..., int]:
    """Return the FLOP formula of a product: 2 per chosen input channel, output channel, tap and place of the output."""

    def formula(a: Sequence[int], b: Sequence[int], idx: Sequence[int], scale: Any, unit: int, *geometry: Any, out_shape: Sequence[int]) -> int:
        w, y = {"output": (b, out_shape), "grad_input": (b, a), "grad_weight": (out_shape, b)}[product]
        return 2 * idx[0] * unit * w[0] * math.prod(w[2:]) * y[0] * math.prod(y[2:])

    return formula


def _op(name: str, reference: Callable[..., Tensor], empty: Callable[..., Tensor]) -> Any:
    """Register the custom op of a product: reference, CUDA implementation, fake and FLOP formula."""
    product = reference.__name__
    op = torch.library.custom_op(f"approx_compile::{name}", _checked(reference, product), mutates_args=())
    op.register_kernel("cuda", _checked(triton_or_reference(reference, empty), product))
    op.register_fake(_checked(empty, product))
    register_flop_formula(getattr(torch.ops.approx_compile, name))(_flops(product))
    return op


skip_conv = _op("skip_conv", output, empty_output)
skip_conv_input = _op("skip_conv_input", grad_input, empty_grad_input)
skip_conv_weight = _op("skip_conv_weight", grad_weight, empty_grad_weight)
