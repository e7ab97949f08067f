"""Producer shrinking: a site whose choice depends on its weight alone is known before its activation is, so the sites that make the activation make the
kept channels only.

With Y = A B, h = f(Y) and the consumer h W: where `idx` are the channels of h that the consumer keeps, B[:, idx] and the bias's entries are gathered in place
of h[:, idx], f runs on the narrow Y, and so does its backward pass, which ends in a narrow dY: dB = A^T dY, zeros outside `idx`, and dA = dY B[:, idx]^T. No
value changes but for the order of summation.

All between producer and consumer is either unknown outside the kept channels (the activation and what is made of it) or zero there (gradients). What is
unknown may have no reader that is not narrowed as well; what is zero is put back in place for the others. BatchNorm in training reads all channels for its
running statistics, which would go stale: it forbids shrinking, as any other reader does.

Decided here (`Producers`), found again and carried out for `rewrite` (`Region`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.products import Axis, choose_by_weight, take, untake
from approx_compile.machine import Machine
from approx_compile.passes import cost, zeros
from approx_compile.passes.plan import Plan, ProductPlan, SitePlan
from approx_compile.passes.sites import CONV, NO_GRADIENT, VIEWS, Product, Site, conv_weight_axes, one_contraction
from approx_compile.passes.splice import Sampled, inline, keep_choice, like, refresh

aten = torch.ops.aten

METHOD = "topk_weights"
"""The one choice that needs no activation."""


@dataclass(frozen=True)
class Reach:
    """What lies between a producer and the consumer, forward and backward: every node with its channel dim; and which of the nodes are zero outside of what is kept."""

    dims: dict[fx.Node, int]
    zero: frozenset[fx.Node]


# --- legal ---


def reach(producer: Site, consumer: Site) -> Reach | str:
    """What is narrowed with `producer` when it makes only what `consumer` keeps, or why it can't be."""
    why = _can_produce(producer) or _can_consume(consumer)
    if why is not None:
        return why
    output = consumer.products[0]
    assert output.weight is not None
    activation, weight = output.operands[1 - output.weight], output.operands[output.weight]
    if producer.node in _ancestors(weight):
        return f"the weight of {consumer.name} is made from it"
    start = next((p.result for p in consumer.products if p.name == "grad_input"), None)
    found = _closure(producer.node, _channels(producer), start, {p.node for p in consumer.products})
    if isinstance(found, str):
        return found
    if found.dims.get(activation) != output.axes[1 - output.weight].dim or weight in found.dims:
        return f"what {consumer.name} keeps are not its output channels"
    if any(p.output_grad is None or found.dims.get(p.output_grad) != p.output_grad_dim for p in producer.products[1:]):
        return f"its gradient is not that of {consumer.name} alone"
    return found


def _can_produce(site: Site) -> str | None:
    if site.blocked not in (None, NO_GRADIENT):
        return site.blocked
    if not one_contraction(site) or site.products[0].weight != 1:
        return "it is batched, grouped or without a weight on its right"
    return None


def _can_consume(site: Site) -> str | None:
    return None if one_contraction(site) else f"{site.name} is batched or grouped"


def _channels(site: Site) -> int:
    """The dim of a producer's output that its weight alone gives: columns, or a convolution's channels."""
    return 1


def _ancestors(n: fx.Node) -> set[fx.Node]:
    found, todo = {n}, [n]
    while todo:
        new = [i for i in todo.pop().all_input_nodes if i not in found]
        found.update(new)
        todo += new
    return found


def _closure(producer: fx.Node, dim: int, start: tuple[fx.Node, int] | None, own: set[fx.Node]) -> Reach | str:
    """Everything elementwise behind the producer. `start`: the consumer's gradient of the activation; `own`: the consumer's products."""
    zero = zeros.follow(*start) if start is not None else {}
    dims = {producer: dim}
    n = producer.next
    while n.op != "root":
        read = [i for i in n.all_input_nodes if i in dims]
        if start is not None and n is start[0]:
            dims[n] = start[1]
        elif read and n not in own:
            found = carried(n, dims, n in zero)
            if found is not None and zero.get(n, found) == found:
                dims[n] = found
            elif not all(i in zero for i in read):
                return _reader(n)
        n = n.next
    return Reach(dims, frozenset(n for n in dims if n in zero))


