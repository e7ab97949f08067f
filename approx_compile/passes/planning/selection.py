"""Select the best candidate of a site: rank candidates by time, decide whether the best one is worth it, and compute the ratio at which it breaks even."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from approx_compile.config.resolve import SiteSettings
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.planning.candidates import TIMED_POLICIES
from approx_compile.passes.planning.plan import BreakEven, Candidates, ProductPlan, SitePlan, total
from approx_compile.passes.planning.product_plans import device, exact_site, planned_estimate, site_plan
from approx_compile.passes.sites.site import Site
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import MEASURED, PREDICTED, WITH_PRODUCERS
from approx_compile.reasons.products import NO_COST_MODEL, WOULD_NOT_PAY

PREDICTION_ERROR = 1.2
"""Factor by which predictions are taken to be off where the range of a break-even ratio is shown (`benchmarks.cost_model.predict` measures it)."""

RATIO_PRECISION = 0.001
"""The smallest break-even ratio that is looked for, and the precision of the search."""

TIE_FACTOR = 1.03
"""Times that differ by no more than this factor count as equal."""

TimeDelta = Callable[[Sequence[ProductPlan]], tuple[float, float]]
"""Of a site's products as planned: the predicted time in us of what changes with them at other sites, before and after."""


def select_best(
    site: Site, settings: SiteSettings, candidates: Candidates, cost: CostModel, times: Sequence[float] | None, others: TimeDelta
) -> SitePlan:  # fmt: skip
    """Return the plan with the best candidate of a site, or the exact plan if that is not worth it.

    A candidate is worth it by itself, or together with what it changes at other sites.

    Args:
        site: The site.
        settings: What is asked of it.
        candidates: The ways to sample it; of equally fast ones the first is taken.
        cost: The cost model.
        times: Measured times in us, of the exact products and of each candidate; None if predictions decide.
        others: What candidates change at other sites.
    """
    best = _fastest(candidates, others) if times is None else candidates[min(range(len(candidates)), key=lambda i: times[i + 1])]
    first = next(p for p in best if p.decision != "exact")
    plan = site_plan(site, "sampled", first.reason, best)
    if settings.policy not in TIMED_POLICIES:
        return plan
    if not cost.predicts_time:
        return exact_site(site, NO_COST_MODEL(device=device(site)), cost)
    break_even: BreakEven | None = None
    if times is not None:
        exact, sampled, words = times[0], min(times[1:]), MEASURED(speedup=times[0] / min(times[1:]), ratio=first.ratio)
    else:
        assert plan.time_exact_us is not None and plan.time_sampled_us is not None
        exact, sampled = plan.time_exact_us, plan.time_sampled_us
        words, break_even = prediction([(site, best)], cost)

    threshold = cost.threshold(site.kind) if times is None else margins.Threshold(margins.MEASURED_MARGIN)
    before, after = others(best)
    if before > after:
        words = WITH_PRODUCERS(words=words, speedup=(exact + before) / (sampled + after))
    if threshold.is_exceeded(exact, sampled) or threshold.is_exceeded(exact + before, sampled + after):
        decided = replace(plan, reason=join((first.reason, words)))
    else:
        more = (before, after) if before > after else (0.0, 0.0)
        decided = exact_site(site, WOULD_NOT_PAY(words=words, missed=threshold.missed(exact + more[0], sampled + more[1])), cost)
    return replace(decided, break_even=break_even)


def _fastest(candidates: Candidates, others: TimeDelta) -> tuple[ProductPlan, ...]:
    """The candidate with the least predicted time, at the site and at others together."""
    deltas = [others(c) for c in candidates]
    most = max(before for before, _ in deltas)
    ranks = [rank(c, most - before + after) for c, (before, after) in zip(candidates, deltas, strict=True)]
    return candidates[ranks.index(min(ranks))]


def rank(products: Sequence[ProductPlan], more_us: float = 0.0) -> float:
    """Return a number by which candidates are compared: the logarithm of their time, rounded up so that times within `TIE_FACTOR` may be equal.

    Args:
        products: The plans of the products.
        more_us: Time in us that these products add elsewhere.
    """
    time = total(p.time_sampled_us for p in products)
    return 0.0 if time is None or time + more_us <= 0 else math.ceil(math.log(time + more_us) / math.log(TIE_FACTOR))


def prediction(planned: Sequence[tuple[Site, Sequence[ProductPlan]]], cost: CostModel) -> tuple[Reason, BreakEven]:
    """Describe the predicted speed of sites that are sampled together.

    Args:
        planned: The sites, each with the plans of its products.
        cost: The cost model; it must predict times.

    Returns:
        Words such as "predicted 0.94x at ratio 0.5, break-even 0.41", and the break-even ratio in numbers.
    """
    products = [(site, p) for site, plans in planned for p in plans]
    exact, time = (total(times) for times in ([p.time_exact_us for _, p in products], [p.time_sampled_us for _, p in products]))
    assert exact is not None and time is not None
    ratio = next(p.ratio for _, p in products if p.decision != "exact")

    @functools.cache
    def sampled(share: float) -> float:
        return math.fsum(_time_at(site, p, cost, share) for site, p in products)

    break_even = BreakEven(*(_break_even(exact / off, sampled) for off in (1.0, PREDICTION_ERROR, 1 / PREDICTION_ERROR)))
    return PREDICTED(speedup=exact / time, ratio=ratio, break_even=break_even), break_even


def _break_even(time_us: float, sampled: Callable[[float], float]) -> float:
    """The ratio at which `sampled`, which grows with the ratio, reaches a time, found by bisection."""
    if sampled(RATIO_PRECISION) >= time_us:
        return 0.0
    if sampled(1.0) < time_us:
        return 1.0
    low, high = RATIO_PRECISION, 1.0
    while high - low > RATIO_PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if sampled(middle) < time_us else (low, middle)
    return low


def _time_at(site: Site, plan: ProductPlan, cost: CostModel, share: float) -> float:
    """The predicted time in us of a product as planned, but with another share of its axis kept."""
    product = next(p for p in site.products if p.name == plan.name)
    return planned_estimate(site, product, plan, cost, share * plan.size).time_us or 0.0
