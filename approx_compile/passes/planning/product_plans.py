"""Plan the products of one site as its settings ask for, with an estimate of each: the estimator, the groups and the lowering, or why a product stays exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from approx_compile import _torch
from approx_compile.config.resolve import ProductSettings, SiteSettings
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator, make_estimator
from approx_compile.passes.cost.estimates import CostModel, Estimate
from approx_compile.passes.cost.site_sizes import kind_of
from approx_compile.passes.planning import lowering
from approx_compile.passes.planning.plan import ProductPlan, SitePlan
from approx_compile.passes.sites.site import Product, Site
from approx_compile.reasons import Reason
from approx_compile.reasons.decisions import BY_KERNEL, COUPLED, KERNEL_REFUSED, SAMPLED
from approx_compile.reasons.products import BY_SETTINGS, COUPLED_TO_EXACT, DYNAMIC_AXIS, DYNAMIC_IMAGE, KEEPS_ALL, NO_WEIGHT, SHORT_AXIS


def plan_products(site: Site, settings: SiteSettings, cost: CostModel) -> tuple[ProductPlan, ...]:
    """Plan every product of a site by its settings; what cannot be sampled is exact. Gradients that will be replaced are exact here.

    Args:
        site: The site.
        settings: What is asked of it.
        cost: The cost model.

    Returns:
        A plan for each of the site's products, the output first.
    """
    output = _sampled_product(site, site.products[0], settings.output, cost)
    return (output, *(_gradient(site, p, settings, output, cost) for p in site.products[1:]))


def _gradient(site: Site, product: Product, settings: SiteSettings, output: ProductPlan, cost: CostModel) -> ProductPlan:
    wanted = settings.of(product.name)
    if wanted.replaces:
        return _exact_product(site, product, BY_SETTINGS(), cost)
    if wanted.method != "coupled":
        return _sampled_product(site, product, wanted, cost)
    if output.how is None:
        return _exact_product(site, product, COUPLED_TO_EXACT(), cost)
    plan = replace(
        output,
        name=product.name,
        decision="coupled",
        reason=COUPLED(),
        node=product.node.name,
        bytes_exact=product.bytes_once,
    )
    return _with_times(site, product, plan, cost)


def _sampled_product(site: Site, product: Product, wanted: ProductSettings, cost: CostModel) -> ProductPlan:
    """The plan of a product that is sampled along its own contraction axis, or exact where it cannot be."""
    if wanted.method == "exact":
        return _exact_product(site, product, BY_SETTINGS(), cost)
    size = product.size
    if not isinstance(size, int):
        return _exact_product(site, product, DYNAMIC_AXIS(), cost)
    if wanted.method == "topk_weights" and product.weight is None:
        return _exact_product(site, product, NO_WEIGHT(), cost)
    group = auto_group(site, product) if wanted.group == "auto" else wanted.group
    ratio = wanted.ratio if size < 4 * wanted.whole else math.ceil(math.floor(wanted.ratio * size + 0.5) / wanted.whole) * wanted.whole / size
    estimator = make_estimator(wanted.method, size, ratio, wanted.min_k, group, product.weight)
    if estimator is None:
        short = size <= wanted.min_k
        reason = SHORT_AXIS(size=size, least=wanted.min_k) if short else KEEPS_ALL(size=size, ratio=wanted.ratio, group=group)
        return _exact_product(site, product, reason, cost)
    if estimator.unit > 1 and kind_of(site) == "conv" and not all(isinstance(n, int) for n in _torch.value(product.operands[0]).shape[2:]):
        return _exact_product(site, product, DYNAMIC_IMAGE(), cost)
    words = SAMPLED(product=product.name, method=wanted.method, groups=f" in groups of {group}" if group > 1 else "")
    by, reason = _lowering(site, product, estimator, wanted.lowering, words)
    plan = _product_plan(site, product, "sampled", reason, wanted.method, wanted.ratio, estimator.kept, size)
    return _with_times(site, product, replace(plan, how=estimator, lowering=by), cost)


def _lowering(site: Site, product: Product, estimator: Estimator, wanted: str, words: Reason) -> tuple[str, Reason]:
    """The code that runs a sampled product, and the words for the product with those for its code."""
    if wanted not in CUSTOM_KERNELS:
        return "inductor", words
    refusal = lowering.kernel_refusal(site, product, estimator, wanted)
    return (wanted, BY_KERNEL(words=words, kernel=wanted)) if refusal is None else ("inductor", KERNEL_REFUSED(words=words, why=refusal))


def _exact_product(site: Site, product: Product, reason: Reason, cost: CostModel) -> ProductPlan:
    size = _torch.hint(product.size)
    return _with_times(site, product, _product_plan(site, product, "exact", reason, "exact", 1.0, size, size), cost)


def _product_plan(site: Site, product: Product, decision: str, reason: Reason, method: str, ratio: float, k: int, size: int) -> ProductPlan:
    flops = site.flops
    return ProductPlan(product.name, decision, reason, method, ratio, k, size, flops, flops, node=product.node.name, bytes_exact=product.bytes_once)


def _with_times(site: Site, product: Product, plan: ProductPlan, cost: CostModel) -> ProductPlan:
    exact = cost.exact(site, product)
    return replace(plan, time_exact_us=exact.time_us).with_estimate(planned_estimate(site, product, plan, cost))


def plan_kept_inputs(site: Site, estimator: Estimator, ratio: float, reason: Reason, cost: CostModel) -> tuple[ProductPlan, ...]:
    """Plan the products of a site of whose input only some entries are computed, which another site chooses.

    Args:
        site: The site.
        estimator: How the other site chooses them.
        ratio: The share that was asked for.
        reason: Why, in words for the user.
        cost: The cost model.

    Returns:
        A plan for each of the site's products: the output contracts these entries only, and the gradients are coupled to it.
    """
    sampled = replace(_product_plan(site, site.products[0], "sampled", reason, estimator.method, ratio, estimator.kept, estimator.size), how=estimator)
    plans = [_with_times(site, site.products[0], sampled, cost)]
    for p in site.products[1:]:
        coupled = replace(sampled, name=p.name, decision="coupled", reason=COUPLED(), node=p.node.name, bytes_exact=p.bytes_once)
        plans.append(_with_times(site, p, coupled, cost))
    return tuple(plans)


def planned_estimate(site: Site, product: Product, plan: ProductPlan, cost: CostModel, kept: float | None = None) -> Estimate:
    """Estimate a product as it is planned: exact, sampled or coupled, with the plan's lowering and sharing.

    Args:
        site: The site.
        product: The product.
        plan: Its plan.
        cost: The cost model.
        kept: Number of entries kept, in place of the plan's.
    """
    if plan.how is None:
        return cost.exact(site, product)
    estimate = cost.coupled if plan.decision == "coupled" else cost.sampled
    return estimate(site, product, plan.how, kept, plan.lowering, plan.shares is not None)


def exact_site(site: Site, reason: Reason, cost: CostModel, products: Sequence[ProductPlan] = ()) -> SitePlan:
    """Plan a site that stays exact.

    Args:
        site: The site.
        reason: Why it stays exact.
        cost: The cost model.
        products: Plans of its products that have reasons of their own; else they are exact for the same reason.
    """
    return site_plan(site, "exact", reason, tuple(products) or tuple(_exact_product(site, p, reason, cost) for p in site.products))


def site_plan(site: Site, decision: str, reason: Reason, products: tuple[ProductPlan, ...]) -> SitePlan:
    """Return the plan of a site from the plans of its products.

    Args:
        site: The site.
        decision: "exact" or "sampled".
        reason: Why.
        products: The plans of its products, the output first.
    """
    dtype = str(site.dtype).removeprefix("torch.")
    return SitePlan(site.name, site.module, site.kind, site.op, site.symbolic, dtype, decision, reason, products, site.reads, site.traced)


def auto_group(site: Site, product: Product) -> int:
    """Return how many contiguous entries are kept or dropped together where the settings leave it open.

    1 for axes below 256, where entries are contiguous anyway (rows; channels of a convolution); else `long_run`.
    """
    assert isinstance(product.size, int)
    if product.size < 256 or site.kind == "conv" or product.name == "grad_weight":
        return 1
    return long_run(site)


def long_run(site: Site) -> int:
    """Return how many contiguous entries a gather moves at full speed: whole vectors on a CPU, whole memory sectors on a GPU."""
    return 16 if device(site) == "cpu" else 32


def device(site: Site) -> str:
    """Return the type of the device that a site runs on."""
    return str(_torch.value(site.node).device.type)
