"""Zeros that one site's choice makes in the gradients of others, put to use: decided here, found by `zeros`, carried out by `rewrite`.

Gathers leave them out, or a kernel of ours steps over them where the lowering allows it and time is saved: dX = dY[:, idx] W[idx, :] and the columns idx of
dW = X^T dY. A kernel steps over one axis. Of a gradient that is coupled to its own output as well the other axis is gathered: of X and W what the output kept,
or of dY and W what is not zero, whichever is predicted to be faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.machine import Machine
from approx_compile.passes.cost import estimates
from approx_compile.passes.planning import lowering as lowerings
from approx_compile.passes.planning import zero_propagation
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan
from approx_compile.passes.sites.site import Product, Site, one_contraction


def skip_zeros(sites: Sequence[Site], plan: Plan, machine: Machine) -> Plan:
    """The plan with gradient products that leave out what a later site's dropped entries made zero, where that saves more time than its gathers take."""
    users: dict[tuple[fx.Node | None, int], list[tuple[int, int]]] = defaultdict(list)
    for i, site in enumerate(sites):
        for j, p in enumerate(site.products):
            if p.output_grad is not None and one_contraction(site):
                users[p.output_grad, p.output_grad_dim].append((i, j))
    shared: dict[str, list[tuple[fx.Node, int]]] = defaultdict(list)  # gradients that are zero where another site's is, of the same activation
    for site, s in zip(sites, plan.sites, strict=True):
        for p, d in zip(site.products, s.products, strict=True):
            leader = s.products[0].shares
            if leader is not None and p.name == "grad_input" and d.decision == "coupled" and p.result is not None:
                shared[leader].append(p.result)
    new = list(plan.sites)
    for source, planned in zip(sites, plan.sites, strict=True):
        for p, d in zip(source.products, planned.products, strict=True):
            if d.decision != "coupled" or d.shares is not None or not one_contraction(source) or p.result is None:
                continue
            together = dict([p.result, *(shared.get(source.name, ()) if p.name == "grad_input" else ())])
            for zero in zero_propagation.propagate_zeros(together).items():
                for i, j in users.get(zero, ()):
                    new[i] = _with_skip(sites[i], new[i], j, source.name, d, machine)
    return replace(plan, sites=tuple(new))


def _with_skip(site: Site, plan: SitePlan, j: int, source: str, dropped: ProductPlan, machine: Machine) -> SitePlan:
    product, decision = site.products[j], plan.products[j]
    if decision.decision in ("sampled", "replaced") or decision.skips is not None or dropped.how is None:
        return plan
    ways, why = _ways(site, plan, decision, dropped.how)
    tried = [_tried(site, product, plan, decision, dropped.how, way, machine) for way in ways]
    if not tried:
        return plan
    best = min(tried, key=lambda p: p.time_sampled_us or 0.0)
    assert decision.time_sampled_us is not None and best.time_sampled_us is not None
    if not estimates.pays(decision.time_sampled_us, best.time_sampled_us, estimates.SKIP_MARGIN):
        return plan
    by = f" by {best.skips_by}" if best.skips_by in CUSTOM_KERNELS else f" by inductor: {why}" if why is not None else ""
    products = list(plan.products)
    products[j] = replace(best, reason=f"{decision.reason}; skips what {source} dropped{by}", skips=source)
    note = "its gradients skip what later sites dropped"
    new = replace(plan, products=tuple(products))
    return new.noted(note) if plan.decision == "exact" and note not in plan.notes else new


def _ways(site: Site, plan: SitePlan, decision: ProductPlan, dropped: Estimator) -> tuple[list[tuple[str, str]], str | None]:
    """(lowering, skips_by) to choose from, and why a kernel that was asked for is not among them."""
    asked = [n for n in plan.lowerings if n in CUSTOM_KERNELS]
    refused = {n: lowerings.no_zeros_kernel(site, dropped, n) for n in asked}
    fit = [n for n in asked if refused[n] is None and (decision.how is None or lowerings.lines(decision.how.kept))]
    ways = [("inductor", n) for n in fit]
    if decision.lowering in CUSTOM_KERNELS:
        return ([(decision.lowering, "inductor")] if lowerings.lines(dropped.kept) else []) + ways, None
    if "inductor" in plan.lowerings or not fit:
        ways.insert(0, ("inductor", "inductor"))
    return ways, next(iter(refused.values()), None) if "inductor" not in plan.lowerings else None


def _tried(site: Site, product: Product, plan: SitePlan, decision: ProductPlan, dropped: Estimator, way: tuple[str, str], machine: Machine) -> ProductPlan:
    lowering, skips_by = way
    alone = decision.decision == "coupled" and plan.products[0].lowering in CUSTOM_KERNELS and lowering not in CUSTOM_KERNELS
    new = estimates.skipped(site, product, decision.how, dropped, machine, lowering, skips_by, decision.shares is not None, alone)
    return replace(decision, lowering=lowering, skips_by=skips_by, flops_sampled=new.flops, time_sampled_us=new.time_us, terms=new.terms, sizes=new.sizes)