def carried(n: fx.Node, dims: dict[fx.Node, int], zero: bool) -> int | None:
    """The channel dim of an elementwise op or a view of nodes with one, or None. Sums over other dims keep it, too, but what is unknown must not be summed."""
    value = n.meta.get("val")
    if n.op != "call_function" or not isinstance(value, Tensor) or any(isinstance(a, fx.Node) for a in n.kwargs.values()):
        return None
    if n.target in VIEWS or n.target is aten.permute.default or (zero and n.target in zeros.SUMS):
        return zeros.carry(n, dims)
    if not (_torch.is_pointwise(n) or n.target in zeros.UNARY):
        return None
    if any(isinstance(a, (list, tuple)) and any(isinstance(i, fx.Node) for i in a) for a in n.args):
        return None
    found = {dims[a] + value.dim() - _torch.value(a).dim() for a in n.args if isinstance(a, fx.Node) and a in dims}
    return found.pop() if len(found) == 1 else None


def _reader(n: fx.Node) -> str:
    if n.op == "output":
        return "its activation is an output of the graph"
    if n.target is aten.var_mean.correction or "batch_norm" in str(n.target):
        return "a normalisation needs all its channels (BatchNorm's running statistics would go stale)"
    return f"{str(n.target).removeprefix('aten.')} reads its activation as well"


# --- decided ---


class Producers:
    """Which sites can be shrunk for which, what that saves, and the plan in which they are."""

    def __init__(self, sites: Sequence[Site], machine: Machine | None) -> None:
        self.sites = sites
        self.machine = machine
        self._index = {s.name: i for i, s in enumerate(sites)}

    @functools.cache  # noqa: B019 (lives as long as one pass over one graph)
    def of(self, i: int) -> dict[int, Reach | str]:
        """The producers of site `i`'s activation, each with what is narrowed with it or why it can't be."""
        return {self._index[name]: reach(self.sites[self._index[name]], self.sites[i]) for name in self.sites[i].reads}

    def saving_us(self, i: int, products: Sequence[ProductPlan]) -> float:
        """The time that exact producers would save if site `i` was carried out as `products` say."""
        if self.machine is None or not _asks(products):
            return 0.0
        found = [j for j, r in self.of(i).items() if isinstance(r, Reach)]
        if not found:
            return 0.0
        saved = _total(products) - _total(self._fed(i, products))
        for j in found:
            exact = [cost.exact(self.sites[j], p, self.machine).time_us or 0.0 for p in self.sites[j].products]
            less = [cost.shrunk(self.sites[j], p, None, products[0].how, False, self.machine).time_us or 0.0 for p in self.sites[j].products]
            saved += max(0.0, sum(exact) - sum(less))
        return saved

    def shrink(self, plan: Plan) -> Plan:
        """The plan with producers that make only what their consumer keeps, where that saves time; consumers whose producers can't be say why."""
        new, taken = list(plan.sites), set[fx.Node]()
        for i in range(len(self.sites)):
            how = new[i].products[0].how
            if self.machine is None or how is None or not _asks(new[i].products):
                continue
            done, said = [], []
            for j, found in self.of(i).items():
                why = found if isinstance(found, str) else "part of it is narrowed for another site" if taken & found.dims.keys() else None
                shrunk = self._narrow(j, new[j], self.sites[i].name, how)
                if why is not None:
                    said.append(f"all channels of {self.sites[j].name} are made: {why}")
                elif cost.pays(_total(new[j].products), _total(shrunk.products), cost.SKIP_MARGIN):
                    new[j] = shrunk
                    done.append((j, found))
                else:
                    said.append(f"all channels of {self.sites[j].name} are made: to gather its weight takes longer")
            for _, found in done:
                assert isinstance(found, Reach)
                taken |= found.dims.keys()
            if done:
                names = tuple(self.sites[j].name for j, _ in done)
                fed = self._fed(i, new[i].products)
                new[i] = replace(new[i], products=fed, shrinks=names)
                said.insert(0, f"{' and '.join(names)} make{'s' if len(names) == 1 else ''} these channels only")
            new[i] = replace(new[i], reason="; ".join([new[i].reason, *said]))
        return replace(plan, sites=tuple(new))

    def _fed(self, i: int, products: Sequence[ProductPlan]) -> tuple[ProductPlan, ...]:
        """A consumer's products when its activation comes narrow, and the gradient of it may leave so."""
        return tuple(
            self._timed(self.sites[i], p, d, None, True) if p.name in ("output", "grad_input") and d.decision in ("sampled", "coupled") else d
            for p, d in zip(self.sites[i].products, products, strict=True)
        )

    def _narrow(self, j: int, plan: SitePlan, consumer: str, how: Estimator) -> SitePlan:
        """A producer's plan when it makes only what the consumer keeps."""
        products = [
            replace(self._timed(self.sites[j], p, d, how, bool(plan.shrinks) and p.name != "grad_weight"), reason=f"{d.reason}; {_only(how, consumer)}", skips=consumer)
            if p.name == "output" or d.decision in ("exact", "coupled")
            else d
            for p, d in zip(self.sites[j].products, plan.products, strict=True)
        ]
        return replace(plan, products=tuple(products), reason=f"{plan.reason}; {_only(how, consumer)}")

    def _timed(self, site: Site, product: Product, plan: ProductPlan, only: Estimator | None, fed: bool) -> ProductPlan:
        new = cost.shrunk(site, product, plan.how, only, fed, self.machine)
        return replace(plan, flops_sampled=new.flops, time_sampled_us=new.time_us, terms=new.terms, sizes=new.sizes)


