"""Narrow the producers of a site, and everything between them and the site, to the channels that the site keeps.

`planning.producer_narrowing` decides what is narrowed and says why this is legal. The nodes are edited in place: each gets narrow operands and a narrow
fake value. Operands that come from outside the region are gathered. Where a node outside the region reads a gradient inside it, the gradient is scattered
back to its full size for that reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gather import Axis, sample_by_weight, take, untake
from approx_compile.kernels.unit_selection import UnitChoice, choose_units, look_up_units
from approx_compile.passes.fx_utils import CONV, VIEWS, update_fake_value
from approx_compile.passes.planning import zero_propagation
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.planning.producer_narrowing import NarrowedRegion, narrowed_region
from approx_compile.passes.planning.unit_choice import parameter_behind
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, SampledOperands, inline, match_layout, move_before, save_selection_of, with_current_operands
from approx_compile.passes.sites.conv_gradients import conv_weight_axes
from approx_compile.passes.sites.site import Site


@dataclass(frozen=True)
class ConsumerRegion:
    """Everything that is narrowed for one consumer.

    Attributes:
        consumer: The site whose kept input channels are the only ones computed.
        estimator: How the consumer's output is sampled.
        producers: The sites whose outputs become the consumer's activation.
        dims: All nodes of the region, each with its channel dim.
        late: Those of the nodes that depend on the consumer's gradients.
        units: How the producer chooses its units; None if the consumer chooses by its weight.
    """

    consumer: Site
    estimator: Estimator
    producers: tuple[Site, ...]
    dims: NarrowedRegion
    late: frozenset[fx.Node]
    units: UnitChoice | None


def consumer_regions(sites: Sequence[Site], plan: Plan) -> dict[str, ConsumerRegion]:
    """Return what the plan narrows, by the consumer's name; to be called before the graph is edited."""
    by_name = {s.name: s for s in sites}
    units = {s.name: s.units for s in plan.sites}
    regions: dict[str, ConsumerRegion] = {}
    for site, planned in zip(sites, plan.sites, strict=True):
        estimator = planned.products[0].how
        if not planned.shrinks or estimator is None:
            continue
        dims: NarrowedRegion = {}
        for name in planned.shrinks:
            region = narrowed_region(by_name[name], site)
            assert not isinstance(region, str), f"{name} can't be narrowed for {site.name}: {region}"
            dims |= region
        late = {p.node for p in site.products[1:]}
        for n in site.node.graph.nodes:
            if any(i in late for i in n.all_input_nodes):
                late.add(n)
        producers = tuple(by_name[name] for name in planned.shrinks)
        regions[site.name] = ConsumerRegion(site, estimator, producers, dims, frozenset(late & dims.keys()), units[producers[0].name])
    return regions


