"""Sites + rules + estimates -> a frozen plan: for every product of every site what is done, with the reason a user reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from approx_compile import _torch
from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import ProductSettings, SiteSettings
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator, make_estimator
from approx_compile.machine import Machine
from approx_compile.passes.cost import estimates
from approx_compile.passes.planning import candidates, gradient_replacement, index_sharing
from approx_compile.passes.planning import lowering as lowerings
from approx_compile.passes.planning import plan as planned
from approx_compile.passes.planning.plan import BY_SETTINGS, Candidates, Plan, ProductPlan, SitePlan
from approx_compile.passes.planning.plan_validation import check_shapes
from approx_compile.passes.planning.rule_matching import match_rules
from approx_compile.passes.sites.site import Product, Site

RAW, LAST = "fed with raw data", "the last layer"
"""Reasons for which a site is better left exact, whatever it would save."""

WIDE = 512
"""Contraction channels that a linear site needs before the one line's default samples it (narrow layers lose accuracy for little time)."""


TimeSites = Callable[[Sequence[tuple[Site, Candidates]]], Sequence[Sequence[float]]]
"""Measured times of sites, us: exact, then each of the tries."""

NeighborCost = Callable[[int, Sequence[ProductPlan], Sequence[SitePlan]], tuple[float, float]]
"""Of a site's number, its products as planned, and the sites before it: predicted us of what else changes with them in those, before and after."""


def make_plan(
    sites: Sequence[Site], config: ApproxConfig, machine: Machine | None = None, ask: TimeSites | None = None, others: NeighborCost | None = None
) -> Plan:
    """The decisions by the settings and, where they ask for it, by what the machine is predicted to take, or was measured to (`ask`), with what a site changes
    in `others`."""
    matches, unmatched = match_rules(sites, config)
    remarks = check_shapes(config.plan, sites) if config.plan is not None else ()
    settings = [config.settings(m) for m in matches]
    tried = [enumerate_candidates(s, w, machine) for s, w in zip(sites, settings, strict=True)]
    asked = [i for i, t in enumerate(tried) if settings[i].policy == "measure" and not isinstance(t, SitePlan)]
    times: dict[int, Sequence[float]] = {}
    if asked and ask is not None:
        times = dict(zip(asked, ask([(sites[i], t) for i in asked if not isinstance(t := tried[i], SitePlan)]), strict=True))

    judged: list[SitePlan] = []

    def beside(products: Sequence[ProductPlan]) -> tuple[float, float]:
        return others(len(judged), products, judged) if others is not None else (0.0, 0.0)

    for i, t in enumerate(tried):
        plan = t if isinstance(t, SitePlan) else select_best(sites[i], settings[i], t, machine, times.get(i), beside)
        judged.append(replace(plan, lowerings=candidates.known_lowerings(sites[i], settings[i].output.lowering, machine)))
    judged = index_sharing.share(sites, settings, tried, judged, machine)
    decided = [_with_replacements(s, p, w) for s, p, w in zip(sites, judged, settings, strict=True)]
    return Plan(tuple(_with_nodes(s, p) for s, p in zip(sites, decided, strict=True)), unmatched, remarks=tuple(remarks))


def _with_nodes(site: Site, plan: SitePlan) -> SitePlan:
    products = (replace(p, node=q.node.name, bytes_exact=q.bytes_once) for p, q in zip(plan.products, site.products, strict=True))
    return replace(plan, products=tuple(products))


def enumerate_candidates(site: Site, settings: SiteSettings, machine: Machine | None) -> SitePlan | Candidates:
    """Legal first, then wanted: the site left exact, or the ways to sample it among which time decides."""
    reason = site.blocked
    if reason is None and settings.policy in candidates.TIMED and (settings.rows is None or settings.output.method != "exact"):
        reason = default_exclusion_reason(site, settings)
    if reason is not None:
        return _all_exact(site, reason, machine)
    tries = [_products(site, s, machine) for s in candidates.candidates(site, settings, machine)]
    if all(p.decision == "exact" for p in tries[0]):
        return _all_exact(site, tries[0][0].reason, machine, tries[0])
    return tries


