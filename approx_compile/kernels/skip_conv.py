"""Convolutions that compute with the chosen input channels only, as ops that stay whole in a graph, and what they compute in readable torch.

| op | result |
|---|---|
| `skip_conv(x, w, ..)` | y = conv(x[:, idx], w[:, idx] scale), (N, O, Ho, Wo) |
| `skip_conv_input(dy, w, ..)` | dx[:, idx] = scale conv_input(dy, w[:, idx]), zeros elsewhere, (N, C, *size) |
| `skip_conv_weight(x, dy, ..)` | dw[:, idx] = scale conv_weight(x[:, idx], dy), zeros elsewhere, (O, C, *kernel) |

2-D, one group, not transposed: x (N, C, H, W), w (O, C, kh, kw), dy (N, O, Ho, Wo), all of one dtype. Results are channels-last, whatever the operands.
`idx` (n,), int64, sorted and distinct, counts units of `unit` contiguous channels, of which C is a multiple; `scale` (n,), fp32, or None.
What dropped channels hold is never read: a NaN there stays there.

CPU tensors go to the functions `output`, `grad_input`, `grad_weight` below; CUDA tensors to the kernels of the same names in kernels/triton/conv_launch.py
where those take such shapes, dtypes and strides, else here as well.
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
    """y of `skip_conv`; the scale is multiplied into w in fp32 and rounded to w's dtype."""
    kept = take(x, _CHANNELS, idx, None, unit), take(w, _CHANNELS, idx, scale, unit)
    return _channels_last(torch.ops.aten.convolution(*kept, None, stride, padding, dilation, False, [0, 0], 1))


def grad_input(
    dy: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx of `skip_conv_input`."""
    part = take(w, _CHANNELS, idx, None, unit)
    shape_only = dy.new_empty(1).expand(dy.shape[0], part.shape[1], *size)
    dx = torch.ops.aten.convolution_backward(dy, shape_only, part, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False])[0]
    return _channels_last(untake(dx, _CHANNELS, idx, scale, unit, w.shape[1]))


def grad_weight(
    x: Tensor, dy: Tensor, idx: Tensor, scale: Tensor | None, unit: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """dw of `skip_conv_weight`."""
    part = take(x, _CHANNELS, idx, None, unit)
    shape_only = x.new_empty(1).expand(dy.shape[1], part.shape[1], *kernel)
    dw = torch.ops.aten.convolution_backward(dy, part, shape_only, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False])[1]
    return _channels_last(untake(dw, _CHANNELS, idx, scale, unit, x.shape[1]))


def empty_output(x: Tensor, w: Tensor, idx: Tensor, scale: Any, unit: int, stride: Any, padding: Any, dilation: Any) -> Tensor:
    taps = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    return _empty(x, x.shape[0], w.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in taps))


def empty_grad_input(dy: Tensor, w: Tensor, idx: Tensor, scale: Any, unit: int, size: Any, *geometry: Any) -> Tensor:
    return _empty(dy, dy.shape[0], w.shape[1], *size)


def empty_grad_weight(x: Tensor, dy: Tensor, idx: Tensor, scale: Any, unit: int, kernel: Any, *geometry: Any) -> Tensor:
    return _empty(x, dy.shape[1], x.shape[1], *kernel)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    """x with the strides `_empty` gives its shape, also those of dims of size 1, where a layout has several spellings."""
    made = _empty(x, *x.shape)
    return x if x.stride() == made.stride() else made.copy_(x)


def _checked(function: Callable[..., Tensor], product: str) -> Callable[..., Tensor]:
    """The function for operands that fit each other; a ValueError says what does not."""
    common = {"output": (1, 1), "grad_input": (1, 0), "grad_weight": (0, 0)}[product]  # the dims of the operands that are the same axis

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


def triton_or_reference(reference: Callable[..., Tensor], like: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The Triton kernel of the reference's name where it takes the operands, else the reference."""

    def run(*args: Any) -> Tensor:
        conv = triton_module("conv_launch")
        if conv is None:
            return reference(*args)
        result = like(*args)
        return result if getattr(conv, reference.__name__)(result, *args) else reference(*args)

    return run


def _flops(product: str) -> Callable[..., int]:
    """2 per chosen input channel, output channel, tap and place of the output."""

    def formula(a: Sequence[int], b: Sequence[int], idx: Sequence[int], scale: Any, unit: int, *geometry: Any, out_shape: Sequence[int]) -> int:
        w, y = {"output": (b, out_shape), "grad_input": (b, a), "grad_weight": (out_shape, b)}[product]
        return 2 * idx[0] * unit * w[0] * math.prod(w[2:]) * y[0] * math.prod(y[2:])

    return formula


def _op(name: str, reference: Callable[..., Tensor], like: Callable[..., Tensor]) -> Any:
    product = reference.__name__
    op = torch.library.custom_op(f"approx_compile::{name}", _checked(reference, product), mutates_args=())
    op.register_kernel("cuda", _checked(triton_or_reference(reference, like), product))
    op.register_fake(_checked(like, product))
    register_flop_formula(getattr(torch.ops.approx_compile, name))(_flops(product))
    return op


skip_conv = _op("skip_conv", output, empty_output)
skip_conv_input = _op("skip_conv_input", grad_input, empty_grad_input)
skip_conv_weight = _op("skip_conv_weight", grad_weight, empty_grad_weight)