def _only(how: Estimator, consumer: str) -> str:
    return f"only the {how.kept} of {how.size} channels that {consumer} keeps"


def _asks(products: Sequence[ProductPlan]) -> bool:
    """Whether a site's choice is known before its activation, and nothing of the site needs the channels that are not kept."""
    output = products[0]
    if output.decision != "sampled" or output.how is None or output.how.method != METHOD:
        return False
    return all(p.decision == "coupled" or (p.replacement is not None and p.replacement.method in ("zero", "random")) for p in products[1:])


def _total(products: Iterable[ProductPlan]) -> float:
    return sum(p.time_sampled_us or 0.0 for p in products)


# --- carried out ---


@dataclass
class Region:
    """What is narrowed for one consumer: its producers and all nodes in between, each with its channel dim."""

    consumer: Site
    how: Estimator
    producers: tuple[Site, ...]
    dims: dict[fx.Node, int]
    zero: frozenset[fx.Node]
    late: frozenset[fx.Node]
    """Nodes that depend on the consumer's gradients."""


def regions(sites: Sequence[Site], plan: Plan) -> dict[str, Region]:
    """By consumer, what the plan narrows; to be asked before the graph is edited."""
    by_name = {s.name: s for s in sites}
    found: dict[str, Region] = {}
    for site, planned in zip(sites, plan.sites, strict=True):
        if not planned.shrinks:
            continue
        how, dims, zero = planned.products[0].how, dict[fx.Node, int](), frozenset[fx.Node]()
        for name in planned.shrinks:
            one = reach(by_name[name], site)
            assert isinstance(one, Reach) and how is not None
            dims, zero = dims | one.dims, zero | one.zero
        assert how is not None
        late: set[fx.Node] = set()
        gradients = {p.node for p in site.products[1:]}
        for n in site.node.graph.nodes:
            if n in gradients or any(i in late for i in n.all_input_nodes):
                late.add(n)
        found[site.name] = Region(site, how, tuple(by_name[name] for name in planned.shrinks), dims, zero, frozenset(late & dims.keys()))
    return found


class Narrowing:
    """One region being narrowed: first all that does not depend on the consumer's gradients, then, when those are narrow, the rest."""

    def __init__(self, graph: fx.Graph, region: Region) -> None:
        self.graph, self.region = graph, region
        self.first = min((p.node for p in region.producers), key=list(graph.nodes).index)
        output = region.consumer.products[0]
        assert output.weight is not None
        weight = output.operands[output.weight]
        _hoist(weight, self.first)
        self.idx, taken = inline(graph, self.first, lambda w: choose_by_weight(region.how, w, output.axes[output.weight or 0]), (weight,), region.consumer.node)
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
        refresh(node)
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
        elif n.target not in zeros.SUMS:
            n.args = tuple(self._operand(a, dim - value.dim()) if isinstance(a, fx.Node) else a for a in n.args)
        refresh(n)

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
        refresh(new)
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
        how, old, axis = self.region.how, self.old[n], Axis(self.region.dims[n])
        full = inline(self.graph, n.next, lambda y, idx: like(untake(y, axis, idx, None, how.unit, how.size), old), (n, self.idx), n)
        assert isinstance(full, fx.Node)
        return full


def _hoist(n: fx.Node, before: fx.Node) -> None:
    """Move a node and what it is made of in front of another one, where they are not."""
    order = {m: i for i, m in enumerate(before.graph.nodes)}

    def behind(m: fx.Node) -> Iterator[fx.Node]:
        if order[m] > order[before]:
            for i in m.all_input_nodes:
                yield from behind(i)
            yield m

    for m in dict.fromkeys(behind(n)):
        before.prepend(m)
