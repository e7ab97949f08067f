"""Custom op for the gradient of a convolution's weight by the replacement `max`: CUDA C++ where it can run, the reference elsewhere.

The reference is `gradient_replacements.max_conv_weight` in readable torch. A graph that does not call this op lowers the reference by Inductor.
"""

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
    """Compute the weight gradient from the `j` largest entries of every channel of every sample (Wang and Nelaturu 2019, Algorithm 1).

    The formula is that of `gradient_replacements.max_conv_weight`. CUDA tensors of a 2-D convolution in fp32, fp16 or bf16 go to the kernels of
    `cuda/max_conv.cu`, all others to the reference. The kernels differ from the reference only where the reference differs from the formula: they do not
    round weights to the operands' dtype, a tap outside the image adds nothing even beside a NaN, and among equal magnitudes they take the first place for
    every j. Their order of summation is fixed.

    Args:
        x: Input of the convolution, (N, C, *in).
        dy: Gradient of its output, (N, O, *out), of the same dtype.
        j: Entries kept of each channel of each sample.
        scale: Factor on the result.
        kernel: Size of the kernel by spatial dim.
        stride: Stride by spatial dim.
        padding: Padding by spatial dim.
        dilation: Dilation by spatial dim.
        groups: Groups of the convolution, which is not transposed.

    Returns:
        The gradient, (O, C / groups, *kernel), with the channels innermost in memory.
    """
    conv = ConvGeometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    if x.is_cuda and launch.supports_max_conv(x, dy, j) and launch.available_or_warn(x.device, "the weight gradient by `max`"):
        return launch.max_conv_weight(x, dy, j, scale, conv)
    return reference(x, dy, Replacement("max", j, scale), conv)


@max_conv_weight.register_fake
def _(x: Tensor, dy: Tensor, j: int, scale: float, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    return x.new_empty(dy.shape[1], *kernel, x.shape[1] // groups).movedim(-1, 1)
