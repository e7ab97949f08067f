"""Producer shrinking carried out: what lies between producers and the consumer works on the kept channels only.

Nodes are edited in place: each gets narrow operands and a narrow fake value. What they read from elsewhere is gathered; whoever reads a gradient among
them and is not narrowed itself gets it put back in place. The decision is made in `producers`, which also says why this is legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gather import Axis, sample_by_weight, take, untake
from approx_compile.passes.fx_utils import CONV, VIEWS, update_fake_value
from approx_compile.passes.planning import zero_propagation
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.planning.producer_narrowing import NarrowedRegion, narrowed_region
from approx_compile.passes.rewrite.graph_edit import Layout, Sampled, hoist, inline, keep_choice, like
from approx_compile.passes.sites.conv_gradients import conv_weight_axes
from approx_compile.passes.sites.site import Site


@dataclass(frozen=True)
class Region:
    """What is narrowed for one consumer: its producers and all nodes in between, each with its channel dim; `late` are those that depend on the consumer's
    gradients."""

    consumer: Site
    how: Estimator
    producers: tuple[Site, ...]
    dims: NarrowedRegion
    late: frozenset[fx.Node]


def regions(sites: Sequence[Site], plan: Plan) -> dict[str, Region]:
    """By consumer, what the plan narrows; to be asked before the graph is edited."""
    by_name = {s.name: s for s in sites}
    found: dict[str, Region] = {}
    for site, planned in zip(sites, plan.sites, strict=True):
        how = planned.products[0].how
        if not planned.shrinks or how is None:
            continue
        dims: NarrowedRegion = {}
        for name in planned.shrinks:
            one = narrowed_region(by_name[name], site)
            assert not isinstance(one, str), f"{name} can't be narrowed for {site.name}: {one}"
            dims |= one
        late = {p.node for p in site.products[1:]}
        for n in site.node.graph.nodes:
            if any(i in late for i in n.all_input_nodes):
                late.add(n)
        found[site.name] = Region(site, how, tuple(by_name[name] for name in planned.shrinks), dims, frozenset(late & dims.keys()))
    return found


class Narrowing:
    """One region being narrowed: first all that does not depend on the consumer's gradients, then, when those are narrow, the rest."""

    def __init__(self, graph: fx.Graph, region: Region) -> None:
        self.graph, self.region = graph, region
        self.first = min((p.node for p in region.producers), key=list(graph.nodes).index)
        output = region.consumer.products[0]
        assert output.weight is not None
        weight = output.operands[output.weight]
        hoist(weight, self.first)
        self.idx, taken = inline(graph, self.first, lambda w: sample_by_weight(region.how, w, output.axes[output.weight or 0]), (weight,), region.consumer.node)
        keep_choice(self.idx, f"{region.consumer.name}.output.idx")
        operands = (output.operands[0], taken) if output.weight == 1 else (taken, output.operands[1])
        self.narrow: dict[fx.Node, fx.Node] = {}
        self.sampled = Sampled(region.how, self.idx, None, operands, self.narrow)
        self.old = {n: _torch.value(n) for n in region.dims}
        self.taken: dict[tuple[fx.Node, int], fx.Node] = {}

    def forward(self, kept: dict[str, Sampled], narrow: dict[str, tuple[fx.Node, fx.Node]]) -> Sampled:
        """Producers, then what is made of their outputs, and the consumer. The producers' narrow operands go to `narrow`, and to what `kept` has of them."""
        for site in self.region.producers:
            operands = narrow[site.name] = self._producer(site)
            if site.name in kept:
                kept[site.name] = kept[site.name]._replace(operands=operands)
        for n in [n for n in self.graph.nodes if n in self.region.dims and n not in self.region.late and not any(n is p.node for p in self.region.producers)]:
            self._narrow(n)
        node = self.region.consumer.node
        args = list(node.args)
        first = 0 if node.target in CONV else len(args) - 2
        args[first], args[first + 1] = self.sampled.operands
        node.args = tuple(args)
        return self.sampled

    def _producer(self, site: Site) -> tuple[fx.Node, fx.Node]:
        node, args = site.node, list(site.node.args)
        conv = node.target in CONV
        at = 1 if conv else len(args) - 1  # of the weight, which stands behind the activation
        axis = conv_weight_axes(bool(args[6]), 1)[1] if conv else Axis(1)
        bias = 2 if conv else 0 if len(args) == 3 else None
        weight, unit = args[at], self.region.how.unit
        assert isinstance(weight, fx.Node)
        args[at] = inline(self.graph, node, lambda w, idx: take(w, axis, idx, None, unit), (weight, self.idx))
        if bias is not None and isinstance(b := args[bias], fx.Node) and _torch.value(b).shape[-1] != 1:
            args[bias] = inline(self.graph, node, lambda b, idx: take(b, Axis(b.dim() - 1), idx, None, unit), (b, self.idx))
        node.args = tuple(args)
        update_fake_value(node)
        activation = args[at - 1]
        narrow = args[at]
        assert isinstance(activation, fx.Node) and isinstance(narrow, fx.Node)
        return activation, narrow

    def _narrow(self, n: fx.Node) -> None:
        """Let an elementwise op or a view work on narrow operands."""
        dim, value = self.region.dims[n], self.old[n]
        if n.target in VIEWS and len(n.args) > 1:
            shape: Any = list(n.args[1])  # type: ignore[arg-type]
            shape[dim] = self.region.how.kept
            n.args = (n.args[0], shape)
        elif n.target not in zero_propagation.SUMS:
            n.args = tuple(self._operand(a, dim - value.dim()) if isinstance(a, fx.Node) else a for a in n.args)
        update_fake_value(n)

    def _operand(self, x: fx.Node, behind: int) -> fx.Node:
        """The kept entries of an operand, on its dim `behind` (counted from the last)."""
        value = x.meta.get("val")
        if x in self.region.dims or not isinstance(value, Tensor) or -behind > value.dim() or value.shape[behind] == 1:
            return x
        dim = value.dim() + behind
        if (x, dim) not in self.taken:
            self.taken[x, dim] = self._copied(x, dim) if _torch.is_backward(x) and _torch.is_pointwise(x) and not x.kwargs else self._take(x, dim)
        return self.taken[x, dim]

    def _copied(self, x: fx.Node, dim: int) -> fx.Node:
        """The backward pass's own arithmetic on something saved, repeated on what is kept of that: less is saved then."""
        args = [self._operand(a, dim - _torch.value(x).dim()) if isinstance(a, fx.Node) else a for a in x.args]
        with self.graph.inserting_after(x):
            new = self.graph.call_function(x.target, tuple(args))  # type: ignore[arg-type]
        _torch.copy_provenance(x, new)
        update_fake_value(new)
        return new

    def _take(self, x: fx.Node, dim: int) -> fx.Node:
        order = list(self.graph.nodes)
        early = order.index(x) < order.index(self.first)
        at, source = (self.first, self.first) if early else (x.next, x)
        new = inline(self.graph, at, lambda v, idx: take(v, Axis(dim), idx, None, self.region.how.unit), (x, self.idx), source)
        assert isinstance(new, fx.Node)
        return new

    def backward(self) -> None:
        """Once the consumer's gradients are narrow: the chain behind them, and its whole in place for those who read it and are not narrowed."""
        own = {p.node for p in self.region.consumer.products}
        starts = {p.result[0] for p in self.region.consumer.products if p.result is not None}
        for n in [n for n in self.graph.nodes if n in self.region.late]:
            if n not in starts:
                self._narrow(n)
            others = [u for u in n.users if u not in self.region.dims and u not in own]
            if others:
                full = self._whole(n)
                for u in others:
                    u.replace_input_with(n, full)
                self.narrow[full] = n

    def _whole(self, n: fx.Node) -> fx.Node:
        how, old, axis = self.region.how, Layout.of(self.old[n]), Axis(self.region.dims[n])
        full = inline(self.graph, n.next, lambda y, idx: like(untake(y, axis, idx, None, how.unit, how.size), old), (n, self.idx), n)
        assert isinstance(full, fx.Node)
        return full
