"""Sites that read the same activation (query, key and value; gate and up; both convolutions of a downsampling block) and keep the same entries of it.

X is then ranked, selected and gathered once, for all of X [W, V, ..], which would choose just these entries (see `kernels.products.sample`), and saved
once for the backward pass; where their `grad_input`s are only summed up, the sum is put back in place once. Kernels of ours gather nothing and
write a gradient with its zeros in one pass: under those the choice alone is shared. What that loses is that no product keeps its own
best entries. How much is not known without data, so unless the user says (`share`) it must be predicted to save what that has been found to cost on average
(`cost.SHARE_MARGIN`); `tune` measures the error of both. Decided here, carried out by `rewrite`.

The sampled `grad_weight`s of such sites (sampling "backward") contract the rows of different output gradients: they share the norms of X's rows, which the
compiler computes once, and no more.
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
from approx_compile.machine import Machine
from approx_compile.passes.cost import estimates
from approx_compile.passes.fx_utils import CASTS, PRODUCTS, last_view, source_behind
from approx_compile.passes.planning import candidates
from approx_compile.passes.planning.plan import Candidates, Plan, ProductPlan, SitePlan, total
from approx_compile.passes.sites.site import Product, Site

aten = torch.ops.aten
prims = torch.ops.prims

Sum = int | tuple["Sum", "Sum"]
"""In which order results are added up: of (0, 1), 2 first the results 0 and 1."""


def share(
    sites: Sequence[Site], settings: Sequence[SiteSettings], tried: Sequence[SitePlan | Candidates], judged: Sequence[SitePlan], machine: Machine | None
) -> list[SitePlan]:
    """The sites as `judged` each by itself, but those that had better share, and be sampled, together. Without a `machine`, and so without times, those share
    that were told to and are sampled anyway."""
    found = list(judged)
    by_activation: dict[Any, list[int]] = defaultdict(list)
    for i, site in enumerate(sites):
        may = settings[i].share is not False if machine is not None else settings[i].share and settings[i].policy not in candidates.TIMED
        if may and isinstance(tried[i], list) and site.products[0].weight == 1:
            by_activation[_activation(site)].append(i)
    for readers in by_activation.values():
        for members, ways in _ways(sites, settings, tried, judged, readers):
            for i, plan in _together([sites[i] for i in members], ways, [judged[i] for i in members], machine, settings[members[0]]):
                found[members[i]] = plan
    return found


def _activation(site: Site) -> Any:
    """The same for sites whose products contract the same axis of the same activation: through views and casts, which every call makes anew."""
    x, axis = site.products[0].operands[0], site.products[0].axes[0]
    value = _torch.value(x)
    return _origin(x), tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, axis


def _origin(n: Any) -> Any:
    n = source_behind(n)
    if isinstance(n, fx.Node) and n.target in CASTS:
        return _torch.value(n).dtype, _origin(n.args[0])
    return n


def _ways(
    sites: Sequence[Site], settings: Sequence[SiteSettings], tried: Sequence[SitePlan | Candidates], judged: Sequence[SitePlan], readers: Sequence[int]
) -> list[tuple[list[int], list[list[tuple[ProductPlan, ...]]]]]:
    """Of the readers of an activation those that choose alike by the first of their ways, and the ways that all of them have, by one and the same code: of all
    that are tried where predicted time decides, else of what each came to by itself."""
    alike: dict[Any, list[int]] = defaultdict(list)
    by_choice: dict[int, dict[Any, tuple[ProductPlan, ...]]] = {}
    for i in readers:
        mine = tried[i]
        assert isinstance(mine, list)
        own = mine if settings[i].policy == "cost" else [judged[i].products]
        if all(products[0].decision == "sampled" for products in own):
            by_choice[i] = {}
            for products in own:
                by_choice[i].setdefault((products[0].how, products[0].lowering), products)
            alike[settings[i].policy, settings[i].share, own[0][0].how, own[0][0].lowering].append(i)
    found = []
    for members in alike.values():
        members = [i for i in members if _movable(sites[i], sites[members[0]])]
        if len(members) > 1:
            common = [key for key in by_choice[members[0]] if all(key in by_choice[i] for i in members)]
            found.append((members, [[by_choice[i][key] for i in members] for key in common]))
    return found


def _movable(site: Site, leader: Site) -> bool:
    """Whether the site's weight can be had before the leader runs: nothing behind that makes it is a product (it depends on parameters alone)."""
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


