"""The first steps of planning: apply the rules to the sites of a graph, and select the best candidate of each site by itself.

`joint_graph_pass` runs these and the later steps in order; each takes a plan and returns a changed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from approx_compile.config import ApproxConfig
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.planning.candidates import PlanInputs, enumerate_candidates, known_lowerings
from approx_compile.passes.planning.plan import Candidates, Plan, ProductPlan, SitePlan
from approx_compile.passes.planning.plan_validation import check_shapes
from approx_compile.passes.planning.rule_matching import match_rules, unmatched_layers
from approx_compile.passes.planning.selection import select_best
from approx_compile.passes.sites.site import Site

TimeSites = Callable[[Sequence[tuple[Site, Candidates]]], Sequence[Sequence[float]]]
"""Measures sites with their candidates and returns, for each site, times in us: of the exact products, then of each candidate."""

NeighborCost = Callable[[int, Sequence[ProductPlan], Sequence[SitePlan]], tuple[float, float]]
"""Takes the number of a site, its products as planned, and the plans of the sites before it. Returns the predicted time in us of what the choice changes
at those sites, before and after the change."""


def begin_plan(sites: Sequence[Site], layers_without_product: Sequence[str], config: ApproxConfig, cost: CostModel) -> tuple[Plan, PlanInputs]:
    """Apply the rules of a config to the sites of a graph.

    Args:
        sites: The sites of the graph, in execution order.
        layers_without_product: Names of layers that have no site in the graph.
        config: The config.
        cost: The cost model.

    Returns:
        A plan without sites, with the patterns that match nothing and remarks; and what the planning steps need.

    Raises:
        ConfigError: The config has a tuned plan that does not fit the sites.
    """
    matches, unmatched = match_rules(sites, config)
    remarks = check_shapes(config.plan, sites) if config.plan is not None else ()
    settings = [config.settings(m) for m in matches]
    candidates = [enumerate_candidates(site, wanted, cost) for site, wanted in zip(sites, settings, strict=True)]
    plan = Plan((), unmatched, remarks=(*remarks, *unmatched_layers(layers_without_product, config)))
    return plan, PlanInputs(sites, settings, candidates, cost)


def select_candidates(plan: Plan, inputs: PlanInputs, time_sites: TimeSites, neighbor_cost: NeighborCost) -> Plan:
    """Decide every site by itself: exact, or the best of its candidates.

    Args:
        plan: The plan, whose sites are not decided yet.
        inputs: The sites, their settings and candidates, and the cost model.
        time_sites: Measures sites. It is called once, for all sites whose policy is "measure", and only on a machine with a profile.
        neighbor_cost: What the candidates of a site change at sites before it.
    """
    times = _measured_times(inputs, time_sites) if inputs.cost.predicts_time else {}
    decided: list[SitePlan] = []

    def others(products: Sequence[ProductPlan]) -> tuple[float, float]:
        return neighbor_cost(len(decided), products, decided)

    for i, (site, settings, candidates) in enumerate(zip(inputs.sites, inputs.settings, inputs.candidates, strict=True)):
        best = candidates if isinstance(candidates, SitePlan) else select_best(site, settings, candidates, inputs.cost, times.get(i), others)
        decided.append(replace(best, lowerings=known_lowerings(site, settings.output.lowering, inputs.cost)))
    return replace(plan, sites=tuple(decided))


def _measured_times(inputs: PlanInputs, time_sites: TimeSites) -> dict[int, Sequence[float]]:
    """Measured times by the number of the site."""
    questions = {
        i: (inputs.sites[i], candidates)
        for i, candidates in enumerate(inputs.candidates)
        if inputs.settings[i].policy == "measure" and not isinstance(candidates, SitePlan)
    }
    return dict(zip(questions, time_sites(list(questions.values())), strict=True)) if questions else {}
