"""Match the rules of a config to the sites of a graph: which rules hold for a site, what they ask of its rows, and which layers and patterns match nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx

from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import RowSettings
from approx_compile.config.selectors import LayerPattern
from approx_compile.passes.planning.plan import SitePlan
from approx_compile.passes.sites.site import Site
from approx_compile.reasons import Reason
from approx_compile.reasons.products import NO_PRODUCT


def unmatched_layers(names: Sequence[str], config: ApproxConfig) -> tuple[Reason, ...]:
    """Return a remark on each layer that a rule asks to approximate although it has no site.

    Args:
        names: Names of the layers without a site.
        config: The config.
    """
    patterns = [p for rule in config.rules if not rule.only_exact for p in rule.patterns]
    asked = [n for n in names if any(p.matches_name(n) if p.is_name else p.kind in ("linear", "site") and p.index is None for p in patterns)]
    return tuple(NO_PRODUCT(name=n) for n in asked)


def match_rules(sites: Sequence[Site | SitePlan], config: ApproxConfig) -> tuple[list[list[bool]], tuple[str, ...]]:
    """Match the rules of a config to sites by name, kind and position.

    Args:
        sites: The sites of a graph, in execution order.
        config: The config.

    Returns:
        For every site, whether each of the rules matches it; and the patterns that match no site.
    """
    positions: list[dict[str, int]] = []
    counts: dict[str, int] = defaultdict(int)
    for site in sites:
        positions.append({kind: counts[kind] for kind in (site.kind, "site")})
        counts[site.kind] += 1
        counts["site"] += 1

    def hit(pattern: LayerPattern, i: int) -> bool:
        if pattern.is_name:
            return pattern.matches_name(sites[i].module, sites[i].name)
        kind = pattern.kind or ""
        return kind in positions[i] and pattern.matches_position(positions[i][kind], counts[kind])

    rules = [rule.patterns for rule in config.rules]
    matches = [[any(hit(p, i) for p in patterns) for patterns in rules] for i in range(len(sites))]
    unmatched = tuple(p.text for p in config.patterns() if not any(hit(p, i) for i in range(len(sites))))
    return matches, unmatched


def row_requests(sites: Sequence[Site], config: ApproxConfig) -> tuple[RowSettings | None, dict[fx.Node, RowSettings | None], set[fx.Node]]:
    """Return what the settings ask of the rows of the batch in the backward pass.

    Args:
        sites: The sites of a graph.
        config: The config.

    Returns:
        What is asked where there is no site (of the rules only those for every site count); what is asked at each gradient product, where a site that must be
        exact asks for all rows (None); and the gradient products of layers that a rule keeps exact. Those must not be computed from selected rows at all.
    """
    matches, _ = match_rules(sites, config)
    top = config.settings([rule.layers == ("site",) for rule in config.rules]).rows
    asked: dict[fx.Node, RowSettings | None] = {}
    excluded: set[fx.Node] = set()
    for site, hits in zip(sites, matches, strict=True):
        settings = config.settings(hits)
        by_rule = top is not None or any(hit and rule.only_exact for hit, rule in zip(hits, config.rules, strict=True))
        if by_rule and settings.rows is None and settings.grad_input.method == settings.grad_weight.method == "exact":
            excluded.update(p.node for p in site.products[1:])
        for p in site.products[1:]:
            asked[p.node] = settings.rows if site.blocked is None else None
    return top, asked, excluded
