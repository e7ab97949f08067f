"""Producer shrinking: a site whose choice depends on its weight alone is known before its activation is, so the sites that make the activation make the
kept channels only.

With Y = A B, h = f(Y) and the consumer h W: where `idx` are the channels of h that the consumer keeps, B[:, idx] and the bias's entries are gathered in place
of h[:, idx], f runs on the narrow Y, and so does its backward pass, which ends in a narrow dY: dB = A^T dY, zeros outside `idx`, and dA = dY B[:, idx]^T. No
value changes but for the order of summation.

All between producer and consumer is either unknown outside the kept channels (the activation and what is made of it) or zero there (gradients). What is
unknown may have no reader that is not narrowed as well; what is zero is put back in place for the others. BatchNorm in training would let the running
statistics of the other channels go stale: it forbids shrinking, as any other reader does. In eval mode it is elementwise, and narrowed.

Decided here, carried out by `narrowing`.
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
from approx_compile.machine import Machine
from approx_compile.passes.cost import estimates
from approx_compile.passes.fx_utils import VIEWS, op_name
from approx_compile.passes.planning import zero_propagation
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan
from approx_compile.passes.sites.site import NO_GRADIENT, Product, Site, one_contraction

aten = torch.ops.aten

WEIGHTS_ONLY = "topk_weights"
"""The one choice that needs no activation."""


NarrowedRegion = dict[fx.Node, int]
"""What lies between a producer and the consumer, forward and backward: every node that is narrowed with its channel dim."""

# --- legal ---


def narrowed_region(producer: Site, consumer: Site) -> NarrowedRegion | str:
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
    found = _closure(producer.node, start, consumer.node, {p.node for p in consumer.products[1:]})
    if isinstance(found, str):
        return found
    if [n for n in consumer.node.all_input_nodes if n in found] != [activation]:
        return f"{consumer.name} reads it in other ways, too"
    if found.get(activation) != output.axes[1 - output.weight].dim:
        return f"what {consumer.name} keeps are not its output channels"
    if any(p.output_grad is None or found.get(p.output_grad) != p.output_grad_dim for p in producer.products[1:]):
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


def _ancestors(n: fx.Node) -> set[fx.Node]:
    found, todo = {n}, [n]
    while todo:
        new = [i for i in todo.pop().all_input_nodes if i not in found]
        found.update(new)
        todo += new
    return found


def _closure(producer: fx.Node, start: tuple[fx.Node, int] | None, consumer: fx.Node, gradients: set[fx.Node]) -> NarrowedRegion | str:
    """Everything elementwise behind the channels (dim 1) of the producer. `start`: the consumer's gradient of the activation, of its `gradients`."""
    zero = zero_propagation.propagate_zeros(dict([start])) if start is not None else {}
    dims, behind, others = {producer: 1}, {consumer}, list[fx.Node]()
    n = producer.next
    while n.op != "root":
        read = [i for i in n.all_input_nodes if i in dims]
        forward = not _torch.is_backward(n)
        if forward and any(i in behind for i in n.all_input_nodes):
            behind.add(n)
        if start is not None and n is start[0]:
            dims[n] = start[1]
        elif read and n is not consumer and n not in gradients and (n in zero or not all(i in zero for i in read)):
            found = narrowed_dim(n, dims, n in zero) if not (n in behind and forward) else None
            if found is not None and zero.get(n, found) == found:
                dims[n] = found
            elif not all(i in zero for i in read):
                others.append(n)
        n = n.next
    if others:
        return _reader(next((n for n in others if not _torch.is_backward(n)), others[0]), dims)
    return dims


def narrowed_dim(n: fx.Node, dims: dict[fx.Node, int], zero: bool) -> int | None:
    """The channel dim of an elementwise op or a view of nodes with one, or None. Sums over other dims keep it, too, but what is unknown must not be summed."""
    value = n.meta.get("val")
    if n.op != "call_function" or not isinstance(value, Tensor) or any(isinstance(a, fx.Node) for a in n.kwargs.values()):
        return None
    if n.target in VIEWS or n.target is aten.permute.default or (zero and n.target in zero_propagation.SUMS):
        return zero_propagation.propagate_through(n, dims)
    if not (_torch.is_pointwise(n) or n.target in zero_propagation.UNARY):
        return None
    if any(isinstance(a, (list, tuple)) and any(isinstance(i, fx.Node) for i in a) for a in n.args):
        return None
    found = {dims[a] + value.dim() - _torch.value(a).dim() for a in n.args if isinstance(a, fx.Node) and a in dims}
    return found.pop() if len(found) == 1 else None


