"""Decide how a gradient product is replaced: by zeros, by random numbers, or by the product with the largest entries of the output gradient only.

The mathematics are in `kernels.gradient_replacements`; `rewrite.replace_gradient` edits the graph as decided here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from approx_compile import _torch
from approx_compile.config.resolve import ProductSettings, SiteSettings
from approx_compile.kernels.gradient_replacements import Replacement
from approx_compile.passes.cost.estimates import replacement_flops
from approx_compile.passes.fx_utils import CONV, MM, has_fixed_sizes
from approx_compile.passes.planning import lowering
from approx_compile.passes.planning.candidates import PlanInputs
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan
from approx_compile.passes.sites.site import Product, Site
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import EMPTY_BATCH, MAX, MAX_KERNEL_REFUSED, OF_PRODUCT, RANDOM, REST_EXACT, ZEROS
from approx_compile.reasons.products import (
    BY_SETTINGS,
    MAX_ALL_ENTRIES,
    MAX_BATCHED,
    MAX_CONV_INPUT,
    MAX_DYNAMIC,
    MAX_TILE_LINEAR,
    MAX_WITHOUT_WEIGHT,
)


class ReplacementChoice(NamedTuple):
    """The answer to a request to replace a gradient product.

    Attributes:
        replacement: How the product is replaced; None if it cannot be.
        kept: How many entries of the output gradient the replacement reads, per channel and sample (convolutions) or per row (linear layers).
        size: How many such entries there are.
        reason: The decision in words, for the plan.
    """

    replacement: Replacement | None
    kept: int
    size: int
    reason: Reason


def choose_replacement(site: Site, product: Product, wanted: ProductSettings) -> ReplacementChoice:
    """Decide whether a gradient product can be replaced as requested, and by which code.

    Args:
        site: The site that the product belongs to.
        product: The gradient product.
        wanted: What the configuration asks for; its `method` is "zero", "random" or "max".

    Returns:
        The replacement, or the reason why there is none.
    """
    replacement = Replacement(wanted.method, wanted.j, wanted.scale, wanted.std)
    if _torch.hint(product.size) == 0 and replacement.method != "max":
        return ReplacementChoice(Replacement("zero"), 0, 1, EMPTY_BATCH())
    if replacement.method == "zero":
        return ReplacementChoice(replacement, 0, _torch.hint(product.size), ZEROS())
    if replacement.method == "random":
        std = "1 / batch" if replacement.std is None else f"{replacement.std:g}"
        return ReplacementChoice(replacement, 0, _torch.hint(product.size), RANDOM(std=std))
    reason = _max_rejection_reason(site, product)
    if reason is not None:
        return ReplacementChoice(None, 1, 1, reason)
    sizes = _candidate_sizes(site, product)
    size = math.prod(sizes)
    if wanted.tile is not None:
        if site.node.target not in CONV:
            return ReplacementChoice(None, size, size, MAX_TILE_LINEAR())
        replacement = replace(replacement, tile=_tile_side(wanted.tile, sizes))
    kept = replacement.entries(sizes)
    if kept >= size:
        asked = f"j {replacement.j}" if replacement.tile is None else f"tile {replacement.tile}"
        return ReplacementChoice(None, size, size, MAX_ALL_ENTRIES(asked=asked, size=size))
    tiles = f", one of every tile of {replacement.tile}" if replacement.tile is not None else ""
    words = MAX(kept=kept, size=size, tiles=tiles, by="")
    if wanted.lowering == "inductor":
        return ReplacementChoice(replacement, kept, size, words)
    no_kernel = lowering.max_kernel_refusal(site, "cuda" if wanted.lowering == "auto" else wanted.lowering, replacement)
    if no_kernel is None:
        return ReplacementChoice(replace(replacement, lowering="cuda"), kept, size, MAX(kept=kept, size=size, tiles=tiles, by=", by cuda"))
    return ReplacementChoice(replacement, kept, size, words if wanted.lowering == "auto" else MAX_KERNEL_REFUSED(words=words, why=no_kernel))


def smallest_useful_tile(sizes: Sequence[int]) -> int:
    """Return the side of the smallest tile that leaves at most 16 entries per channel.

    On CPUs the sum of patches takes as long as the exact product at about 16 entries per channel, so smaller tiles save no time.

    Args:
        sizes: The spatial sizes of the output gradient.
    """
    return next(t for t in itertools.count(4) if Replacement("max", tile=t).entries(sizes) <= 16)


def _tile_side(wanted: int | float | str, sizes: Sequence[int]) -> int:
    """Turn the setting `tile` into a side length: an integer as it is, a float as a fraction of the longest size, "auto" as the smallest useful one."""
    if isinstance(wanted, str):
        return smallest_useful_tile(sizes)
    return wanted if isinstance(wanted, int) else math.ceil(wanted * max(sizes))


def _candidate_sizes(site: Site, product: Product) -> Sequence[Any]:
    """The sizes of what `max` selects from: the places of a channel in one sample for convolutions, the outputs of a row for linear layers."""
    shape = _torch.value(product.output_grad).shape
    return shape[2:] if site.node.target in CONV else (shape[product.output_grad_dim],)


def _max_rejection_reason(site: Site, product: Product) -> Reason | None:
    """Why `max` cannot replace this product, or None if it can."""
    if site.kind == "matmul":
        return MAX_WITHOUT_WEIGHT()
    if site.node.target in CONV:
        if product.name != "grad_weight":
            return MAX_CONV_INPUT()
    elif site.node.target not in MM:
        return MAX_BATCHED()
    for operand, axis in zip(product.operands, product.axes, strict=True):
        batch_dim = axis.dim if product.name == "grad_weight" else 1 - axis.dim
        if not has_fixed_sizes(operand, batch_dim):
            return MAX_DYNAMIC()
    return None


def replace_gradients(plan: Plan, inputs: PlanInputs) -> Plan:
    """Replace gradients wherever the settings ask for it. A gradient that cannot be replaced is exact, and its site says why.

    Args:
        plan: The plan with every site decided.
        inputs: The sites and their settings.
    """
    return replace(plan, sites=tuple(_with_replacements(*each) for each in zip(inputs.sites, plan.sites, inputs.settings, strict=True)))


def _with_replacements(site: Site, plan: SitePlan, settings: SiteSettings) -> SitePlan:
    if site.blocked is not None:
        return plan
    products, reasons = list(plan.products), []
    for i, (product, exact) in enumerate(zip(site.products, plan.products, strict=True)):
        wanted = settings.of(product.name)
        if not wanted.replaces:
            continue
        products[i] = _replaced(site, product, exact, wanted)
        reasons.append(OF_PRODUCT(product=product.name, words=products[i].reason))
    if not reasons:
        return plan
    rest = [] if plan.reason == BY_SETTINGS() else [plan.reason] if plan.decision == "sampled" else [REST_EXACT(why=plan.reason)]
    replaced = any(p.decision == "replaced" for p in products)
    return replace(plan, products=tuple(products), decision="sampled" if replaced else plan.decision, reason=join(reasons + rest))


def _replaced(site: Site, product: Product, exact: ProductPlan, wanted: ProductSettings) -> ProductPlan:
    replacement, kept, size, reason = choose_replacement(site, product, wanted)
    if replacement is None:
        return replace(exact, reason=reason)
    return replace(
        exact,
        decision="replaced",
        reason=reason,
        method=replacement.method,
        ratio=kept / size,
        k=kept,
        size=size,
        flops_sampled=replacement_flops(site, product, replacement),
        replacement=replacement,
        time_sampled_us=None,
    )
