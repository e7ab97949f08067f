"""Plan -> graph where a kernel of ours runs a sampled product: one op in the exact one's place, which reads whole operands and steps over what was not
chosen. Nothing is gathered, nothing put back; the choice itself is Inductor's to fuse."""

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
from approx_compile.passes.planning.lowering import LINE
from approx_compile.passes.rewrite.graph_edit import Layout, Sampled, inline, like
from approx_compile.passes.sites.site import Product

skip_matmul, skip_matmul_into = torch.ops.approx_compile.skip_matmul.default, torch.ops.approx_compile.skip_matmul_into.default
skip_conv_input, skip_conv_weight = torch.ops.approx_compile.skip_conv_input.default, torch.ops.approx_compile.skip_conv_weight.default
OWN_MM, OWN_CONV = {skip_matmul, skip_matmul_into}, {skip_conv_input, skip_conv_weight}
"""What gradients are computed by."""


def choice(graph: fx.Graph, before: fx.Node, product: Product, how: Estimator, readers: Sequence[Product] = ()) -> tuple[fx.Node, fx.Node | None]:
    """Indices and scale for a product, in the order `kernels.estimators.select` has them; for it and for `readers`, that will use the same, as
    `kernels.products.sample` chooses for `others`."""
    operands = (*product.operands, *(r.operands[1] for r in readers))
    axes = (*product.axes, *(r.axes[1] for r in readers))
    plain = [_is_stored(n) and axis.lead is None and axis.split is None for n, axis in zip(operands, axes, strict=True)]

    def run(*given: Tensor) -> Any:
        a_sq, b_sq, *others = (_norms(x, axis, how.group, alone) for x, axis, alone in zip(given, axes, plain, strict=True))
        for more in others:
            b_sq = b_sq + more
        if how.scaled:
            return select(how, a_sq, b_sq)
        return skip.choose(unit_scores(how, a_sq, b_sq), how.k), None

    idx, scale = inline(graph, before, run, operands)
    return idx, scale


def _is_stored(n: fx.Node) -> bool:
    """Whether an operand lies in memory anyway: of another one Inductor fuses the norms with what computes it."""
    return n.op == "placeholder" or n.target in PRODUCTS


def _norms(x: Tensor, axis: Axis, group: int, alone: bool) -> Tensor:
    whole = x.shape[axis.dim] // group * group
    return skip.axis_norms_sq(x, axis.dim, group) if alone and x.dim() == 2 and whole == x.shape[axis.dim] else norms_sq(x, axis, group)


def sample_output(graph: fx.Graph, product: Product, how: Estimator, idx: fx.Node, scale: fx.Node | None) -> None:
    """The product's own node skips along its contraction axis: an output, or a gradient on its own axis."""
    node = product.node
    a, b = product.operands
    if node.target not in CONV:
        bias = node.args[0] if len(node.args) == 3 else None
        node.target = skip_matmul
        node.args = (_in_lines(a, node), _in_lines(b, node), idx, scale, how.unit, bias)
        update_fake_value(node)
        return
    bias, geometry, layout = node.args[2], window_of(node.args[3:6], 2), Layout.of(_torch.value(node))

    def run(x: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        y: Tensor = skip_conv.skip_conv(x, w, idx, scale, how.unit, *geometry)
        return like(y if bias is None else y + bias.reshape(-1, 1, 1), layout)

    assert bias is None or isinstance(bias, fx.Node)
    new = inline(graph, node, run, (a, b, idx, scale, bias))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def step_over(m: fx.Node, kept: Sampled, scale: fx.Node | None, dim: int | None) -> None:
    """A product of matrices steps over what was not kept along the axis that it contracts (`dim` None), or of rows (0) or columns (1) of its result: those are
    times their scale, zeros elsewhere, written in one pass. The node's fake value is left to the caller to refresh."""
    a, b = m.args[-2:]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    a, b = _in_lines(a, m), _in_lines(b, m)
    m.target = skip_matmul if dim is None else skip_matmul_into
    m.args = (a, b, kept.idx, scale, kept.how.unit, *(() if dim is None else (dim,)))


def _in_lines(n: fx.Node, before: fx.Node) -> fx.Node:
    """A matrix that a kernel reads: in lines of whole multiples of 16 entries, which begin at such. A broadcast gradient (of a sum) has none, and is copied."""
    x = _torch.value(n)
    for line, other in ((1, 0), (0, 1)):
        step = _torch.hint(x.stride(other))
        if x.stride(line) == 1 and step > 0 and step % LINE == 0:
            return n
    by_rows = isinstance(x.shape[1], int) and x.shape[1] % LINE == 0
    new = inline(before.graph, before, lambda x: x.contiguous() if by_rows else x.t().contiguous().t(), (n,))
    assert isinstance(new, fx.Node)
    return new


def narrow_conv(graph: fx.Graph, m: fx.Node, product: Product, operands: Sequence[fx.Node], kept: Sampled) -> fx.Node:
    """A gradient of a convolution (`m`: its convolution_backward) in the input channels that were kept, zeros elsewhere, from `operands` dY, X and W."""
    dy, x, w = operands
    size, kernel = list(_torch.value(x).shape[2:]), list(_torch.value(w).shape[2:])
    geometry, unit = window_of(m.args[4:7], 2), kept.how.unit

    # the kernels read channels-last; where the gradient comes from a flat layer it is not
    def of_input(dy: Tensor, w: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx: Tensor = skip_conv.skip_conv_input(dy, w, idx, scale, unit, size, *geometry)
        return dx

    def of_weight(x: Tensor, dy: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        dw: Tensor = skip_conv.skip_conv_weight(x, dy, idx, scale, unit, kernel, *geometry)
        return dw

    run, read = (of_input, (dy, w)) if product.mask == 0 else (of_weight, (x, dy))
    new = inline(graph, m, run, (*read, kept.idx, kept.scale))
    assert isinstance(new, fx.Node)
    return new
