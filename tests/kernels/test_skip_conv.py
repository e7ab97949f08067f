"""The ops of convolutions that skip input channels equal dense convolutions with the dropped channels masked, and pass torch's checks of custom ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracles import relative
from torch import Tensor
from torch.nn.functional import conv2d

from approx_compile.kernels.skip_conv import skip_conv, skip_conv_input, skip_conv_weight
from approx_compile.kernels.skip_matmul import check_index

IDX = torch.tensor([0, 2])
GEOMETRY = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1 stride 2": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "unlike in each direction": ((3, 2), (2, 1), (1, 0), (1, 2)),
}


def operands(kernel: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 64, 9, 7, dtype=dtype), torch.randn(24, 64, *kernel, dtype=dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", GEOMETRY)
def test_ops_are_dense_ones_with_dropped_channels_masked(name: str, scaled: bool, layout: torch.memory_format) -> None:
    kernel, *geometry = GEOMETRY[name]
    x, w = operands(kernel)
    scale = torch.rand(2) + 0.5 if scaled else None
    factor = torch.zeros(4, dtype=x.dtype).index_copy_(0, IDX, torch.ones(2, dtype=x.dtype) if scale is None else scale.double())
    factor = factor.repeat_interleave(16).reshape(1, -1, 1, 1)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = conv2d(x_leaf, w_leaf * factor, None, *geometry)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x_leaf, w_leaf), dy)

    dropped = factor == 0
    x, w, dy = (t.to(memory_format=layout) for t in (x.masked_fill(dropped, torch.nan), w.masked_fill(dropped, torch.nan), dy))
    made = (
        (skip_conv(x, w, IDX, scale, 16, *geometry), y),
        (skip_conv_input(dy, w, IDX, scale, 16, x.shape[2:], *geometry), dx),
        (skip_conv_weight(x, dy, IDX, scale, 16, kernel, *geometry), dw),
    )
    for result, expected in made:
        assert relative(result, expected) < 1e-12
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scaled", [True, False])
def test_opcheck(scaled: bool) -> None:
    for shape, (kernel, *geometry) in (((2, 64, 9, 7), GEOMETRY["unlike in each direction"]), ((2, 64, 1, 1), ((1, 1), (1, 1), (0, 0), (1, 1)))):
        x, w, scale = torch.randn(shape), torch.randn(24, 64, *kernel), torch.rand(2) if scaled else None
        dy = skip_conv(x, w, IDX, scale, 16, *geometry)
        calls: tuple[tuple[Any, tuple[Any, ...]], ...] = (
            (skip_conv, (x, w, IDX, scale, 16, *geometry)),
            (skip_conv_input, (dy, w, IDX, scale, 16, shape[2:], *geometry)),
            (skip_conv_weight, (x, dy, IDX, scale, 16, kernel, *geometry)),
        )
        for op, args in calls:
            torch.library.opcheck(op, args)


def test_operands_that_do_not_fit() -> None:
    x, w = operands((3, 3))
    geometry = GEOMETRY["3x3"][1:]
    for unit in (24, 0):
        with pytest.raises(ValueError, match=f"unit {unit} for an axis of 64 entries; expected a divisor of 64"):
            skip_conv(x, w, IDX, None, unit, *geometry)
        with pytest.raises(ValueError, match=f"unit {unit} for an axis of 64 entries"):
            skip_conv_input(x[:, :24], w, IDX, None, unit, (9, 7), *geometry)
    with pytest.raises(ValueError, match=r"indices and scale on cpu; expected meta, where the operands are"):
        check_index(IDX, None, 16, 64, torch.device("meta"))
    with pytest.raises(ValueError, match=r"scale \(3,\) torch.float32; expected \(2,\)"):
        skip_conv(x, w, IDX, torch.ones(3), 16, *geometry)
    for op, args in ((skip_conv, (x[0], w)), (skip_conv, (x, w[:, :32])), (skip_conv_input, (x, w)), (skip_conv_weight, (x, x[:1].float()))):
        with pytest.raises(ValueError, match=r"expected two of x \(N, C, H, W\), w \(O, C, kh, kw\) and dy \(N, O, Ho, Wo\)"):
            op(*args, IDX, None, 16, *([(9, 7)] if op is not skip_conv else []), *geometry)
