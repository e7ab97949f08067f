"""Find the gradient products of a convolution in the backward part of a joint graph, and the axes of its operands.

Of a convolution's three products, the output contracts the input channels (of each group), grad_input the output channels, and grad_weight the samples.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import PERMUTES, VIEWS
from approx_compile.passes.sites.site import Product
from approx_compile.reasons import Reason
from approx_compile.reasons.products import BACKWARD_NOT_UNDERSTOOD, SYMBOLIC_GROUPS

aten = torch.ops.aten


def conv_weight_axes(transposed: bool, groups: int) -> tuple[Axis, Axis]:
    """Return the input-channel and the output-channel axis of a convolution's weight.

    The weight is (O, I / groups, ..); that of a transposed convolution is (I, O / groups, ..).
    """
    first, second = (Axis(0), Axis(1)) if groups == 1 else (Axis(1, 0, (0, groups)), Axis(2, 0, (0, groups)))
    return (first, second) if transposed else (second, first)


def channel_axis(groups: int) -> Axis:
    """Return the channel axis of a convolution's input or output (N, C, ..)."""
    return Axis(1) if groups == 1 else Axis(2, 1, (1, groups))


def conv_groups(n: fx.Node) -> int:
    """Return the number of groups of a convolution in the forward pass; the hint if it is a symbol."""
    groups: Any = n.args[8]
    return _torch.hint(groups.meta["val"] if isinstance(groups, fx.Node) else groups)


def conv_products(n: fx.Node, x: fx.Node, w: fx.Node, weight: int | None, backward_nodes: list[fx.Node]) -> tuple[list[Product], Reason | None]:
    """Return the products of a convolution: the output, and the gradients that the backward pass computes.

    Args:
        n: The convolution of the forward pass.
        x: Its input.
        w: Its weight.
        weight: Not read: the weight of a convolution is always its second operand.
        backward_nodes: The nodes of the backward pass with the same sequence number.

    Returns:
        The products, and why the site must stay exact, or None.
    """
    transposed, groups = bool(n.args[6]), conv_groups(n)
    w_in, w_out = conv_weight_axes(transposed, groups)
    channels = channel_axis(groups)
    c_in, c_out = _torch.value(x).shape[1] // groups, _torch.value(n).shape[1] // groups
    products = [Product("output", n, (x, w), (channels, w_in), c_in, groups, 1)]
    if not isinstance(n.args[8], int):  # for example one group per sample of a dynamic batch
        return products, SYMBOLIC_GROUPS()
    calls = [m for m in backward_nodes if m.target is aten.convolution_backward.default and m.args[1] is x and m.args[2] is w]
    if len(calls) != 1:
        other_readers = [m for m in backward_nodes if m.target not in PERMUTES | VIEWS and {x, w} & set(m.all_input_nodes)]
        return products, BACKWARD_NOT_UNDERSTOOD() if calls or other_readers else None
    m = calls[0]
    dy, mask = m.args[0], m.args[10]
    assert isinstance(dy, fx.Node) and isinstance(mask, (list, tuple))
    if any(u.target is not operator.getitem for u in m.users):
        return products, BACKWARD_NOT_UNDERSTOOD()
    if mask[0]:
        products.append(Product("grad_input", m, (dy, w), (channels, w_out), c_out, groups, 1, 1, 2, 0))
    if mask[1]:
        products.append(Product("grad_weight", m, (x, dy), (Axis(0), Axis(0)), _torch.value(x).shape[0], 1, None, 0, 1, 1))
    return products, None
