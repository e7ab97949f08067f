"""Find the channels of parameters outside of which a gradient is zero because of a choice that depends on weights alone.

A site that keeps the input channels `idx` of its activation has a weight gradient that is zero in the other ones. So are the gradients of what made these
channels: the output channels of the sites before it, their biases, the weights of a BatchNorm in between. `zero_propagation` follows these zeros through the
exact graph, whether or not the plan uses them to save time.

The choice of `topk_weights` depends on weights alone. Under data parallelism all ranks therefore make the same one, and only the kept channels of such
gradients need to be exchanged (Adelman et al. 2021, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import users_of_output
from approx_compile.passes.planning import zero_propagation
from approx_compile.passes.planning.plan import KeptChannels, Plan, SitePlan
from approx_compile.passes.planning.producer_narrowing import WEIGHTS_ONLY
from approx_compile.passes.planning.zero_skipping import readers_of_gradients
from approx_compile.passes.sites.conv_gradients import conv_weight_axes
from approx_compile.passes.sites.site import Input, Product, Site, one_contraction


def kept_channels(graph: fx.Graph, sites: Sequence[Site], plan: Plan) -> tuple[KeptChannels, ...]:
    """Find the parameters whose gradient is zero outside the channels that a site keeps.

    Args:
        graph: The joint graph, before it is edited.
        sites: The sites of the graph.
        plan: The plan, complete.

    Returns:
        One entry for each parameter and dim.
    """
    outputs: dict[fx.Node, list[int]] = {}
    for position, n in _torch.gradient_outputs(graph).items():
        outputs.setdefault(n, []).append(position)
    readers = readers_of_gradients(sites)
    found = []
    for site, planned in zip(sites, plan.sites, strict=True):
        output = planned.products[0]
        if output.decision != "sampled" or output.method != WEIGHTS_ONLY or output.shares is not None or not one_contraction(site):
            continue
        how = output.how
        assert how is not None
        starts = dict(_coupled_gradients(site.name, sites, plan.sites))
        zero = zero_propagation.propagate_zeros(starts) if starts else {}
        made = {n: d for z in zero.items() for i, j in readers.get(z, ()) for n, d in _gradients_of_output_channels(sites[i], plan.sites[i], j)}
        zero = zero_propagation.propagate_zeros(starts | made) if made else zero
        found += [KeptChannels(i, d, site.name, how.unit, how.size, how.kept) for n, d in zero.items() for i in outputs.get(n, ())]
    return tuple(found)


def with_kept_channels(plan: Plan, graph: fx.Graph, sites: Sequence[Site], inputs: Sequence[Input]) -> Plan:
    """Return the plan with the parameters whose gradients are zero in places, and the bytes of all gradients and of their kept slices.

    Args:
        plan: The plan, complete.
        graph: The joint graph, before it is edited.
        sites: The sites of the graph.
        inputs: The inputs of Dynamo's graph.
    """
    kept = kept_channels(graph, sites, plan)
    shares: dict[int, dict[int, float]] = {}
    for k in kept:
        by_dim = shares.setdefault(k.input, {})
        by_dim[k.dim] = min(by_dim.get(k.dim, 1.0), k.kept / k.size)
    whole = {i: _torch.numel_of(v) * v.dtype.itemsize for i, n in _torch.gradient_outputs(graph).items() if inputs[i].parameter for v in [_torch.value(n)]}
    sent = sum(round(size * math.prod(shares.get(i, {}).values())) for i, size in whole.items())
    return replace(plan, kept=kept, gradient_bytes=sum(whole.values()), kept_bytes=sent)


def _coupled_gradients(name: str, sites: Sequence[Site], plans: Sequence[SitePlan]) -> Iterator[tuple[fx.Node, int]]:
    """The gradients of a site, and of those that share its indices, that are zero in the channels which it dropped, each with the dim of its channels."""
    for site, planned in zip(sites, plans, strict=True):
        if name not in (site.name, planned.products[0].shares):
            continue
        for p, d in zip(site.products, planned.products, strict=True):
            if d.decision == "coupled" and (result := _weight_channels(p, 0) if p.mask == 1 else p.result) is not None:
                yield result


def _gradients_of_output_channels(site: Site, planned: SitePlan, j: int) -> Iterator[tuple[fx.Node, int]]:
    """The gradients of weight and bias that product `j` of a site computes from output channels, each with the dim of these."""
    p, d = site.products[j], planned.products[j]
    if p.name == "grad_weight" and d.decision != "replaced":
        if p.mask < 0:
            yield p.node, 1 - p.position + _torch.value(p.node).dim() - 2
        elif (result := _weight_channels(p, 1)) is not None:
            yield result
    if p.mask >= 0:
        yield from ((n, 0) for n in users_of_output(p.node, 2))


def _weight_channels(p: Product, which: int) -> tuple[fx.Node, int] | None:
    """The gradient of a convolution's weight, and its dim of input channels (0) or of output channels (1)."""
    gradient = next(users_of_output(p.node, 1), None)
    return (gradient, conv_weight_axes(bool(p.node.args[7]), 1)[which].dim) if gradient is not None else None
