"""Replace gradient products in the graph as `planning.gradient_replacement` decided.

The mathematics are in `kernels.gradient_replacements`. A replacement keeps alive only what it reads: with `zero` and `random`, an activation that
only the weight gradient needed is no longer saved for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels import max_conv
from approx_compile.kernels.gather import memory_order
from approx_compile.kernels.gradient_replacements import ConvGeometry, Replacement, max_conv_weight, max_linear_input, max_linear_weight
from approx_compile.passes.fx_utils import has_fixed_sizes, users_behind_views, window_of
from approx_compile.passes.rewrite.graph_edit import inline, replace_output
from approx_compile.passes.sites.site import Product

aten = torch.ops.aten

_RELU_MASKS = (aten.le.Scalar, aten.gt.Scalar)


def replace_matmul(graph: fx.Graph, product: Product, replacement: Replacement) -> None:
    """Put the replacement of a matmul's gradient in the place of its node.

    Args:
        graph: The joint graph, which is edited.
        product: The gradient product; its node is erased.
        replacement: What to compute instead.
    """
    m, position = product.node, product.position
    old = _torch.value(m)
    if replacement.method != "max":
        _replace_node(m, _generated_gradient(graph, m, product, replacement, old))
        return

    def run(a: Tensor, b: Tensor) -> Tensor:
        """Bring dY to rows first and X (M, K) or W (N, K) to the layer's orientation, and the result to that of the graph."""
        operands = (a, b)
        contracted = [axis.dim for axis in product.axes]
        dy, operand = operands[1 - position], operands[position]
        if product.name == "grad_weight":  # contracts the rows of both
            dy = dy if contracted[1 - position] == 0 else dy.t()
            operand = operand if contracted[position] == 0 else operand.t()
            gradient = max_linear_weight(operand, dy, replacement)
        else:  # contracts the outputs of both
            dy = dy if contracted[1 - position] == 1 else dy.t()
            operand = operand if contracted[position] == 0 else operand.t()
            gradient = max_linear_input(dy, operand, replacement)
        return _in_memory_order_of(old, gradient if position == 1 else gradient.t())

    _replace_node(m, inline(graph, m, run, product.operands, by_sample=True))


def _replace_node(m: fx.Node, new: fx.Node) -> None:
    m.replace_all_uses_with(new)
    m.graph.erase_node(m)


def replace_conv_weight(graph: fx.Graph, product: Product, replacement: Replacement) -> None:
    """Put the replacement of a convolution's weight gradient in the place of that output of its convolution_backward.

    Args:
        graph: The joint graph, which is edited.
        product: The weight's gradient product.
        replacement: What to compute instead.
    """
    m = product.node
    old = _torch.value(m)[product.mask]
    if replacement.method == "max":
        kernel = tuple(int(s) for s in old.shape[2:])
        stride, padding, dilation = (tuple(int(v) for v in each) for each in window_of(m.args[4:7], len(kernel)))
        groups, transposed = m.args[9], bool(m.args[7])
        assert isinstance(groups, int)
        conv = ConvGeometry(kernel, stride, padding, dilation, groups, transposed)

        def run(x: Tensor, dy: Tensor) -> Tensor:
            return _in_memory_order_of(old, _max_conv_weight(x, dy, replacement, conv))

        new = inline(graph, m, run, product.operands, by_sample=True)
    else:
        new = _generated_gradient(graph, m, product, replacement, old)
    replace_output(graph, m, product.mask, new)


def _max_conv_weight(x: Tensor, dy: Tensor, replacement: Replacement, conv: ConvGeometry) -> Tensor:
    if replacement.lowering == "inductor":
        return max_conv_weight(x, dy, replacement, conv)
    sizes = [list(v) for v in (conv.kernel, conv.stride, conv.padding, conv.dilation)]
    df: Tensor = max_conv.max_conv_weight(x, dy, replacement.j, replacement.scale, *sizes, conv.groups)
    return df


def _generated_gradient(graph: fx.Graph, m: fx.Node, product: Product, replacement: Replacement, old: Any) -> fx.Node:
    """Zeros or random numbers with the shape and memory order of a gradient.

    They depend on no values, so the partitioner could compute them in the forward pass and save them; they are kept in the backward pass.
    """
    batch, batch_dim = product.operands[0], product.axes[0].dim

    def run(a: Tensor) -> Tensor:
        order = memory_order(old)
        sizes = [old.shape[d] for d in order]
        if replacement.method == "zero":
            made = torch.zeros(sizes, dtype=old.dtype, device=old.device)
        else:
            std = replacement.std if replacement.std is not None else 1 / a.shape[batch_dim]
            made = torch.randn(sizes, dtype=old.dtype, device=old.device) * std
        return made.permute([order.index(d) for d in range(old.dim())])

    new = inline(graph, m, run, (batch,))
    assert isinstance(new, fx.Node)
    for n in (new, *new.all_input_nodes):
        if n is not batch and isinstance(n.meta.get("val"), Tensor):
            _torch.keep_in_backward(n)
    return new


def _in_memory_order_of(old: Any, x: Tensor) -> Tensor:
    """Copy `x` so that its dims have the same order in memory as those of `old`, which the graph expects."""
    order = memory_order(old)
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def release_activation(graph: fx.Graph, call: fx.Node) -> None:
    """Stop a convolution_backward from keeping the activation alive where it only needs the activation's shape.

    Without the weight's gradient, the op reads no values of the input. It gets uninitialised memory of the same shape instead, which nobody writes or reads.

    Args:
        graph: The joint graph, which is edited.
        call: The convolution_backward node.
    """
    x, mask = call.args[1], call.args[10]
    assert isinstance(x, fx.Node) and isinstance(mask, (list, tuple))
    if mask[1] or not call.users or not has_fixed_sizes(x) or _mask_would_be_saved(x):
        return
    order = memory_order(_torch.value(x))
    shaped = inline(graph, call, lambda x: torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device), (x,))
    call.args = (call.args[0], shaped, *call.args[2:])


def _mask_would_be_saved(x: fx.Node) -> bool:
    """Whether releasing the activation would make the compiler save a ReLU's mask in its place, on a CPU.

    This happens if a ReLU's backward reads the activation too. Inductor's C++ code stores and loads a bool mask about 20 times slower than the
    activation: a ResNet-20's step took 1.3 times as long as the exact one.
    """
    return _torch.value(x).device.type == "cpu" and any(u.target in _RELU_MASKS for u in users_behind_views(x))
