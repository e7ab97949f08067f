"""Carry out a plan on the joint graph. All decisions are in the plan; after planning, only the modules of this folder edit the graph.

A sampled output keeps its node's op and gets gathered operands. A coupled gradient reads the operands that the output kept, and its result is scattered
back to the full size. The inserted pieces are traced from `kernels` on the nodes' fake values, so Inductor sees aten ops. Only where a custom kernel
computes a product (`custom_ops`) does it see an op of this package, whose code the cache key covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from approx_compile.passes.fx_utils import CONV
from approx_compile.passes.planning import index_sharing
from approx_compile.passes.planning.plan import Plan, SitePlan
from approx_compile.passes.rewrite.gradient_task import GradientTask, SharedSum
from approx_compile.passes.rewrite.graph_edit import SampledOperands, with_current_operands
from approx_compile.passes.rewrite.narrow_conv import edit_conv_gradients
from approx_compile.passes.rewrite.narrow_matmul import narrow_matmul_gradient
from approx_compile.passes.rewrite.narrow_region import RegionNarrowing, consumer_regions
from approx_compile.passes.rewrite.replace_gradient import replace_matmul
from approx_compile.passes.rewrite.sample_product import sample_product
from approx_compile.passes.rewrite.scatter_back import scatter_back_sum
from approx_compile.passes.sites.site import Site


def apply_plan(graph: fx.Graph, sites: Sequence[Site], plan: Plan) -> None:
    """Edit the graph as planned, then remove dead nodes and lint.

    Outputs are edited in execution order, gradients in the order of the backward pass: those of the last site first.

    Args:
        graph: The joint graph, which is edited.
        sites: The sites of this graph.
        plan: The plan made from these sites.
    """
    readers = index_sharing.readers(sites, plan)
    sums = {name: SharedSum(*total) for name, total in index_sharing.sums(sites, plan).items()}
    regions = consumer_regions(sites, plan)
    sampled: dict[str, SampledOperands] = {}
    narrow_operands: dict[str, tuple[fx.Node, fx.Node]] = {}
    narrowings: dict[str, RegionNarrowing] = {}
    for site, planned in zip(sites, plan.sites, strict=True):
        output = planned.products[0]
        if site.name in regions:
            narrowings[site.name] = RegionNarrowing(graph, regions[site.name], sampled)
            sampled[site.name] = narrowings[site.name].forward(sampled, narrow_operands)
        elif output.decision == "sampled":
            leader = sampled[output.shares] if output.shares is not None else None
            product = with_current_operands(site.products[0])
            sampled[site.name] = sample_product(graph, site, product, output, leader, readers.get(site.name, ()))
    for site, planned in zip(reversed(sites), reversed(plan.sites), strict=True):
        narrowing = narrowings.get(site.name)
        tasks = _gradient_tasks(site, planned, sampled, narrow_operands.get(site.name), narrowing is not None, sums)
        _edit_gradients(graph, site, tasks)
        if narrowing is not None:
            narrowing.backward()
    for shared_sum in sums.values():
        scatter_back_sum(graph, shared_sum)
    graph.eliminate_dead_code()
    graph.lint()


def _gradient_tasks(
    site: Site,
    planned: SitePlan,
    sampled: Mapping[str, SampledOperands],
    narrow_operands: tuple[fx.Node, fx.Node] | None,
    narrow_activation: bool,
    sums: Mapping[str, SharedSum],
) -> list[GradientTask]:
    """What is to be done to the gradients of a site that do not stay as they are."""
    tasks = []
    for product, decision in zip(site.products[1:], planned.products[1:], strict=True):
        coupled = sampled[site.name] if decision.decision == "coupled" else None
        skipped = sampled[decision.skips] if decision.skips is not None else None
        if decision.decision not in ("sampled", "replaced") and coupled is None and skipped is None:
            continue
        of_input = product.name == "grad_input"
        shared_sum = sums.get(decision.shares or site.name) if of_input else None
        # a sampled output's operands are cut along its contraction axis too, which fits coupled gradients only
        fits = coupled is not None or planned.products[0].decision == "exact"
        operands = narrow_operands if fits else None
        tasks.append(GradientTask(with_current_operands(product), decision, coupled, skipped, operands, narrow_activation and of_input, shared_sum))
    return tasks


def _edit_gradients(graph: fx.Graph, site: Site, tasks: Sequence[GradientTask]) -> None:
    if site.node.target in CONV:
        edit_conv_gradients(graph, site, tasks)
        return
    for task in tasks:
        if task.decision.replacement is not None:
            replace_matmul(graph, task.product, task.decision.replacement)
        elif task.decision.decision == "sampled":
            sample_product(graph, site, task.product, task.decision)
        else:
            narrow_matmul_gradient(graph, site.products[0].operands, task)