def _together(
    sites: Sequence[Site], ways: Sequence[Sequence[tuple[ProductPlan, ...]]], apart: Sequence[SitePlan], machine: Machine | None, settings: SiteSettings
) -> list[tuple[int, SitePlan]]:
    """The best of the ways with shared indices, if it is better than each site by itself: {place: plan}."""
    by_time = settings.policy == "cost"
    one_sum = summed(_results(sites, ways[0])) is not None
    shared = [_shared(sites, way, machine, one_sum) for way in ways]
    best = min(shared, key=lambda way: candidates.rank([p for products in way for p in products]))
    if machine is not None and not _better(sites[0].kind, apart, best, machine, settings):
        return []
    why, at = candidates.predicted(list(zip(sites, best, strict=True)), machine) if machine is not None and by_time else ("", None)
    found = []
    for i, (plan, products) in enumerate(zip(apart, best, strict=True)):
        reason = f"{products[0].reason}; {why} together" if by_time else plan.reason
        with_whom = products[0].shares or ", ".join(s.name for s in sites[1:])
        found.append(
            (
                i,
                replace(plan, decision="sampled", reason=f"{reason}; shares its indices with {with_whom}", products=products, break_even=at),
            )
        )
    return found


def _better(kind: str, apart: Sequence[SitePlan], best: Sequence[tuple[ProductPlan, ...]], machine: Machine, settings: SiteSettings) -> bool:
    """Whether it takes less time than each by itself, and, where time decides, than none sampled."""
    own, exact = total(s.time_sampled_us for s in apart), total(s.time_exact_us for s in apart)
    time = total(p.time_sampled_us for products in best for p in products)
    assert own is not None and exact is not None and time is not None
    margin = 1.0 if settings.share else estimates.SHARE_MARGIN
    return own >= margin * time and (settings.policy != "cost" or estimates.worth(kind, exact, time, machine))


def _shared(sites: Sequence[Site], way: Sequence[tuple[ProductPlan, ...]], machine: Machine | None, one_sum: bool) -> list[tuple[ProductPlan, ...]]:
    """The plans of a group's products: the first site's as they are, the others' without what it does for them."""
    found = [way[0]]
    for site, products in zip(sites[1:], way[1:], strict=True):
        new = list(products)
        for j, (product, p) in enumerate(zip(site.products, products, strict=True)):
            if j == 0 or (one_sum and p.name == "grad_input" and p.decision == "coupled" and p.lowering not in CUSTOM_KERNELS):
                assert p.how is not None
                estimate = (estimates.coupled if j else estimates.sampled)(site, product, p.how, machine, lowering=p.lowering, shares=True)
                new[j] = replace(
                    p, flops_sampled=estimate.flops, time_sampled_us=estimate.time_us, terms=estimate.terms, sizes=estimate.sizes, shares=sites[0].name
                )
        found.append(tuple(new))
    return found


def _results(sites: Sequence[Site], way: Sequence[tuple[ProductPlan, ...]]) -> list[tuple[fx.Node, int] | None]:
    """Where the coupled gradients of the activation lie, and their dim along the entries kept; None for one that is not there."""
    found = []
    for site, products in zip(sites, way, strict=True):
        coupled = [q.result for q, p in zip(site.products, products, strict=True) if p.name == "grad_input" and p.decision == "coupled"]
        found.append(coupled[0] if coupled else None)
    return found


def readers(sites: Sequence[Site], plan: Plan) -> dict[str, list[Product]]:
    """By site: the sampled outputs of others that use its indices."""
    found: dict[str, list[Product]] = defaultdict(list)
    for site, planned in zip(sites, plan.sites, strict=True):
        if (leader := planned.products[0].shares) is not None:
            found[leader].append(site.products[0])
    return found


def sums(sites: Sequence[Site], plan: Plan) -> dict[str, tuple[fx.Node, Sum]]:
    """By site: where its gradient is summed up with those that are put back together with it, and in which order."""
    results: dict[str, list[tuple[fx.Node, int] | None]] = {d.shares: [] for s in plan.sites for d in s.products[1:] if d.shares is not None}
    for site, planned in zip(sites, plan.sites, strict=True):
        for p, d in zip(site.products, planned.products, strict=True):
            if p.name == "grad_input" and (name := d.shares or site.name) in results:
                results[name].append(p.result)
    found = {name: summed(own) for name, own in results.items()}
    return {name: total for name, total in found.items() if total is not None}


def summed(results: Sequence[tuple[fx.Node, int] | None]) -> tuple[fx.Node, Sum] | None:
    """The node that holds the sum of these gradients and of nothing else, through views, and the order in which they are added up; None too where more than one
    of its sizes is a symbol."""
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
    total, added = next(iter(parts.items()))
    return (total, added) if sum(not isinstance(s, int) for s in _torch.value(total).shape) <= 1 else None


def _adds(n: fx.Node, parts: Mapping[fx.Node, Sum]) -> bool:
    """Whether it is the plain sum of two of the parts, which nothing else reads."""
    if n.target is not aten.add.Tensor or n.kwargs or len(n.args) != 2 or n.args[0] is n.args[1]:
        return False
    found = [a for a in n.args if isinstance(a, fx.Node) and a in parts and len(a.users) == 1]
    return len(found) == 2 and all(_torch.value(a).dtype == _torch.value(n).dtype for a in found)
