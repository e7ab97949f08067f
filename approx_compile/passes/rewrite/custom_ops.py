"""Let custom kernels compute sampled products: one op takes the place of the exact one, reads whole operands and skips the entries that were not kept.

Nothing is gathered and nothing is scattered back. The selection itself is made of ops that Inductor can fuse with what computes the operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels import skip_conv
from approx_compile.kernels import skip_matmul as skip
from approx_compile.kernels.estimators import Estimator, select, unit_scores
from approx_compile.kernels.gather import Axis, norms_sq
from approx_compile.passes.fx_utils import CONV, PRODUCTS, update_fake_value, window_of
from approx_compile.passes.planning.lowering import ALIGNMENT
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, SampledOperands, inline, match_layout
from approx_compile.passes.sites.site import Product

skip_matmul, skip_matmul_into = torch.ops.approx_compile.skip_matmul.default, torch.ops.approx_compile.skip_matmul_into.default
skip_conv_input, skip_conv_weight = torch.ops.approx_compile.skip_conv_input.default, torch.ops.approx_compile.skip_conv_weight.default
CUSTOM_MM, CUSTOM_CONV = {skip_matmul, skip_matmul_into}, {skip_conv_input, skip_conv_weight}
"""The ops that compute gradients of matmuls, and of convolutions."""


# --- the selection ---


def insert_selection(
    graph: fx.Graph, before: fx.Node, product: Product, estimator: Estimator, readers: Sequence[Product] = ()
) -> tuple[fx.Node, fx.Node | None]:
    """Insert the selection of a product's kept entries without gathering them.

    Args:
        graph: The joint graph, which is edited.
        before: Where the new nodes are inserted.
        product: The product to sample.
        estimator: How to sample it.
        readers: Other products of the same activation that use the same indices; their weights count in the selection as those of the argument
            `others` of `kernels.gather.sample`.

    Returns:
        The nodes of the indices and of the scale (None if all weights are 1), in the form of `kernels.estimators.select`.
    """
    operands = (*product.operands, *(r.operands[1] for r in readers))
    axes = (*product.axes, *(r.axes[1] for r in readers))
    stored = [_is_stored(n) and axis.lead is None and axis.split is None for n, axis in zip(operands, axes, strict=True)]

    def run(*given: Tensor) -> Any:
        a_sq, b_sq, *others = (_norms_sq(x, axis, estimator.group, s) for x, axis, s in zip(given, axes, stored, strict=True))
        for other_sq in others:
            b_sq = b_sq + other_sq
        if estimator.scaled:
            return select(estimator, a_sq, b_sq)
        return skip.choose(unit_scores(estimator, a_sq, b_sq), estimator.k), None

    idx, scale = inline(graph, before, run, operands)
    return idx, scale


def _is_stored(n: fx.Node) -> bool:
    """Whether an operand is written to memory in any case; the norms of any other one are fused by Inductor with what computes it."""
    return n.op == "placeholder" or n.target in PRODUCTS


def _norms_sq(x: Tensor, axis: Axis, group: int, stored: bool) -> Tensor:
    """Squared norms of the groups along an axis: by the kernel for stored matrices without a tail, else by ops that Inductor fuses."""
    whole = x.shape[axis.dim] // group * group
    return skip.axis_norms_sq(x, axis.dim, group) if stored and x.dim() == 2 and whole == x.shape[axis.dim] else norms_sq(x, axis, group)


# --- products ---


def use_skip_kernel(graph: fx.Graph, product: Product, estimator: Estimator, idx: fx.Node, scale: fx.Node | None) -> None:
    """Let the node of an output, or of a gradient that is sampled on its own axis, skip along its contraction axis.

    Args:
        graph: The joint graph, which is edited.
        product: The product; its node changes its target or is replaced.
        estimator: How it is sampled.
        idx: The kept indices.
        scale: The weights of the kept entries, if not all 1.
    """
    node = product.node
    a, b = product.operands
    if node.target not in CONV:
        bias = node.args[0] if len(node.args) == 3 else None
        node.target = skip_matmul
        node.args = (_in_aligned_lines(a, node), _in_aligned_lines(b, node), idx, scale, estimator.unit, bias)
        update_fake_value(node)
        return
    bias, window, layout = node.args[2], window_of(node.args[3:6], 2), MemoryLayout.of(_torch.value(node))

    def run(x: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        y: Tensor = skip_conv.skip_conv(x, w, idx, scale, estimator.unit, *window)
        return match_layout(y if bias is None else y + bias.reshape(-1, 1, 1), layout)

    assert bias is None or isinstance(bias, fx.Node)
    new = inline(graph, node, run, (a, b, idx, scale, bias))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def skip_in_matmul(m: fx.Node, sampled: SampledOperands, scale: fx.Node | None, dim: int | None) -> None:
    """Let a matrix product skip the entries that a selection dropped. The caller updates the node's fake value.

    Args:
        m: The node of the product, whose target and arguments change.
        sampled: The selection.
        scale: The weights of the kept entries, if not all 1.
        dim: None to skip along the contraction axis; 0 or 1 to compute the kept rows or columns of the result only. Those are multiplied by
            their scale, the others are zero, and all of it is written in one pass.
    """
    a, b = m.args[-2:]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    a, b = _in_aligned_lines(a, m), _in_aligned_lines(b, m)
    m.target = skip_matmul if dim is None else skip_matmul_into
    m.args = (a, b, sampled.idx, scale, sampled.estimator.unit, *(() if dim is None else (dim,)))


def _in_aligned_lines(n: fx.Node, before: fx.Node) -> fx.Node:
    """A matrix that a kernel can read: one with rows or columns that are contiguous and begin at multiples of 16 entries.

    The broadcast gradient of a sum has none, and is copied.
    """
    x = _torch.value(n)
    for line, other in ((1, 0), (0, 1)):
        step = _torch.hint(x.stride(other))
        if x.stride(line) == 1 and step > 0 and step % ALIGNMENT == 0:
            return n
    by_rows = isinstance(x.shape[1], int) and x.shape[1] % ALIGNMENT == 0
    new = inline(before.graph, before, lambda x: x.contiguous() if by_rows else x.t().contiguous().t(), (n,))
    assert isinstance(new, fx.Node)
    return new


def insert_skip_conv_gradient(graph: fx.Graph, m: fx.Node, product: Product, operands: Sequence[fx.Node], sampled: SampledOperands) -> fx.Node:
    """Insert a gradient of a convolution in the input channels that were kept, zeros in the others.

    Args:
        graph: The joint graph, which is edited.
        m: The convolution_backward that computes the exact gradient.
        product: The gradient product.
        operands: dY, X and W to read.
        sampled: The selection of input channels.

    Returns:
        The node of the gradient.
    """
    dy, x, w = operands
    size, kernel = list(_torch.value(x).shape[2:]), list(_torch.value(w).shape[2:])
    window, unit = window_of(m.args[4:7], 2), sampled.estimator.unit

    # the kernels read channels-last; a gradient that comes from a flat layer has another layout
    def input_gradient(dy: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx: Tensor = skip_conv.skip_conv_input(dy, w, idx, scale, unit, size, *window)
        return dx

    def weight_gradient(x: Tensor, dy: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        dw: Tensor = skip_conv.skip_conv_weight(x, dy, idx, scale, unit, kernel, *window)
        return dw

    run, read = (input_gradient, (dy, w)) if product.mask == 0 else (weight_gradient, (x, dy))
    new = inline(graph, m, run, (*read, sampled.idx, sampled.scale))
    assert isinstance(new, fx.Node)
    return new
