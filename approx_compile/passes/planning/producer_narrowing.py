"""Decide which sites make only the channels that a later site keeps of their output ("producer narrowing").

If the selection of a consumer depends on its weight alone, it is known before the activation is computed. With Y = A B, h = f(Y) and the consumer h W: if
`idx` are the channels of h that the consumer keeps, then B[:, idx] and the entries `idx` of the bias are gathered in place of h[:, idx], f runs on the narrow
Y, and so does its backward pass. That ends in a narrow dY: dB = A^T dY, with zeros outside `idx`, and dA = dY B[:, idx]^T. Values change only by the order of
summation.

Every node between producer and consumer is either unknown outside the kept channels (the activation and what is computed from it) or zero there (gradients).
A node with unknown channels may only be read by nodes that are narrowed as well; gradients that other nodes read are put back in place with their zeros.
BatchNorm in training forbids narrowing, because the running statistics of the other channels would not be updated; in eval mode it is elementwise, and
narrowed.

`rewrite.narrow_region` carries out what is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.fx_utils import VIEWS, op_name
from approx_compile.passes.planning import zero_propagation
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan
from approx_compile.passes.planning.product_plans import planned_estimate
from approx_compile.passes.sites.site import Product, Site, one_contraction
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import BUT_BY_INDUCTOR, NARROWED, PRODUCERS_NARROWED
from approx_compile.reasons.products import (
    ALL_CHANNELS,
    CHANNEL_NORM,
    CONSUMER_UNFIT,
    GRAPH_OUTPUT,
    KERNEL_NO_SLOWER,
    NARROWED_OTHERWISE,
    NO_FASTER,
    NO_GRADIENT,
    OTHER_CHANNELS,
    OTHER_READER,
    PRODUCER_UNFIT,
    READ_TWICE,
    SHARED_GRADIENT,
    STALE_STATISTICS,
    WEIGHT_FROM_ACTIVATION,
    WHOLE_OPERANDS,
)

aten = torch.ops.aten

WEIGHTS_ONLY = "topk_weights"
"""The one method that selects entries without looking at the activation."""

NarrowedRegion = dict[fx.Node, int]
"""The nodes between a producer and its consumer, forward and backward, that are narrowed, each with its channel dim."""

# --- legal ---


def narrowed_region(producer: Site, consumer: Site) -> NarrowedRegion | Reason:
    """Find the nodes that are narrowed if a producer makes only the channels that its consumer keeps.

    Args:
        producer: The site that makes the activation.
        consumer: The site that reads it.

    Returns:
        The region, or the reason why the producer must make all channels.
    """
    reason = _unfit_producer(producer) or _unfit_consumer(consumer)
    if reason is not None:
        return reason
    output = consumer.products[0]
    assert output.weight is not None
    activation, weight = output.operands[1 - output.weight], output.operands[output.weight]
    if producer.node in _ancestors(weight):
        return WEIGHT_FROM_ACTIVATION(name=consumer.name)
    start = next((p.result for p in consumer.products if p.name == "grad_input"), None)
    region = _closure(producer.node, start, consumer.node, {p.node for p in consumer.products[1:]})
    if isinstance(region, Reason):
        return region
    if [n for n in consumer.node.all_input_nodes if n in region] != [activation]:
        return READ_TWICE(name=consumer.name)
    if region.get(activation) != output.axes[1 - output.weight].dim:
        return OTHER_CHANNELS(name=consumer.name)
    if any(p.output_grad is None or region.get(p.output_grad) != p.output_grad_dim for p in producer.products[1:]):
        return SHARED_GRADIENT(name=consumer.name)
    return region


def _unfit_producer(site: Site) -> Reason | None:
    if site.blocked is not None and not NO_GRADIENT.explains(site.blocked):
        return site.blocked
    if not one_contraction(site) or site.products[0].weight != 1:
        return PRODUCER_UNFIT()
    return None


def _unfit_consumer(site: Site) -> Reason | None:
    return None if one_contraction(site) else CONSUMER_UNFIT(name=site.name)


def _ancestors(n: fx.Node) -> set[fx.Node]:
    ancestors, todo = {n}, [n]
    while todo:
        new = [i for i in todo.pop().all_input_nodes if i not in ancestors]
        ancestors.update(new)
        todo += new
    return ancestors


def _closure(producer: fx.Node, start: tuple[fx.Node, int] | None, consumer: fx.Node, gradients: set[fx.Node]) -> NarrowedRegion | Reason:
    """The region of a producer: everything elementwise that is computed from its output channels (dim 1).

    `start` is the consumer's gradient of the activation, with its channel dim, and `gradients` are all gradient nodes of the consumer.
    """
    zero = zero_propagation.propagate_zeros(dict([start])) if start is not None else {}
    dims, behind, readers = {producer: 1}, {consumer}, list[fx.Node]()
    n = producer.next
    while n.op != "root":
        read = [i for i in n.all_input_nodes if i in dims]
        forward = not _torch.is_backward(n)
        if forward and any(i in behind for i in n.all_input_nodes):
            behind.add(n)
        if start is not None and n is start[0]:
            dims[n] = start[1]
        elif read and n is not consumer and n not in gradients and (n in zero or not all(i in zero for i in read)):
            dim = narrowed_dim(n, dims, n in zero) if not (n in behind and forward) else None
            if dim is not None and zero.get(n, dim) == dim:
                dims[n] = dim
            elif not all(i in zero for i in read):
                readers.append(n)
        n = n.next
    if readers:
        return _reader_reason(next((n for n in readers if not _torch.is_backward(n)), readers[0]), dims)
    return dims


def narrowed_dim(n: fx.Node, dims: dict[fx.Node, int], zero: bool) -> int | None:
    """Return the channel dim of an elementwise op or a view of nodes that have one.

    Args:
        n: The node.
        dims: The channel dims of nodes before it.
        zero: Whether the node is zero outside the channels kept. Only then may it be a sum over other dims, since unknown values must not be summed.

    Returns:
        The dim, or None if the node has no channel dim or is no such op.
    """
    value = n.meta.get("val")
    if n.op != "call_function" or not isinstance(value, Tensor) or any(isinstance(a, fx.Node) for a in n.kwargs.values()):
        return None
    if n.target in VIEWS or n.target is aten.permute.default or (zero and n.target in zero_propagation.SUMS):
        return zero_propagation.propagate_through(n, dims)
    if not (_torch.is_pointwise(n) or n.target in zero_propagation.UNARY):
        return None
    if any(isinstance(a, (list, tuple)) and any(isinstance(i, fx.Node) for i in a) for a in n.args):
        return None
    channel_dims = {dims[a] + value.dim() - _torch.value(a).dim() for a in n.args if isinstance(a, fx.Node) and a in dims}
    return channel_dims.pop() if len(channel_dims) == 1 else None


def _reader_reason(n: fx.Node, dims: NarrowedRegion) -> Reason:
    """Why a node that reads the activation, and is not narrowed, needs all of its channels."""
    if n.op == "output":
        return GRAPH_OUTPUT()
    if n.target is aten.var_mean.correction:
        (activation,) = n.all_input_nodes
        over: Any = n.args[1]
        by_channel = dims[activation] not in {int(d) % _torch.value(activation).dim() for d in over}
        return STALE_STATISTICS() if by_channel else CHANNEL_NORM()
    return OTHER_READER(op=op_name(n))


# --- decided ---


class Producers:
    """Decides which sites of a graph are narrowed for which consumers, by predicted time."""

    def __init__(self, sites: Sequence[Site], cost: CostModel) -> None:
        """Bind the sites and the cost model.

        Args:
            sites: The sites of the graph, in execution order.
            cost: The cost model; without times nothing is narrowed.
        """
        self.sites = sites
        self.cost = cost
        self._index = {s.name: i for i, s in enumerate(sites)}
        self._regions: dict[int, dict[int, NarrowedRegion | Reason]] = {}

    def regions_of(self, consumer: int) -> dict[int, NarrowedRegion | Reason]:
        """Return the producers of a site's activation, each with the region that is narrowed with it or the reason why it cannot be.

        Args:
            consumer: Number of the site.
        """
        if consumer not in self._regions:
            producers = [self._index[name] for name in self.sites[consumer].reads]
            self._regions[consumer] = {j: narrowed_region(self.sites[j], self.sites[consumer]) for j in producers}
        return self._regions[consumer]

    def producer_time_delta(self, consumer: int, products: Sequence[ProductPlan], earlier: Sequence[SitePlan]) -> tuple[float, float]:
        """Predict what narrowing changes if a site is carried out as planned.

        Args:
            consumer: Number of the site.
            products: The plans of its products.
            earlier: The plans of the sites before it.

        Returns:
            The time of its producers in us, as they are planned and as they would be if narrowed. What the site itself saves is taken off the latter. Zeros if
            no producer can be narrowed, or would be faster.
        """
        eligible = self.cost.predicts_time and _selects_by_weight(products) and _custom_kernel(products) is None
        producers = self._narrowable(consumer) if eligible else []
        before = after = 0.0
        for j in producers:
            gathering = self._with_gathers([j], earlier)
            narrow = self.narrowed_producer(j, (earlier if gathering is None else gathering)[j], self.sites[consumer].name, products[0].how)
            wide_us, narrow_us = _total(earlier[j].products), _total(narrow.products)
            if _custom_kernel(narrow.products) is None and margins.pays(wide_us, narrow_us, margins.SKIP_MARGIN):
                before, after = before + wide_us, after + narrow_us
        return (before, after + _total(self.fed_products(consumer, products)) - _total(products)) if before else (0.0, 0.0)

    def narrow(self, plan: Plan) -> Plan:
        """Narrow the producers of every consumer where that saves time; a consumer whose producers are not narrowed says why.

        Custom kernels read whole operands. The sites that they would run are given to Inductor if all of the sites together then take less time.

        Args:
            plan: The plan with every site decided.
        """
        sites: Sequence[SitePlan] = plan.sites
        taken = set[fx.Node]()
        for i in range(len(sites)):
            if not self.cost.predicts_time or not _selects_by_weight(sites[i].products):
                continue
            narrowed, region = self._narrow_for(i, sites, taken)
            by_inductor = self._with_gathers([i, *self._narrowable(i)], sites)
            if by_inductor is not None:
                others, others_region = self._narrow_for(i, by_inductor, taken)
                if others[i].shrinks and margins.pays(_total_of(narrowed), _total_of(others), margins.SKIP_MARGIN):
                    narrowed, region = others, others_region
            sites = narrowed
            taken |= region
        return replace(plan, sites=tuple(sites))

    def _narrowable(self, consumer: int) -> list[int]:
        return [j for j, region in self.regions_of(consumer).items() if not isinstance(region, Reason)]

    def _narrow_for(self, consumer: int, sites: Sequence[SitePlan], taken: set[fx.Node]) -> tuple[Sequence[SitePlan], set[fx.Node]]:
        """The sites with the producers of one consumer narrowed where that pays, and the nodes that are narrowed with them.

        The nodes in `taken` are narrowed for other consumers already.
        """
        i, new = consumer, list(sites)
        names, remarks, mine = list[str](), list[Reason](), dict[fx.Node, int]()
        for j, region in self.regions_of(i).items():
            narrow, fed = self.narrowed_producer(j, new[j], new[i].name, new[i].products[0].how), self.fed_products(i, new[i].products)
            if isinstance(region, Reason):
                reason = region
            elif (kernel := _custom_kernel_reason(new[i], new[j])) is not None:
                reason = kernel
            elif taken & region.keys() or any(mine.get(n, d) != d for n, d in region.items()):
                reason = NARROWED_OTHERWISE()
            elif not margins.pays(_total((*new[j].products, *new[i].products)), _total((*narrow.products, *fed)), margins.SKIP_MARGIN):
                reason = NO_FASTER()
            else:
                new[j], mine = narrow, mine | region
                new[i] = replace(new[i], products=fed)
                names.append(self.sites[j].name)
                continue
            remarks.append(ALL_CHANNELS(name=self.sites[j].name, why=reason))
        if names:
            new[i] = replace(new[i], shrinks=tuple(names))
            remarks.insert(0, PRODUCERS_NARROWED(names=" and ".join(names) + (" makes" if len(names) == 1 else " make")))
        new[i] = replace(new[i], reason=join((new[i].reason, *remarks)))
        return new, set(mine)

    def _with_gathers(self, members: Sequence[int], sites: Sequence[SitePlan]) -> list[SitePlan] | None:
        """The sites with these members, and those that share indices with one of them, run by Inductor on gathered operands.

        None if that would change no site, or if one of them must not be run by Inductor.
        """
        leaders = {sites[i].products[0].shares or sites[i].name for i in members}
        by_kernel = [i for i, s in enumerate(sites) if (s.products[0].shares or s.name) in leaders and _custom_kernel(s.products) is not None]
        if not by_kernel or any("inductor" not in sites[i].lowerings for i in by_kernel):
            return None
        new = list(sites)
        for i in by_kernel:
            products = tuple(self._with_gather(self.sites[i], p, d) for p, d in zip(self.sites[i].products, sites[i].products, strict=True))
            new[i] = replace(sites[i], products=products, reason=join((sites[i].reason, BUT_BY_INDUCTOR())))
        return new

    def _with_gather(self, site: Site, product: Product, plan: ProductPlan) -> ProductPlan:
        if plan.lowering not in CUSTOM_KERNELS or plan.how is None:
            return plan
        new = replace(plan, reason=join((plan.reason, BUT_BY_INDUCTOR())), lowering="inductor")
        return new.with_estimate(planned_estimate(site, product, new, self.cost))

    def fed_products(self, consumer: int, products: Sequence[ProductPlan]) -> tuple[ProductPlan, ...]:
        """Return a consumer's products when its activation arrives narrow, and the gradient of the activation may stay so.

        Args:
            consumer: Number of the site.
            products: The plans of its products.
        """
        site, fed = self.sites[consumer], list(products)
        for i, (p, d) in enumerate(zip(site.products, products, strict=True)):
            if p.name in ("output", "grad_input") and d.decision in ("sampled", "coupled"):
                fed[i] = self._with_narrow_estimate(site, p, d, None, True)
        return tuple(fed)

    def narrowed_producer(self, producer: int, plan: SitePlan, consumer: str, estimator: Estimator | None) -> SitePlan:
        """Return a producer's plan when it makes only what the consumer keeps. A gradient that is sampled on its own axis, or replaced, is not changed.

        Args:
            producer: Number of the site.
            plan: Its plan.
            consumer: Name of the consumer.
            estimator: What the consumer keeps.
        """
        site = self.sites[producer]
        assert estimator is not None
        note = NARROWED(kept=estimator.kept, size=estimator.size, consumer=consumer)
        products = list(plan.products)
        for n, (p, d) in enumerate(zip(site.products, plan.products, strict=True)):
            if p.name == "output" or d.decision in ("exact", "coupled"):
                new = self._with_narrow_estimate(site, p, d, estimator, bool(plan.shrinks) and p.name != "grad_weight")
                products[n] = replace(new, reason=join((d.reason, note)), skips=consumer)
        return replace(plan, products=tuple(products)).with_note(note)

    def _with_narrow_estimate(self, site: Site, product: Product, plan: ProductPlan, only: Estimator | None, fed: bool) -> ProductPlan:
        return plan.with_estimate(self.cost.narrowed(site, product, plan.how, only, fed, plan.shares is not None))


def _custom_kernel_reason(*plans: SitePlan) -> Reason | None:
    """Why sites stay whole if a custom kernel runs one of them."""
    for plan in plans:
        kernel = _custom_kernel(plan.products)
        if kernel is not None and "inductor" not in plan.lowerings:
            return WHOLE_OPERANDS(kernel=kernel)
        if kernel is not None:
            return KERNEL_NO_SLOWER(kernel=kernel)
    return None


def _custom_kernel(products: Sequence[ProductPlan]) -> str | None:
    """The first custom kernel that runs one of the products, if any does."""
    return next((p.lowering for p in products if p.lowering in CUSTOM_KERNELS), None)


def _selects_by_weight(products: Sequence[ProductPlan]) -> bool:
    """Whether a site's selection is known before its activation, and nothing of the site needs the channels that are not kept."""
    output = products[0]
    if output.decision != "sampled" or output.how is None or output.how.method != WEIGHTS_ONLY:
        return False
    return all(p.decision == "coupled" or (p.replacement is not None and p.replacement.method in ("zero", "random")) for p in products[1:])


def _total(products: Iterable[ProductPlan]) -> float:
    return math.fsum(p.time_sampled_us or 0.0 for p in products)


def _total_of(sites: Sequence[SitePlan]) -> float:
    return math.fsum(_total(s.products) for s in sites)
