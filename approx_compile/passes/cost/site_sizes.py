"""Read from a site what the cost expressions need: the values of their symbols, the kind of its op and the role of each product."""

from __future__ import annotations

from typing import Any

import sympy

from approx_compile import _torch
from approx_compile.passes.cost.expressions import B, I, K, M, N, O, S, T, e
from approx_compile.passes.fx_utils import BMM, CONV
from approx_compile.passes.sites.conv_gradients import conv_groups
from approx_compile.passes.sites.site import Product, Site

Sizes = dict[sympy.Symbol, float]
"""The value of each symbol of `cost.expressions` that a product uses."""


def sizes_of(site: Site) -> Sizes:
    """Return the sizes of a site. Sizes that are symbolic in the graph have the value they were traced with."""
    return {symbol: float(_torch.hint(size)) if not isinstance(size, float) else size for symbol, size in _sizes(site).items()}


def _sizes(site: Site) -> dict[sympy.Symbol, Any]:
    output = site.products[0]
    a, b, y = (_torch.value(n) for n in (*output.operands, site.node))
    sizes: dict[sympy.Symbol, Any] = {e: site.dtype.itemsize, B: _torch.hint(output.lead)}
    if site.node.target not in CONV:
        m, inner, n = a.shape[-2], a.shape[-1], b.shape[-1]
        return sizes | {M: m, K: inner, N: n, T: 1, I: m, O: m, S: m}
    groups, samples = conv_groups(site.node), _torch.hint(a.shape[0])
    places = [samples * _numel(t.shape[2:]) for t in (a, y)]
    channels = [_torch.hint(t.shape[1]) // groups for t in (a, y)]
    return sizes | {
        M: places[0 if site.node.args[6] else 1],
        K: channels[0],
        N: channels[1],
        T: _numel(b.shape[2:]),
        I: places[0],
        O: places[1],
        S: samples,
    }


def _numel(shape: Any) -> int:
    return int(sympy.prod([_torch.hint(s) for s in shape]))


def kind_of(site: Site) -> str:
    """Return which rates a site's products have: "linear", "bmm" or "conv"."""
    return "conv" if site.node.target in CONV else "bmm" if site.node.target in BMM else "linear"


def role(product: Product) -> str:
    """Return which of Y = A B ("output"), dA = dY B^T ("grad_input") and dB = A^T dY ("grad_weight") a product is.

    The names are those that the gradients have where B is the weight, whichever operand is the weight of this site.
    """
    if product.name == "output":
        return "output"
    grad_of = product.mask if product.mask >= 0 else 1 - product.reads
    return ("grad_input", "grad_weight")[grad_of]


def contiguous_run(site: Site, product: Product, operand: int) -> int:
    """Return how many contiguous entries one index of a product's contraction axis has in an operand.

    On CPUs Inductor lays out the activations of convolutions channels-last, so one channel is then one entry.

    Args:
        site: The site of the product.
        product: The product.
        operand: 0 or 1.
    """
    value, axis = _torch.value(product.operands[operand]), product.axes[operand]
    if site.node.target in CONV and value.device.type == "cpu" and axis.dim != 0:
        return 1
    return max(1, _torch.hint(axis.view(value).stride(axis.dim))) if axis.split is None else 1
