"""Data classes for the edit of one gradient product: the axes on which its operands and result are narrowed, and where the result goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from approx_compile.kernels.gather import Axis
from approx_compile.passes.planning.index_sharing import Sum
from approx_compile.passes.planning.plan import ProductPlan
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, SampledOperands
from approx_compile.passes.sites.site import Product


class NarrowedAxis(NamedTuple):
    """An axis on which a gradient has the kept entries only.

    Attributes:
        axis: Where the axis lies in the gradient.
        sampled: The selection of the kept entries.
        scale: The weights that the kept entries are still to be multiplied by, if any.
    """

    axis: Axis
    sampled: SampledOperands
    scale: fx.Node | None


@dataclass
class SharedSum:
    """Gradients of one activation that have the same kept entries and are only summed up: the sum is scattered back once.

    Attributes:
        total: The node of the exact sum.
        order: In which order the gradients are added.
        gradients: The narrow gradients, in the order of their sites.
        narrowed: The axes on which they are narrow.
        activation: The activation and its kept entries, if a ReLU's mask can be read from those (see `scatter_back`).
        layout: The memory layout of the exact gradients.
    """

    total: fx.Node
    order: Sum
    gradients: list[fx.Node] = field(default_factory=list)
    narrowed: tuple[NarrowedAxis, ...] = ()
    activation: tuple[fx.Node, fx.Node] | None = None
    layout: MemoryLayout | None = None


class GradientTask(NamedTuple):
    """What is to be done to one gradient product.

    It is replaced, sampled on its own axis, or narrowed: to the input channels that the output kept (coupled), to the output channels that a later
    site kept (skipped), or to both.

    Attributes:
        product: The gradient product with its current operands.
        decision: What the plan says about it.
        coupled: The selection of the site's output, for a coupled gradient.
        skipped: The selection of the later site that leaves zeros in dY, if those are skipped.
        narrow_operands: The operands of the site's output, if that is computed for kept output channels only.
        keep_narrow: The result stays narrow, because the activation was computed narrow and its gradient is read narrow.
        shared_sum: The sum that is scattered back in place of this gradient alone.
    """

    product: Product
    decision: ProductPlan
    coupled: SampledOperands | None
    skipped: SampledOperands | None
    narrow_operands: tuple[fx.Node, fx.Node] | None
    keep_narrow: bool
    shared_sum: SharedSum | None
