"""The op behind `max` for a convolution's weight on GPUs: CUDA C++ where it can run, else the readable function that Inductor lowers."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_compile.kernels.cuda import launch
from approx_compile.kernels.gradient_replacements import ConvGeometry, Replacement
from approx_compile.kernels.gradient_replacements import max_conv_weight as reference


@torch.library.custom_op("approx_compile::max_conv_weight", mutates_args=())
def max_conv_weight(
    x: Tensor, dy: Tensor, j: int, scale: float, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Algorithm 1 of Wang and Nelaturu as in `replacements.max_conv_weight`: x (N, C, *in), dy (N, O, *out) -> (O, C / groups, *kernel), channels innermost.

    A CUDA tensor of a 2-D convolution in fp32, fp16 or bf16 goes to the kernels of kernels/cuda/max_conv.cu, all else to the reference. The kernels
    differ from it where that differs from the formula only: weights are not rounded to the operands' type, a tap outside the image
    adds nothing even beside a NaN, and of equal magnitudes the first place is taken for every j. They have one order of summation.
    """
    if x.is_cuda and launch.supports_max_conv(x, dy, j) and launch.available(x.device, "the weight gradient by `max`"):
        return launch.max_conv_weight(x, dy, j, scale, launch.Window(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), groups))
    conv = ConvGeometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    return reference(x, dy, Replacement("max", j, scale), conv)


@max_conv_weight.register_fake
def _(x: Tensor, dy: Tensor, j: int, scale: float, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    return x.new_empty(dy.shape[1], *kernel, x.shape[1] // groups).movedim(-1, 1)


def _pair(sizes: list[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width
