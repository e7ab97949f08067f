"""Enumerate the ways in which a site may be sampled, or say why it stays exact: lowerings and groups that the settings leave open are tried one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from approx_compile.config.resolve import ProductSettings, SiteSettings
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.planning import lowering
from approx_compile.passes.planning.plan import Candidates, SitePlan
from approx_compile.passes.planning.product_plans import exact_site, long_run, plan_products
from approx_compile.passes.sites import dataflow
from approx_compile.passes.sites.site import Site
from approx_compile.reasons import Reason
from approx_compile.reasons.products import AFTER_BATCH_NORM, FEW_CHANNELS, KIND_BY_DEFAULT, LAST_LAYER, RAW_DATA

TIMED_POLICIES = ("cost", "measure")
"""The policies under which a site is sampled only if that saves time."""

KEPT_MULTIPLE = 16
"""Under these policies the number of entries kept is a multiple of this, which suits vector units and product kernels."""

LEAST_CHANNELS = 512
"""Contraction channels that a linear site needs to be sampled by default. Narrow layers lose accuracy for little time."""


@dataclass(frozen=True)
class PlanInputs:
    """What the planning steps read besides the plan.

    Attributes:
        sites: The sites of the graph, in execution order.
        settings: What is asked of each site.
        candidates: Of each site the ways to sample it, or its plan if there are none and it stays exact.
        cost: The cost model.
    """

    sites: Sequence[Site]
    settings: Sequence[SiteSettings]
    candidates: Sequence[SitePlan | Candidates]
    cost: CostModel


def enumerate_candidates(site: Site, settings: SiteSettings, cost: CostModel) -> SitePlan | Candidates:
    """Return the ways to sample a site, among which time decides.

    Args:
        site: The site.
        settings: What is asked of it.
        cost: The cost model.

    Returns:
        The candidates, or the plan of the site if it stays exact: because it cannot be sampled, should not be by default, or is exact by the settings.
    """
    reason = site.blocked
    if reason is None and settings.policy in TIMED_POLICIES and (settings.rows is None or settings.output.method != "exact"):
        reason = default_exclusion_reason(site, settings)
    if reason is not None:
        return exact_site(site, reason, cost)
    candidates = [plan_products(site, s, cost) for s in _variants(site, settings, cost)]
    if all(p.decision == "exact" for p in candidates[0]):
        return exact_site(site, candidates[0][0].reason, cost, candidates[0])
    return candidates


def default_exclusion_reason(site: Site, settings: SiteSettings) -> Reason | None:
    """Return why the default policy leaves a site exact, or None if it does not.

    Sites that are known to lose accuracy are always left exact, others unless a rule matches them.
    """
    if dataflow.RAW_DATA in site.hazards:
        return RAW_DATA()
    if site.last:
        return LAST_LAYER()
    if settings.named:
        return None
    if site.kind != "linear":
        return KIND_BY_DEFAULT(kind=site.kind)
    if dataflow.BATCH_NORM in site.hazards:
        return AFTER_BATCH_NORM()
    size = site.products[0].size
    if isinstance(size, int) and size < LEAST_CHANNELS:
        return FEW_CHANNELS(size=size, least=LEAST_CHANNELS)
    return None


def known_lowerings(site: Site, wanted: str, cost: CostModel) -> tuple[str, ...]:
    """Return the lowerings that may run a site's products.

    Args:
        site: The site.
        wanted: The lowering that is asked for. "auto" stands for all that fit the site; custom kernels only where the machine's profile has their rates.
        cost: The cost model.
    """
    return tuple(n for n in lowering.offered_lowerings(site, wanted) if wanted != "auto" or cost.has_rates(site, n))


def _variants(site: Site, settings: SiteSettings, cost: CostModel) -> list[SiteSettings]:
    """The settings with "auto" replaced in every possible way: lowerings that the machine's profile knows, groups that suit them."""
    variants = []
    for name in known_lowerings(site, settings.output.lowering, cost):
        if settings.output.lowering == "auto" and name in CUSTOM_KERNELS and lowering.has_guessed_rates(site, settings.output.group):
            continue
        for group in _groups(site, settings, name):
            by_product = {product: _variant(product, wanted, settings.policy, name, group) for product, wanted in _by_product(settings).items()}
            changes: dict[str, Any] = by_product
            variants.append(replace(settings, **changes))
    return variants


def _by_product(settings: SiteSettings) -> dict[str, ProductSettings]:
    return {"output": settings.output, "grad_input": settings.grad_input, "grad_weight": settings.grad_weight}


def _groups(site: Site, settings: SiteSettings, lowering_name: str) -> tuple[int | None, ...]:
    """The groups to try for `group: "auto"`: those that a custom kernel skips; else single entries and long runs, where time decides. None: `auto_group`."""
    if all(wanted.group != "auto" for wanted in _by_product(settings).values()):
        return (None,)
    units = lowering.kernel_groups(site, lowering_name)
    return units or ((1, long_run(site)) if settings.policy in TIMED_POLICIES else (None,))


def _variant(name: str, wanted: ProductSettings, policy: str, lowering_name: str, group: int | None) -> ProductSettings:
    whole = KEPT_MULTIPLE if policy in TIMED_POLICIES and group is not None else wanted.whole
    if group is None or wanted.group != "auto":
        return replace(wanted, whole=whole, lowering=lowering_name)
    by_rows = name == "grad_weight" and lowering_name in CUSTOM_KERNELS
    return replace(wanted, group=1 if by_rows else group, whole=whole, lowering=lowering_name)
