"""Decide which sites that read the same activation also use the same indices of it.

Such sites are query, key and value, gate and up, or both convolutions of a downsampling block.
The entries of the activation X are then ranked, selected and gathered once, for all weights together as if they were one product X [W, V, ..] (see
`kernels.gather.sample`), and saved once for the backward pass. Where the `grad_input`s of these sites are only added up, the sum is put back in place once.
Custom kernels gather nothing and write a gradient with its zeros in one pass, so with them only the selection is shared.

The price is that no product keeps the entries that are best for it. How much accuracy that costs depends on the data, so unless the user asks for sharing
(`share`) it must be predicted to save the time that its average loss of accuracy is worth (`margins.SHARE_MARGIN`); `tune` measures the error of both.
`rewrite` carries out what is decided here.

The sampled `grad_weight`s of such sites (sampling "backward") contract the rows of different output gradients. They share the norms of the rows of X, which the
compiler computes once, and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.config.resolve import SiteSettings
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.fx_utils import CASTS, PRODUCTS, last_view, source_behind
from approx_compile.passes.planning.candidates import TIMED_POLICIES, PlanInputs
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan, total
from approx_compile.passes.planning.product_plans import planned_estimate
from approx_compile.passes.planning.selection import prediction, rank
from approx_compile.passes.sites.site import Product, Site
from approx_compile.reasons import join
from approx_compile.reasons.decisions import SHARES_INDICES, TOGETHER

aten = torch.ops.aten

Sum = int | tuple["Sum", "Sum"]
"""The order in which results are added up: ((0, 1), 2) first adds the results 0 and 1."""

_Way = list[tuple[ProductPlan, ...]]
"""One candidate of each site in a group."""


def share_indices(plan: Plan, inputs: PlanInputs) -> Plan:
    """Let sites that read the same activation share their indices, and be sampled, where that is better than each by itself.

    Without times, sites share that are sampled anyway and whose settings ask for it.

    Args:
        plan: The plan with every site decided by itself.
        inputs: The sites, their settings and candidates, and the cost model.
    """
    sites, settings, new = inputs.sites, inputs.settings, list(plan.sites)
    by_activation: dict[Any, list[int]] = defaultdict(list)
    for i, site in enumerate(sites):
        asked = settings[i].share
        may_share = asked is not False if inputs.cost.predicts_time else asked and settings[i].policy not in TIMED_POLICIES
        if may_share and isinstance(inputs.candidates[i], list) and site.products[0].weight == 1:
            by_activation[_activation(site)].append(i)
    for group in by_activation.values():
        for members, ways in _groups(plan, inputs, group):
            shared = _best_shared([sites[i] for i in members], ways, [plan.sites[i] for i in members], settings[members[0]], inputs.cost)
            for i, shared_plan in zip(members, shared, strict=True):
                new[i] = shared_plan
    return replace(plan, sites=tuple(new))


def _activation(site: Site) -> Any:
    """A key that is equal for sites whose products contract the same axis of the same activation, through views and casts, which every call makes anew."""
    x, axis = site.products[0].operands[0], site.products[0].axes[0]
    value = _torch.value(x)
    return _origin(x), tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, axis


def _origin(n: Any) -> Any:
    n = source_behind(n)
    if isinstance(n, fx.Node) and n.target in CASTS:
        return _torch.value(n).dtype, _origin(n.args[0])
    return n


def _groups(plan: Plan, inputs: PlanInputs, readers: Sequence[int]) -> list[tuple[list[int], list[_Way]]]:
    """Divide the readers of an activation into groups that select alike by their first candidate; for each group return its members and their common ways.

    A way gives all members the same estimator and lowering. Where predicted time decides, all candidates count, else only the one that was selected.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    by_choice: dict[int, dict[Any, tuple[ProductPlan, ...]]] = {}
    for i in readers:
        settings, candidates = inputs.settings[i], inputs.candidates[i]
        assert isinstance(candidates, list)
        usable = candidates if settings.policy == "cost" else [plan.sites[i].products]
        if all(products[0].decision == "sampled" for products in usable):
            by_choice[i] = {}
            for products in usable:
                by_choice[i].setdefault((products[0].how, products[0].lowering), products)
            first = usable[0][0]
            alike[settings.policy, settings.share, first.how, first.lowering].append(i)
    groups = []
    for members in alike.values():
        leader = inputs.sites[members[0]]
        members = [i for i in members if _weight_is_known_before(inputs.sites[i], leader)]
        if len(members) > 1:
            common = [key for key in by_choice[members[0]] if all(key in by_choice[i] for i in members)]
            groups.append((members, [[by_choice[i][key] for i in members] for key in common]))
    return groups


def _weight_is_known_before(site: Site, leader: Site) -> bool:
    """Whether the site's weight can be computed before the leader runs: from the leader on no product is needed, so it depends on parameters only."""
    left, seen = [site.products[0].operands[1]], set()
    while left:
        n = left.pop()
        if n in seen or n < leader.node:
            continue
        seen.add(n)
        if n.op != "call_function" or n.target in PRODUCTS:
            return False
        left += n.all_input_nodes
    return True