def select_best(
    site: Site,
    settings: SiteSettings,
    tries: Candidates,
    machine: Machine | None,
    times: Sequence[float] | None,
    beside: Callable[[Sequence[ProductPlan]], tuple[float, float]],
) -> SitePlan:
    """The best of the tries, if it is worth it: alone, or with what it changes `beside` it."""
    best = _fastest(tries, beside) if times is None else tries[min(range(len(tries)), key=lambda i: times[i + 1])]
    done = next(p for p in best if p.decision != "exact")
    found = _site_plan(site, "sampled", done.reason, best)
    if settings.policy not in candidates.TIMED:
        return found
    if machine is None:
        return _all_exact(site, f"no cost model for {candidates.device(site)}", machine)
    at: planned.BreakEven | None = None
    if times is not None:
        exact, sampled, why = times[0], min(times[1:]), f"measured {times[0] / min(times[1:]):.2f}x at ratio {done.ratio:g}"
    else:
        assert found.time_exact_us is not None and found.time_sampled_us is not None
        exact, sampled = found.time_exact_us, found.time_sampled_us
        why, at = candidates.predicted([(site, best)], machine)

    def pays(more_before: float, more_after: float) -> bool:
        if times is not None:
            return estimates.pays(exact + more_before, sampled + more_after, estimates.MEASURED_MARGIN)
        assert machine is not None
        return estimates.worth(site.kind, exact + more_before, sampled + more_after, machine)

    before, after = beside(best)
    if before > after:
        why = f"{why}, {(exact + before) / (sampled + after):.2f}x with the sites before it"
    decided = replace(found, reason=f"{done.reason}; {why}") if pays(0.0, 0.0) or pays(before, after) else _all_exact(site, f"would not pay: {why}", machine)
    return replace(decided, break_even=at)


def _fastest(tries: Candidates, beside: Callable[[Sequence[ProductPlan]], tuple[float, float]]) -> tuple[ProductPlan, ...]:
    """Of ways to sample a site the one that is best for it and for what else changes with it."""
    changed = [beside(t) for t in tries]
    most = max(before for before, _ in changed)
    ranks = [candidates.rank(t, most - before + after) for t, (before, after) in zip(tries, changed, strict=True)]
    return tries[ranks.index(min(ranks))]


def _products(site: Site, settings: SiteSettings, machine: Machine | None) -> tuple[ProductPlan, ...]:
    output = _own_axis(site, site.products[0], settings.output, machine)
    return (output, *(_gradient(site, p, settings, output, machine) for p in site.products[1:]))


def default_exclusion_reason(site: Site, settings: SiteSettings) -> str | None:
    """Where sampling is known to hurt, and, unless a rule names the site, all but what the default is sure of."""
    if "raw data" in site.hazards:
        return RAW
    if site.last:
        return LAST
    if settings.named:
        return None
    if site.kind != "linear":
        return f"{site.kind}s are exact by default; a rule whose layers match it samples it"
    if "BatchNorm" in site.hazards:
        return "fed by BatchNorm: exact by default; a rule whose layers match it samples it"
    size = site.products[0].size
    if isinstance(size, int) and size < WIDE:
        return f"{size} contraction channels, fewer than the {WIDE} of the default; a rule whose layers match it samples it"
    return None


def _gradient(site: Site, product: Product, settings: SiteSettings, output: ProductPlan, machine: Machine | None) -> ProductPlan:
    wanted = settings.of(product.name)
    if wanted.replaces:
        return _exact(site, product, BY_SETTINGS, machine)
    if wanted.method != "coupled":
        return _own_axis(site, product, wanted, machine)
    if output.how is None:
        return _exact(site, product, "the output it is coupled to is exact", machine)
    plan = replace(output, name=product.name, decision="coupled", reason="through the entries the output kept")
    return _timed(site, plan, product, estimates.coupled(site, product, output.how, machine, lowering=output.lowering), machine)


