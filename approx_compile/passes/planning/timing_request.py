"""Build the request to time a site by itself, exact and with each of its candidates, for `machine.site_timings`."""

from __future__ import annotations

from typing import Any

import torch

from approx_compile import _torch
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.machine.site_timings import OperandLayout, TimedProduct, TimingRequest
from approx_compile.passes.cost.site_sizes import role
from approx_compile.passes.fx_utils import BMM, CONV
from approx_compile.passes.planning.plan import Candidates, ProductPlan
from approx_compile.passes.sites.site import Site


def timing_request(site: Site, candidates: Candidates, huge_pages: bool) -> TimingRequest:
    """Describe a site and its candidates so that another process can time them.

    Args:
        site: The site; symbolic sizes count as they were traced.
        candidates: The ways to sample it.
        huge_pages: The user's setting of that name.

    Returns:
        The product with its sizes, strides and dtype, and each candidate as options of the backend.
    """
    node = site.node
    conv = node.target in CONV
    roles = {role(p) for p in site.products}
    operands = [_torch.value(n) for n in site.products[0].operands]
    product = TimedProduct(
        op="convolution" if conv else "bmm" if node.target in BMM else "mm",
        layouts=(_layout(operands[0], conv), _layout(operands[1], False)),
        dtype=str(site.dtype).removeprefix("torch."),
        device=operands[0].device.type,
        weight=site.products[0].weight,
        needs_grad=("grad_input" in roles, "grad_weight" in roles),
        rest=tuple(tuple(a) if isinstance(a, (list, tuple)) else a for a in node.args[3:9]) if conv else (),
    )
    return TimingRequest(product, tuple(_options(t) for t in candidates), huge_pages)


def _layout(value: Any, conv: bool) -> OperandLayout:
    """Shape and strides of an operand. Those of 2-D convolutions are channels-last on CPUs, as Inductor lays them out."""
    shape = tuple(_torch.hint(s) for s in value.shape)
    if conv and value.device.type == "cpu" and len(shape) == 4:
        return shape, torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()
    return shape, tuple(_torch.hint(s) for s in value.stride())


def _options(products: tuple[ProductPlan, ...]) -> dict[str, Any]:
    """The options under which the backend carries out this candidate in a model of one site. Both gradients of a product of two activations share settings."""
    lowering = next((p.lowering for p in products if p.lowering in CUSTOM_KERNELS), "inductor")
    options: dict[str, Any] = {"policy": "always", "sampling": "forward", "lowering": lowering}
    for p in products:
        if p.how is not None and p.decision == "sampled":
            table = {"method": p.method, "ratio": p.how.expected / p.size, "min_k": 1, "group": p.how.group}
            options.setdefault(p.name.split("#")[0], table)
        elif p.decision == "exact":
            options.setdefault(p.name.split("#")[0], "exact")
    return options
