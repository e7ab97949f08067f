"""Sample a product along its contraction axis: an output, or a gradient on an axis of its own.

The product's node keeps its op and gets gathered operands, or a custom kernel takes its place and skips along the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gather import sample, take
from approx_compile.passes.fx_utils import CONV
from approx_compile.passes.planning.plan import ProductPlan
from approx_compile.passes.rewrite import custom_ops
from approx_compile.passes.rewrite.graph_edit import SampledOperands, inline, move_before, save_selection_of
from approx_compile.passes.sites.site import Product, Site


def sample_product(
    graph: fx.Graph, site: Site, product: Product, decision: ProductPlan, leader: SampledOperands | None = None, readers: Sequence[Product] = ()
) -> SampledOperands:
    """Let the node of a product contract the kept entries only.

    Args:
        graph: The joint graph, which is edited.
        site: The site of the product.
        product: The product with its current operands.
        decision: What the plan says about it.
        leader: The sampled product whose indices and activation this one uses; None if it selects by itself.
        readers: The products that will use this one's indices. Their weights count in the selection, and are moved before it.

    Returns:
        The selection and the operands, for the coupled gradients.
    """
    assert decision.how is not None
    node, estimator = product.node, decision.how
    for other in readers:
        move_before(other.operands[1], node)
    if decision.lowering in CUSTOM_KERNELS:
        if leader is None:
            idx, scale = custom_ops.insert_selection(graph, node, product, estimator, readers)
            save_selection_of(site, product, idx, scale)
        else:
            idx, scale = leader.idx, leader.scale
        custom_ops.use_skip_kernel(graph, product, estimator, idx, scale)
        return SampledOperands(estimator, idx, scale, product.operands, whole=True)
    sampled = gather_operands(graph, node, site, product, estimator, readers) if leader is None else _gather_as_leader(graph, product, leader)
    args = list(node.args)
    first = len(args) - 2 if node.target not in CONV else 0
    args[first], args[first + 1] = sampled.operands
    node.args = tuple(args)
    return sampled


def gather_operands(graph: fx.Graph, before: fx.Node, site: Site, product: Product, estimator: Estimator, readers: Sequence[Product] = ()) -> SampledOperands:
    """Insert the selection along a product's contraction axis and gather both operands.

    Args:
        graph: The joint graph, which is edited.
        before: Where the new nodes are inserted.
        site: The site of the product.
        product: The product with its current operands.
        estimator: How to sample it.
        readers: The products that will use the same indices.

    Returns:
        The selection and the gathered operands.
    """
    axes, other_axes = product.axes, tuple(r.axes[1] for r in readers)

    def run(a: Tensor, b: Tensor, *others: Tensor) -> Any:
        return sample(estimator, a, b, *axes, list(zip(others, other_axes, strict=True)))

    idx, scale, a, b = inline(graph, before, run, (*product.operands, *(r.operands[1] for r in readers)))
    save_selection_of(site, product, idx, scale)
    return SampledOperands(estimator, idx, scale, (a, b))


def _gather_as_leader(graph: fx.Graph, product: Product, leader: SampledOperands) -> SampledOperands:
    """Gather a product's weight at the entries that another product of the same activation kept; the activation is gathered already."""
    axis, unit = product.axes[1], leader.estimator.unit

    def run(b: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
        return take(b, axis, idx, scale, unit)

    b = inline(graph, product.node, run, (product.operands[1], leader.idx, leader.scale))
    return leader._replace(operands=(leader.operands[0], b))