def _own_axis(site: Site, product: Product, wanted: ProductSettings, machine: Machine | None) -> ProductPlan:
    if wanted.method == "exact":
        return _exact(site, product, BY_SETTINGS, machine)
    size = product.size
    if not isinstance(size, int):
        return _exact(site, product, "its contraction axis has a dynamic size", machine)
    if wanted.method == "topk_weights" and product.weight is None:
        return _exact(site, product, "topk_weights needs a weight, and neither operand is one", machine)
    group = candidates.auto_group(site, product) if wanted.group == "auto" else wanted.group
    ratio = wanted.ratio if size < 4 * wanted.whole else math.ceil(math.floor(wanted.ratio * size + 0.5) / wanted.whole) * wanted.whole / size
    how = make_estimator(wanted.method, size, ratio, wanted.min_k, group, product.weight)
    if how is None:
        short = size <= wanted.min_k
        reason = f"axis of {size}, min_k is {wanted.min_k}" if short else f"keeps all {size} at ratio {wanted.ratio:g}, group {group}"
        return _exact(site, product, reason, machine)
    if how.unit > 1 and estimates.kind_of(site) == "conv" and not all(isinstance(n, int) for n in _torch.value(product.operands[0]).shape[2:]):
        return _exact(site, product, "an image of dynamic size, of which Inductor gathers single channels only: group 1 samples it", machine)
    lowering, by = _lowered(site, product, how, wanted.lowering)
    reason = f"{product.name}: {wanted.method}" + (f" in groups of {group}" if group > 1 else "") + by
    plan = ProductPlan(product.name, "sampled", reason, wanted.method, wanted.ratio, how.kept, size, site.flops, site.flops, how, lowering=lowering)
    return _timed(site, plan, product, estimates.sampled(site, product, how, machine, lowering=lowering), machine)


def _lowered(site: Site, product: Product, how: Estimator, wanted: str) -> tuple[str, str]:
    """The code that runs a sampled product, and the words for it."""
    if wanted not in CUSTOM_KERNELS:
        return "inductor", ""
    why = lowerings.refused(site, product, how, wanted)
    return (wanted, f" by {wanted}") if why is None else ("inductor", f" by inductor: {why}")


def _timed(site: Site, plan: ProductPlan, product: Product, estimate: estimates.Estimate, machine: Machine | None) -> ProductPlan:
    exact = estimates.exact(site, product, machine)
    return replace(
        plan, flops_sampled=estimate.flops, time_exact_us=exact.time_us, time_sampled_us=estimate.time_us, terms=estimate.terms, sizes=estimate.sizes
    )


def _with_replacements(site: Site, plan: SitePlan, settings: SiteSettings) -> SitePlan:
    """The site's plan with the gradients that are not computed but replaced, wherever that is asked for; where one can't be it is exact, and the site
    says why."""
    if site.blocked is not None:
        return plan
    products, said = list(plan.products), []
    for i, (product, decision) in enumerate(zip(site.products, plan.products, strict=True)):
        wanted = settings.of(product.name)
        if not wanted.replaces:
            continue
        products[i] = _replaced(site, product, decision, wanted)
        said.append(f"{product.name}: {products[i].reason}")
    if not said:
        return plan
    rest = [] if plan.reason == BY_SETTINGS else [plan.reason] if plan.decision == "sampled" else [f"the rest exact: {plan.reason}"]
    replaced = any(p.decision == "replaced" for p in products)
    return replace(plan, products=tuple(products), decision="sampled" if replaced else plan.decision, reason="; ".join(said + rest))


def _replaced(site: Site, product: Product, exact: ProductPlan, wanted: ProductSettings) -> ProductPlan:
    replacement, kept, size, reason = gradient_replacement.choose_replacement(site, product, wanted)
    if replacement is None:
        return replace(exact, reason=reason)
    flops = estimates.replaced(site, product, replacement)
    return replace(
        exact,
        decision="replaced",
        reason=reason,
        method=replacement.method,
        ratio=kept / size,
        k=kept,
        size=size,
        flops_sampled=flops,
        replacement=replacement,
        time_sampled_us=None,
    )


def _exact(site: Site, product: Product, reason: str, machine: Machine | None) -> ProductPlan:
    size = _torch.hint(product.size)
    plan = ProductPlan(product.name, "exact", reason, "exact", 1.0, size, size, site.flops, site.flops)
    return _timed(site, plan, product, estimates.exact(site, product, machine), machine)


def _all_exact(site: Site, reason: str, machine: Machine | None, products: Sequence[ProductPlan] = ()) -> SitePlan:
    return _site_plan(site, "exact", reason, tuple(products) or tuple(_exact(site, p, reason, machine) for p in site.products))


def _site_plan(site: Site, decision: str, reason: str, products: tuple[ProductPlan, ...]) -> SitePlan:
    dtype = str(site.dtype).removeprefix("torch.")
    return SitePlan(site.name, site.module, site.kind, site.op, site.symbolic, dtype, decision, reason, products, site.reads, site.traced)


def needs_random_numbers(plan: Plan) -> bool:
    """Whether a forward product draws random numbers (which a recomputation would have to draw again)."""
    return any(p.decision == "sampled" and p.how is not None and p.how.scaled for s in plan.sites for p in s.products[:1])