def _best_shared(sites: Sequence[Site], ways: Sequence[_Way], apart: Sequence[SitePlan], settings: SiteSettings, cost: CostModel) -> list[SitePlan]:
    """The plans of a group of sites with shared indices, by the best of the ways, or as they are `apart` if that is better."""
    by_time = settings.policy == "cost"
    one_sum = summed(_results(sites, ways[0])) is not None
    shared = [_with_shared_indices(sites, way, cost, one_sum) for way in ways]
    best = min(shared, key=lambda way: rank([p for products in way for p in products]))
    if cost.predicts_time and not _is_better(sites[0].kind, apart, best, settings, cost):
        return list(apart)
    words, break_even = prediction(list(zip(sites, best, strict=True)), cost) if cost.predicts_time and by_time else (None, None)
    plans = []
    for plan, products in zip(apart, best, strict=True):
        reason = plan.reason if words is None else join((products[0].reason, TOGETHER(words=words)))
        others = products[0].shares or ", ".join(s.name for s in sites[1:])
        reason = join((reason, SHARES_INDICES(others=others)))
        plans.append(replace(plan, decision="sampled", reason=reason, products=products, break_even=break_even))
    return plans


def _is_better(kind: str, apart: Sequence[SitePlan], best: _Way, settings: SiteSettings, cost: CostModel) -> bool:
    """Whether sharing takes less time than sampling each site by itself and, where time decides, than exact products."""
    separate, exact = total(s.time_sampled_us for s in apart), total(s.time_exact_us for s in apart)
    time = total(p.time_sampled_us for products in best for p in products)
    assert separate is not None and exact is not None and time is not None
    margin = 1.0 if settings.share else margins.SHARE_MARGIN
    return separate >= margin * time and (settings.policy != "cost" or cost.threshold(kind).is_exceeded(exact, time))


def _with_shared_indices(sites: Sequence[Site], way: _Way, cost: CostModel, one_sum: bool) -> _Way:
    """The plans of a group's products: those of the first site unchanged, those of the others without what the first does for them."""
    shared = [way[0]]
    for site, products in zip(sites[1:], way[1:], strict=True):
        new = list(products)
        for j, (product, p) in enumerate(zip(site.products, products, strict=True)):
            if j == 0 or (one_sum and p.name == "grad_input" and p.decision == "coupled" and p.lowering not in CUSTOM_KERNELS):
                p = replace(p, shares=sites[0].name)
                new[j] = p.with_estimate(planned_estimate(site, product, p, cost))
        shared.append(tuple(new))
    return shared


def _results(sites: Sequence[Site], way: _Way) -> list[tuple[fx.Node, int] | None]:
    """For each site the coupled gradient of the activation and its dim along the entries kept, or None if there is none."""
    results = []
    for site, products in zip(sites, way, strict=True):
        coupled = [q.result for q, p in zip(site.products, products, strict=True) if p.name == "grad_input" and p.decision == "coupled"]
        results.append(coupled[0] if coupled else None)
    return results


def readers(sites: Sequence[Site], plan: Plan) -> dict[str, list[Product]]:
    """Return by site name the sampled outputs of other sites that use its indices.

    Args:
        sites: The sites of the graph.
        plan: The plan.
    """
    outputs: dict[str, list[Product]] = defaultdict(list)
    for site, planned in zip(sites, plan.sites, strict=True):
        if (leader := planned.products[0].shares) is not None:
            outputs[leader].append(site.products[0])
    return outputs


def sums(sites: Sequence[Site], plan: Plan) -> dict[str, tuple[fx.Node, Sum]]:
    """Return where gradients of the activation are added up that are put back in place together.

    Args:
        sites: The sites of the graph.
        plan: The plan.

    Returns:
        By the name of the site whose indices are shared: the node that holds the sum, and the order of the additions.
    """
    results: dict[str, list[tuple[fx.Node, int] | None]] = {d.shares: [] for s in plan.sites for d in s.products[1:] if d.shares is not None}
    for site, planned in zip(sites, plan.sites, strict=True):
        for p, d in zip(site.products, planned.products, strict=True):
            if p.name == "grad_input" and (name := d.shares or site.name) in results:
                results[name].append(p.result)
    sums_by_name = {name: summed(gradients) for name, gradients in results.items()}
    return {name: added for name, added in sums_by_name.items() if added is not None}


def summed(results: Sequence[tuple[fx.Node, int] | None]) -> tuple[fx.Node, Sum] | None:
    """Return the node that holds the sum of these gradients and of nothing else, through views, and the order in which they are added up.

    Args:
        results: Gradients, each with its dim along the entries kept; None for one that is not there.

    Returns:
        None if there is no such node, or if more than one of its sizes is a symbol.
    """
    known = [r for r in results if r is not None]
    if len(known) < len(results) or len({(dim, tuple(map(str, _torch.value(n).shape))) for n, dim in known}) > 1:
        return None
    parts: dict[fx.Node, Sum] = {last_view(n): i for i, (n, _) in enumerate(known)}
    while len(parts) > 1:
        node = next((u for n in parts for u in n.users if len(n.users) == 1 and _adds(u, parts)), None)
        if node is None:
            return None
        first, second = node.args[:2]
        assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
        order = (parts.pop(first), parts.pop(second))
        parts[node if len(parts) == 0 else last_view(node)] = order
    result, added = next(iter(parts.items()))
    return (result, added) if sum(not isinstance(s, int) for s in _torch.value(result).shape) <= 1 else None


def _adds(n: fx.Node, parts: Mapping[fx.Node, Sum]) -> bool:
    """Whether a node is the plain sum of two of the parts, and nothing else reads these."""
    if n.target is not aten.add.Tensor or n.kwargs or len(n.args) != 2 or n.args[0] is n.args[1]:
        return False
    added = [a for a in n.args if isinstance(a, fx.Node) and a in parts and len(a.users) == 1]
    return len(added) == 2 and all(_torch.value(a).dtype == _torch.value(n).dtype for a in added)
