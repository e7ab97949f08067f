"""Runs the Triton convolution kernels in the interpreter; prints a line of JSON per case: the relative error of every product against fp64.

A process of its own: TRITON_INTERPRET must be set before triton is imported, and changes what it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from oracles import relative
from torch import Tensor

from approx_compile.kernels import skip_conv as reference
from approx_compile.kernels.triton import autotune, conv_launch
from approx_compile.kernels.triton.autotune import DeviceLimits, TileConfig

SMALL = TileConfig(32, 32, 16, 4, 3)


def errors(
    image: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    unit: int, kept: list[int], dtype: str, scaled: bool, weight: str, shipped: bool, samples: int = 2, inputs: int = 64, outputs: int = 24,
    strided: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Of y, dx and dw; the operands hold NaN in every channel that is not chosen, results before they are written.

    `shipped`: as on a GPU, the configuration included, else in small tiles so that there are many, and the sum over places in three shares.
    `strided`: indices with other numbers between them, and one scale for all that is stored once, as the estimator `uniform` has it.
    """
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    idx = torch.tensor(kept)
    scale = torch.rand(len(kept)) + 0.5 if scaled else None
    if strided:
        idx, scale = torch.stack([idx, idx.flip(0)], 1)[:, 0], torch.tensor(1.5).expand(len(kept))
    chosen = torch.isin(torch.arange(inputs) // unit, idx).reshape(-1, 1, 1)
    x = torch.randn(samples, inputs, *image).where(chosen, torch.nan).to(kind, memory_format=torch.channels_last)
    w = (torch.randn(outputs, inputs, *kernel) / 10).where(chosen, torch.nan).to(kind)
    w = w.to(memory_format=torch.channels_last) if weight == "channels-last" else w.transpose(2, 3).contiguous().transpose(2, 3) if weight == "odd" else w
    geometry = (list(stride), list(padding), list(dilation))
    y = reference.output(x.double(), w.double(), idx, scale, unit, *geometry)
    dy = torch.randn(y.shape).to(kind, memory_format=torch.channels_last)

    def error(function: Callable[..., Tensor], like: Callable[..., Tensor], a: Tensor, b: Tensor, *rest: Any, **how: Any) -> float:
        @wraps(function)
        def refused(*_: Any) -> Tensor:
            raise AssertionError("refused")

        args = (a, b, idx, scale, unit, *rest, *geometry)
        if shipped:
            result = reference.triton_or_reference(refused, like)(*args)
        else:
            result = like(*args)
            assert getattr(conv_launch, function.__name__)(result, *args, config=SMALL, **how), "refused"
        return relative(result, function(a.double(), b.double(), *args[2:]))

    return {
        "output": error(reference.output, reference.empty_output, x, w),
        "grad_input": error(reference.grad_input, reference.empty_grad_input, dy, w, list(image)),
        "grad_weight": error(reference.grad_weight, reference.empty_grad_weight, x, dy, list(kernel), splits=3),
    }


if __name__ == "__main__":
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.use_deterministic_algorithms(True)  # no configuration is timed, and what `torch.empty` returns is NaN
    autotune.device_limits = lambda _: DeviceLimits("interpreter", 80, 4, 163 * 1024)
    for name, case in json.load(sys.stdin).items():
        print(json.dumps({name: errors(**case)}), flush=True)
