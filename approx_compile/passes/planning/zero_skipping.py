"""Decide which gradient products skip channels that are known to be zero because a later site dropped them.

`zero_propagation` finds the zeros and `rewrite` carries out what is decided here. With the channels `idx` that are not zero: dX = dY[:, idx] W[idx, :], and
only the columns `idx` of dW = X^T dY are computed. Either gathers leave out the zeros, or, where the lowering allows it and that saves time, a custom kernel
steps over them.

A kernel steps over one axis. If the gradient is also coupled to its own output, the other axis is gathered: what the output kept, of X and W, or what is not
zero, of dY and W, whichever is predicted to be faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.planning import lowering, zero_propagation
from approx_compile.passes.planning.candidates import PlanInputs
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan
from approx_compile.passes.sites.site import Product, Site, one_contraction
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import BY_KERNEL, GRADIENTS_SKIP_ZEROS, KERNEL_REFUSED, SKIPS_ZEROS


def skip_zeros(plan: Plan, inputs: PlanInputs) -> Plan:
    """Let gradient products skip what a later site's dropped entries made zero, where that saves more time than its gathers take.

    Args:
        plan: The plan with every site decided.
        inputs: The sites and the cost model; without times nothing is skipped.
    """
    if not inputs.cost.predicts_time:
        return plan
    sites = inputs.sites
    readers = readers_of_gradients(sites)
    shared = _shared_results(sites, plan)
    new = list(plan.sites)
    for source, source_plan in zip(sites, plan.sites, strict=True):
        for p, d in zip(source.products, source_plan.products, strict=True):
            if d.decision != "coupled" or d.shares is not None or not one_contraction(source) or p.result is None:
                continue
            starts = dict([p.result, *(shared.get(source.name, ()) if p.name == "grad_input" else ())])
            for zero in zero_propagation.propagate_zeros(starts).items():
                for i, j in readers.get(zero, ()):
                    new[i] = _with_skip(sites[i], new[i], j, source.name, d, inputs.cost)
    return replace(plan, sites=tuple(new))


def readers_of_gradients(sites: Sequence[Site]) -> dict[tuple[fx.Node | None, int], list[tuple[int, int]]]:
    """Return, by output gradient and its channel dim, the numbers of the site and of the product that read it.

    Args:
        sites: The sites of the graph.
    """
    readers: dict[tuple[fx.Node | None, int], list[tuple[int, int]]] = defaultdict(list)
    for i, site in enumerate(sites):
        for j, p in enumerate(site.products):
            if p.output_grad is not None and one_contraction(site):
                readers[p.output_grad, p.output_grad_dim].append((i, j))
    return readers


def _shared_results(sites: Sequence[Site], plan: Plan) -> dict[str, list[tuple[fx.Node, int]]]:
    """By site: the gradients of the same activation that are zero where its own is, because their sites share its indices."""
    shared: dict[str, list[tuple[fx.Node, int]]] = defaultdict(list)
    for site, site_plan in zip(sites, plan.sites, strict=True):
        leader = site_plan.products[0].shares
        for p, d in zip(site.products, site_plan.products, strict=True):
            if leader is not None and p.name == "grad_input" and d.decision == "coupled" and p.result is not None:
                shared[leader].append(p.result)
    return shared


def _with_skip(site: Site, plan: SitePlan, j: int, source: str, dropped: ProductPlan, cost: CostModel) -> SitePlan:
    """The site's plan with product `j` skipping what the site `source` dropped, if that pays."""
    product, current = site.products[j], plan.products[j]
    if current.decision in ("sampled", "replaced") or current.skips is not None or dropped.how is None:
        return plan
    ways, refusal = _ways(site, plan, current, dropped.how)
    skipping = [_skipping(site, product, plan, current, dropped.how, way, cost) for way in ways]
    if not skipping:
        return plan
    best = min(skipping, key=lambda p: p.time_sampled_us or 0.0)
    assert current.time_sampled_us is not None and best.time_sampled_us is not None
    if not margins.pays(current.time_sampled_us, best.time_sampled_us, margins.SKIP_MARGIN):
        return plan
    skips = SKIPS_ZEROS(source=source)
    if best.skips_by in CUSTOM_KERNELS:
        skips = BY_KERNEL(words=skips, kernel=best.skips_by)
    elif refusal is not None:
        skips = KERNEL_REFUSED(words=skips, why=refusal)
    products = list(plan.products)
    products[j] = replace(best, reason=join((current.reason, skips)), skips=source)
    note = GRADIENTS_SKIP_ZEROS()
    new = replace(plan, products=tuple(products))
    return new.with_note(note) if plan.decision == "exact" and note not in plan.notes else new


def _ways(site: Site, plan: SitePlan, current: ProductPlan, dropped: Estimator) -> tuple[list[tuple[str, str]], Reason | None]:
    """The pairs (lowering, skips_by) to choose from, and why a kernel that was asked for is not among them."""
    asked = [n for n in plan.lowerings if n in CUSTOM_KERNELS]
    refusals = {n: lowering.zero_skipping_refusal(site, dropped, n) for n in asked}
    fit = [n for n in asked if refusals[n] is None and (current.how is None or lowering.is_aligned(current.how.kept))]
    ways = [("inductor", n) for n in fit]
    if current.lowering in CUSTOM_KERNELS:
        return ([(current.lowering, "inductor")] if lowering.is_aligned(dropped.kept) else []) + ways, None
    if "inductor" in plan.lowerings or not fit:
        ways.insert(0, ("inductor", "inductor"))
    return ways, next(iter(refusals.values()), None) if "inductor" not in plan.lowerings else None


def _skipping(
    site: Site, product: Product, plan: SitePlan, current: ProductPlan, dropped: Estimator, way: tuple[str, str], cost: CostModel
) -> ProductPlan:  # fmt: skip
    by, skips_by = way
    alone = current.decision == "coupled" and plan.products[0].lowering in CUSTOM_KERNELS and by not in CUSTOM_KERNELS
    estimate = cost.skipping_zeros(site, product, current.how, dropped, by, skips_by, current.shares is not None, alone)
    return replace(current, lowering=by, skips_by=skips_by).with_estimate(estimate)