def _reader(n: fx.Node, dims: NarrowedRegion) -> str:
    if n.op == "output":
        return "its activation is an output of the graph"
    if n.target is aten.var_mean.correction:
        (activation,) = n.all_input_nodes
        over: Any = n.args[1]
        by_channel = dims[activation] not in {int(d) % _torch.value(activation).dim() for d in over}
        return "the running statistics of BatchNorm would go stale" if by_channel else "a normalisation over channels reads its activation"
    return f"{op_name(n)} reads its activation as well"


# --- decided ---


class Producers:
    """Which sites can be shrunk for which, what that saves, and the plan in which they are."""

    def __init__(self, sites: Sequence[Site], machine: Machine | None) -> None:
        self.sites = sites
        self.machine = machine
        self._index = {s.name: i for i, s in enumerate(sites)}
        self._found: dict[int, dict[int, NarrowedRegion | str]] = {}

    def of(self, i: int) -> dict[int, NarrowedRegion | str]:
        """The producers of site `i`'s activation, each with what is narrowed with it or why it can't be."""
        if i not in self._found:
            self._found[i] = {self._index[name]: narrowed_region(self.sites[self._index[name]], self.sites[i]) for name in self.sites[i].reads}
        return self._found[i]

    def beside(self, i: int, products: Sequence[ProductPlan], earlier: Sequence[SitePlan]) -> tuple[float, float]:
        """The time of producers, us, as planned `earlier` and as they would be if site `i` was carried out as `products` say; what the site itself saves by
        them is taken off the latter. Zeros where they can't be shrunk or would be slower."""
        asks = self.machine is not None and _asks(products) and _own(products) is None
        found = [j for j, r in self.of(i).items() if not isinstance(r, str)] if asks else []
        before = after = 0.0
        for j in found:
            gathering = self._by_inductor([j], earlier)
            narrow = self._narrow(j, (earlier if gathering is None else gathering)[j], self.sites[i].name, products[0].how)
            now, less = _total(earlier[j].products), _total(narrow.products)
            if _own(narrow.products) is None and estimates.pays(now, less, estimates.SKIP_MARGIN):
                before, after = before + now, after + less
        return (before, after + _total(self._fed(i, products)) - _total(products)) if before else (0.0, 0.0)

    def shrink(self, plan: Plan) -> Plan:
        """The plan with producers that make only what their consumer keeps, where that saves time; consumers whose producers can't be say why. Kernels of ours
        read whole operands: where they may, the sites they would run are Inductor's for it, if that takes less time for all of them together."""
        sites: Sequence[SitePlan] = plan.sites
        taken = set[fx.Node]()
        for i in range(len(sites)):
            if self.machine is None or not _asks(sites[i].products):
                continue
            ways = [self._shrunk(i, sites, taken)]
            others = self._by_inductor([i, *(j for j, r in self.of(i).items() if not isinstance(r, str))], sites)
            if others is not None and (more := self._shrunk(i, others, taken))[0][i].shrinks:
                ways += [more] * estimates.pays(_of_all(ways[0][0]), _of_all(more[0]), estimates.SKIP_MARGIN)
            sites, mine = ways[-1]
            taken |= mine
        return replace(plan, sites=tuple(sites))

    def _shrunk(self, i: int, sites: Sequence[SitePlan], taken: set[fx.Node]) -> tuple[Sequence[SitePlan], set[fx.Node]]:
        """The sites once those that had better do so make what site `i` keeps, and all that is narrowed for it; `taken` is so for others."""
        new, names, said, mine = list(sites), list[str](), list[str](), dict[fx.Node, int]()
        for j, found in self.of(i).items():
            narrow, fed = self._narrow(j, new[j], new[i].name, new[i].products[0].how), self._fed(i, new[i].products)
            if isinstance(found, str):
                why = found
            elif (kernel := _by_a_kernel(new[i], new[j])) is not None:
                why = kernel
            elif taken & found.keys() or any(mine.get(n, d) != d for n, d in found.items()):
                why = "part of what is behind it is narrowed in another way"
            elif not estimates.pays(_total((*new[j].products, *new[i].products)), _total((*narrow.products, *fed)), estimates.SKIP_MARGIN):
                why = "fewer would take no less time"
            else:
                new[j], mine = narrow, mine | found
                new[i] = replace(new[i], products=fed)
                names.append(self.sites[j].name)
                continue
            said.append(f"all channels of {self.sites[j].name} are made: {why}")
        if names:
            new[i] = replace(new[i], shrinks=tuple(names))
            said.insert(0, f"{' and '.join(names)} make{'s' if len(names) == 1 else ''} these channels only")
        new[i] = replace(new[i], reason="; ".join([new[i].reason, *said]))
        return new, set(mine)

    def _by_inductor(self, members: Sequence[int], sites: Sequence[SitePlan]) -> list[SitePlan] | None:
        """The sites with these, and those that share a choice with one of them, run by Inductor; None where none would change or one must not."""
        leaders = {sites[i].products[0].shares or sites[i].name for i in members}
        mine = [i for i, s in enumerate(sites) if (s.products[0].shares or s.name) in leaders and any(p.lowering in CUSTOM_KERNELS for p in s.products)]
        if not mine or any("inductor" not in sites[i].lowerings for i in mine):
            return None
        new = list(sites)
        for i in mine:
            products = tuple(self._gathering(self.sites[i], p, d) for p, d in zip(self.sites[i].products, sites[i].products, strict=True))
            new[i] = replace(sites[i], products=products, reason=f"{sites[i].reason}; but by inductor")
        return new

    def _gathering(self, site: Site, product: Product, plan: ProductPlan) -> ProductPlan:
        if plan.lowering not in CUSTOM_KERNELS or plan.how is None:
            return plan
        estimate = estimates.coupled if plan.decision == "coupled" else estimates.sampled
        new = estimate(site, product, plan.how, self.machine, shares=plan.shares is not None)
        return replace(
            plan,
            reason=f"{plan.reason}; but by inductor",
            lowering="inductor",
            flops_sampled=new.flops,
            time_sampled_us=new.time_us,
            terms=new.terms,
            sizes=new.sizes,
        )

    def _fed(self, i: int, products: Sequence[ProductPlan]) -> tuple[ProductPlan, ...]:
        """A consumer's products when its activation comes narrow, and the gradient of it may leave so."""
        return tuple(
            self._timed(self.sites[i], p, d, None, True) if p.name in ("output", "grad_input") and d.decision in ("sampled", "coupled") else d
            for p, d in zip(self.sites[i].products, products, strict=True)
        )

    def _narrow(self, j: int, plan: SitePlan, consumer: str, how: Estimator | None) -> SitePlan:
        """A producer's plan when it makes only what the consumer keeps. A gradient that is sampled on its own axis, or replaced, stays as it is."""
        site = self.sites[j]
        assert how is not None
        only = f"only the {how.kept} of {how.size} channels that {consumer} keeps"
        products = list(plan.products)
        for n, (p, d) in enumerate(zip(site.products, plan.products, strict=True)):
            if p.name == "output" or d.decision in ("exact", "coupled"):
                new = self._timed(site, p, d, how, bool(plan.shrinks) and p.name != "grad_weight")
                products[n] = replace(new, reason=f"{d.reason}; {only}", skips=consumer)
        return replace(plan, products=tuple(products)).noted(only)

    def _timed(self, site: Site, product: Product, plan: ProductPlan, only: Estimator | None, fed: bool) -> ProductPlan:
        new = estimates.shrunk(site, product, plan.how, only, fed, self.machine, plan.shares is not None)
        return replace(plan, flops_sampled=new.flops, time_sampled_us=new.time_us, terms=new.terms, sizes=new.sizes)


def _by_a_kernel(*plans: SitePlan) -> str | None:
    """Why sites stay whole of which one is run by kernels of ours, if one is."""
    for plan in plans:
        own = _own(plan.products)
        if own is not None and "inductor" not in plan.lowerings:
            return f"{own} steps over what was not chosen of whole operands (lowering 'inductor' takes narrow ones)"
        if own is not None:
            return f"{own} on whole operands is predicted to be no slower"
    return None


def _own(products: Sequence[ProductPlan]) -> str | None:
    return next((p.lowering for p in products if p.lowering in CUSTOM_KERNELS), None)


def _asks(products: Sequence[ProductPlan]) -> bool:
    """Whether a site's choice is known before its activation, and nothing of the site needs the channels that are not kept."""
    output = products[0]
    if output.decision != "sampled" or output.how is None or output.how.method != WEIGHTS_ONLY:
        return False
    return all(p.decision == "coupled" or (p.replacement is not None and p.replacement.method in ("zero", "random")) for p in products[1:])


def _total(products: Iterable[ProductPlan]) -> float:
    return math.fsum(p.time_sampled_us or 0.0 for p in products)


def _of_all(sites: Sequence[SitePlan]) -> float:
    return math.fsum(_total(s.products) for s in sites)
