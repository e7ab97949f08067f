"""Zeros that one site's choice makes in the gradients of others, put to use: decided here, found by `zeros`, carried out by `rewrite`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from approx_compile.kernels.available import OWN
from approx_compile.machine import Machine
from approx_compile.passes import cost, zeros
from approx_compile.passes.planned import Plan, ProductPlan, SitePlan
from approx_compile.passes.sites import Site, one_contraction


def skip_zeros(sites: Sequence[Site], plan: Plan, machine: Machine) -> Plan:
    """The plan with gradient products that leave out what a later site's dropped entries made zero, where that saves more time than its gathers take."""
    users: dict[tuple[fx.Node | None, int], list[tuple[int, int]]] = defaultdict(list)
    for i, site in enumerate(sites):
        for j, p in enumerate(site.products):
            if p.output_grad is not None and one_contraction(site):
                users[p.output_grad, p.output_grad_dim].append((i, j))
    shared: dict[str, list[tuple[fx.Node, int]]] = defaultdict(list)  # gradients that are summed up with another's, and zero where that is
    for site, s in zip(sites, plan.sites, strict=True):
        for p, d in zip(site.products, s.products, strict=True):
            if d.shares is not None and p.result is not None:
                shared[d.shares].append(p.result)
    new = list(plan.sites)
    for source, planned in zip(sites, plan.sites, strict=True):
        for p, d in zip(source.products, planned.products, strict=True):
            if d.decision != "coupled" or d.shares is not None or not one_contraction(source) or p.result is None:
                continue
            together = dict([p.result, *(shared.get(source.name, ()) if p.name == "grad_input" else ())])
            for zero in zeros.follow(together).items():
                for i, j in users.get(zero, ()):
                    new[i] = _with_skip(sites[i], new[i], j, source.name, d, machine)
    return replace(plan, sites=tuple(new))


def _with_skip(site: Site, plan: SitePlan, j: int, source: str, dropped: ProductPlan, machine: Machine) -> SitePlan:
    product, decision = site.products[j], plan.products[j]
    if decision.decision in ("sampled", "replaced") or decision.skips is not None or dropped.how is None or decision.lowering in OWN:
        return plan
    estimate = cost.skipped(site, product, decision.how, dropped.how, machine, decision.shares is not None)
    assert decision.time_sampled_us is not None and estimate.time_us is not None
    if not cost.pays(decision.time_sampled_us, estimate.time_us, cost.SKIP_MARGIN):
        return plan
    reason = f"{decision.reason}; skips what {source} dropped"
    products = list(plan.products)
    products[j] = replace(
        decision, reason=reason, flops_sampled=estimate.flops, time_sampled_us=estimate.time_us, terms=estimate.terms, sizes=estimate.sizes, skips=source
    )
    note = "its gradients skip what later sites dropped"
    new = replace(plan, products=tuple(products))
    return new.noted(note) if plan.decision == "exact" and note not in plan.notes else new