class RegionNarrowing:
    """Narrows one region in two steps.

    `forward` edits all that does not depend on the consumer's gradients. Once the consumer's gradients are narrow, `backward` edits the rest.
    The constructor inserts the choice of channels before the first producer; it needs the consumer's weight, or what the producer reads.
    """

    def __init__(self, graph: fx.Graph, region: ConsumerRegion, sampled: dict[str, SampledOperands]) -> None:
        """Insert the selection of channels.

        Args:
            graph: The joint graph, which is edited.
            region: What to narrow.
            sampled: The operands of sampled outputs of sites before, by name.
        """
        self.graph, self.region = graph, region
        self.first = min((p.node for p in region.producers), key=list(graph.nodes).index)
        output = region.consumer.products[0]
        assert output.weight is not None
        weight, weight_axis = output.operands[output.weight], output.axes[output.weight]
        move_before(weight, self.first)
        scale: fx.Node | None = None
        if region.units is None:
            self.idx, taken = inline(graph, self.first, lambda w: sample_by_weight(region.estimator, w, weight_axis), (weight,), region.consumer.node)
        else:
            self.idx, scale = self._choose_units(region.units, sampled.get(region.producers[0].name))
            unit = region.estimator.unit
            taken = inline(graph, self.first, lambda w, idx, scale: take(w, weight_axis, idx, scale, unit), (weight, self.idx, scale), region.consumer.node)
        save_selection_of(region.consumer, output, self.idx, scale)
        operands = (output.operands[0], taken) if output.weight == 1 else (taken, output.operands[1])
        self.narrow_gradients: dict[fx.Node, fx.Node] = {}
        self.sampled = SampledOperands(region.estimator, self.idx, scale, operands, self.narrow_gradients)
        self.old_values = {n: _torch.value(n) for n in region.dims}
        self.taken: dict[tuple[fx.Node, int], fx.Node] = {}

    def _choose_units(self, choice: UnitChoice, fed: SampledOperands | None) -> tuple[fx.Node, fx.Node]:
        """Insert the choice of the producer's units. `fed` says which entries of its input there are, if some were left out."""
        (producer,) = self.region.producers
        x, weight = with_current_operands(producer.products[0]).operands[0], producer.products[0].operands[1]
        bias = producer.node.args[0] if len(producer.node.args) == 3 else None
        assert bias is None or isinstance(bias, fx.Node)
        kept = (None, None) if fed is None else (fed.idx, fed.scale)
        if choice.by_tables:
            found = parameter_behind(weight)
            assert found is not None
            parameter, transposed = found
            idx, scale = inline(self.graph, self.first, lambda x, w, *kept: look_up_units(choice, x, w, transposed, *kept), (x, parameter, *kept))
        else:
            idx, scale = inline(self.graph, self.first, lambda *args: choose_units(choice, *args), (x, weight, bias, *kept))
        return idx, scale

    def forward(self, sampled: dict[str, SampledOperands], narrowed: dict[str, tuple[fx.Node, fx.Node]]) -> SampledOperands:
        """Narrow the producers, then what is made of their outputs, then the consumer.

        Args:
            sampled: The operands of sampled outputs by site; entries of producers get the new operands.
            narrowed: Gets the new operands of every producer.

        Returns:
            The consumer's sampled operands.
        """
        for site in self.region.producers:
            operands = narrowed[site.name] = self._narrow_producer(site)
            if site.name in sampled:
                sampled[site.name] = sampled[site.name]._replace(operands=operands)
        done = {site.node for site in self.region.producers} | self.region.late
        for n in [n for n in self.graph.nodes if n in self.region.dims and n not in done]:
            self._narrow(n)
        node = self.region.consumer.node
        args = list(node.args)
        first = 0 if node.target in CONV else len(args) - 2
        args[first], args[first + 1] = self.sampled.operands
        node.args = tuple(args)
        return self.sampled

    def backward(self) -> None:
        """Narrow what depends on the consumer's gradients, and restore full gradients for readers outside the region."""
        products = {p.node for p in self.region.consumer.products}
        starts = {p.result[0] for p in self.region.consumer.products if p.result is not None}
        for n in [n for n in self.graph.nodes if n in self.region.late]:
            if n not in starts:
                self._narrow(n)
            outside = [u for u in n.users if u not in self.region.dims and u not in products]
            if outside:
                full = self._restore_full_size(n)
                for u in outside:
                    u.replace_input_with(n, full)
                self.narrow_gradients[full] = n

    def _narrow_producer(self, site: Site) -> tuple[fx.Node, fx.Node]:
        """Gather the output channels of a producer's weight and bias. Returns its operands."""
        node, args = site.node, list(site.node.args)
        conv = node.target in CONV
        weight_at = 1 if conv else len(args) - 1  # the activation is the argument before it
        axis = conv_weight_axes(bool(args[6]), 1)[1] if conv else Axis(1)
        bias_at = 2 if conv else 0 if len(args) == 3 else None
        weight, unit = args[weight_at], self.region.estimator.unit
        assert isinstance(weight, fx.Node)
        args[weight_at] = inline(self.graph, node, lambda w, idx: take(w, axis, idx, None, unit), (weight, self.idx))
        if bias_at is not None and isinstance(b := args[bias_at], fx.Node) and _torch.value(b).shape[-1] != 1:
            args[bias_at] = inline(self.graph, node, lambda b, idx: take(b, Axis(b.dim() - 1), idx, None, unit), (b, self.idx))
        node.args = tuple(args)
        update_fake_value(node)
        activation, narrow_weight = args[weight_at - 1], args[weight_at]
        assert isinstance(activation, fx.Node) and isinstance(narrow_weight, fx.Node)
        return activation, narrow_weight

    def _narrow(self, n: fx.Node) -> None:
        """Let an elementwise op, a view or a sum work on narrow operands."""
        dim, value = self.region.dims[n], self.old_values[n]
        if n.target in VIEWS and len(n.args) > 1:
            shape: Any = list(n.args[1])  # type: ignore[arg-type]
            shape[dim] = self.region.estimator.kept
            n.args = (n.args[0], shape)
        elif n.target not in zero_propagation.SUMS:
            n.args = tuple(self._narrow_operand(a, dim - value.dim()) if isinstance(a, fx.Node) else a for a in n.args)
        update_fake_value(n)

    def _narrow_operand(self, x: fx.Node, dim_from_end: int) -> fx.Node:
        """The kept entries of an operand along a dim, which is negative: counted from the last dim."""
        value = x.meta.get("val")
        if x in self.region.dims or not isinstance(value, Tensor) or -dim_from_end > value.dim() or value.shape[dim_from_end] == 1:
            return x
        dim = value.dim() + dim_from_end
        if (x, dim) not in self.taken:
            repeat = _torch.is_backward(x) and _torch.is_pointwise(x) and not x.kwargs
            self.taken[x, dim] = self._repeat_on_kept(x, dim) if repeat else self._gather_kept(x, dim)
        return self.taken[x, dim]

    def _repeat_on_kept(self, x: fx.Node, dim: int) -> fx.Node:
        """Repeat an elementwise op of the backward pass on the kept entries of its operands, so that only those are saved for it."""
        args = [self._narrow_operand(a, dim - _torch.value(x).dim()) if isinstance(a, fx.Node) else a for a in x.args]
        with self.graph.inserting_after(x):
            new = self.graph.call_function(x.target, tuple(args))  # type: ignore[arg-type]
        _torch.copy_provenance(x, new)
        update_fake_value(new)
        return new

    def _gather_kept(self, x: fx.Node, dim: int) -> fx.Node:
        """Gather the kept entries of an operand after both the operand and the indices are there."""
        order = list(self.graph.nodes)
        before_indices = order.index(x) < order.index(self.first)
        at, provenance = (self.first, self.first) if before_indices else (x.next, x)
        new = inline(self.graph, at, lambda v, idx: take(v, Axis(dim), idx, None, self.region.estimator.unit), (x, self.idx), provenance)
        assert isinstance(new, fx.Node)
        return new

    def _restore_full_size(self, n: fx.Node) -> fx.Node:
        """Insert the full-size gradient: the kept entries in place, zeros elsewhere."""
        estimator, layout, axis = self.region.estimator, MemoryLayout.of(self.old_values[n]), Axis(self.region.dims[n])

        def run(y: Tensor, idx: Tensor) -> Tensor:
            return match_layout(untake(y, axis, idx, None, estimator.unit, estimator.size), layout)

        full = inline(self.graph, n.next, run, (n, self.idx), n)
        assert isinstance(full, fx.Node)
        return full
