"""Find the sites of a joint graph: every matmul and convolution of the forward pass with its gradient products, and why it must stay exact, if it must.

A forward node and its gradients carry the same `seq_nr`. That alone proves nothing, because nodes without autograd reuse the last number. A product
counts as a gradient only if it also reads one of the forward operands, through permutations, in the orientation that the chain rule asks for.
Nothing is edited here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import CONV, PRODUCTS
from approx_compile.passes.sites.conv_gradients import conv_groups, conv_products
from approx_compile.passes.sites.dataflow import ForwardSources, last_products, module_of, nodes_after_tangents, trace_forward_sources
from approx_compile.passes.sites.matmul_gradients import matmul_products
from approx_compile.passes.sites.site import Context, Module, Site
from approx_compile.reasons.products import DTYPE, NO_GRADIENT


def find_sites(graph: fx.Graph, context: Context) -> list[Site]:
    """Find the sites of a joint graph.

    Args:
        graph: The joint graph.
        context: What the backend knows of the graph.

    Returns:
        The sites in execution order; none for a graph without a backward part.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    backward = [n for n in nodes if _torch.is_backward(n)]
    if not backward:
        return []
    after_tangents = nodes_after_tangents(graph)
    forward = [n for n in nodes if not _torch.is_backward(n) and n.target in PRODUCTS and n not in after_tangents]
    by_seq_nr: dict[Any, list[fx.Node]] = defaultdict(list)
    for n in backward:
        by_seq_nr[n.meta.get("seq_nr")].append(n)
    sources = trace_forward_sources(graph, context)
    last = last_products(nodes, set(forward))
    times_seen: dict[str, int] = defaultdict(int)
    sites = []
    for n in forward:
        owner = module_of(n, context)
        base = owner.name or _op_name(n)
        times_seen[base] += 1
        name = base if times_seen[base] == 1 else f"{base}#{times_seen[base]}"
        sources.names[n] = name
        sites.append(_make_site(n, name, owner, by_seq_nr[n.meta.get("seq_nr")], sources, n in last, context))
    return sites


def linear_layers_without_site(graph: fx.Graph, sites: Sequence[Site], context: Context) -> list[str]:
    """Return the names of the linear layers that train but have no site.

    For layers with one row or one input, Inductor writes some products as elementwise operations and sums.

    Args:
        graph: The joint graph.
        sites: Its sites.
        context: What the backend knows of the graph.
    """
    if not _torch.has_backward(graph):
        return []
    owners = [module_of(n, context) for n in graph.nodes if n.op == "call_function" and not _torch.is_backward(n)]
    known = {s.module for s in sites}
    return list(dict.fromkeys(m.name for m in owners if m.linear and m.exact is None and m.name not in known))


def _make_site(n: fx.Node, name: str, owner: Module, backward_nodes: list[fx.Node], sources: ForwardSources, last: bool, context: Context) -> Site:
    """Describe one product of the forward pass; `backward_nodes` are those with its sequence number."""
    conv = n.target in CONV
    a, b = (n.args[0], n.args[1]) if conv else (n.args[-2], n.args[-1])
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    weight = 1 if conv or sources.is_weight(b) else 0 if sources.is_weight(a) else None
    products_of = conv_products if conv else matmul_products
    products, blocked = products_of(n, a, b, weight, backward_nodes)
    dtype = _torch.value(n).dtype
    if not dtype.is_floating_point:
        blocked = DTYPE(dtype=str(dtype).removeprefix("torch."))
    elif context.exact or _torch.exact_mark(n):
        blocked = context.exact or _torch.exact_mark(n)
    elif owner.exact:
        blocked = owner.exact
    elif len(products) == 1 and blocked is None:
        blocked = NO_GRADIENT()
    activation = a if weight != 0 else b
    hazards = sources.hazards_of(activation) | (frozenset() if weight is not None else sources.hazards_of(b))
    if last and context.last_module is not None:
        last = owner.name == context.last_module
    return Site(
        name=name,
        module=owner.name,
        kind="conv" if conv else "linear" if weight is not None else "matmul",
        op=_op_name(n),
        node=n,
        shape=_shape(n, a, b, _torch.hint),
        dtype=dtype,
        products=tuple(products),
        flops=_flops(n, a, b),
        hazards=hazards,
        reads=tuple(dict.fromkeys(sources.names[p] for o in (a, b) for p in sources.products.get(o, ()))),
        last=last,
        blocked=blocked,
        symbolic=_shape(n, a, b, _torch.size_expr),
        traced=_traced_sizes(a, b),
    )


def _op_name(n: fx.Node) -> str:
    if n.target not in CONV:
        return str(n.target).split(".")[1]
    rank = _torch.value(n).dim() - 2
    return f"conv_transpose{rank}d" if n.args[6] else f"conv{rank}d"


def _shape(n: fx.Node, a: fx.Node, b: fx.Node, show_size: Callable[[Any], Any]) -> str:
    """The sizes in words: "MxKxN", or "input * weight" for a convolution."""

    def join(sizes: Any) -> str:
        return "x".join(str(show_size(s)) for s in sizes)

    value_a, value_b = _torch.value(a), _torch.value(b)
    if n.target in CONV:
        groups = f" g{conv_groups(n)}" if n.args[8] != 1 else ""
        return join(value_a.shape) + " * " + join(value_b.shape) + groups
    return join((*value_a.shape, value_b.shape[-1]))


def _traced_sizes(*operands: fx.Node) -> tuple[tuple[str, int], ...]:
    """The symbolic sizes of the operands, each with the number that it was traced with."""
    sizes = [s for o in operands for s in _torch.value(o).shape if not _torch.size_expr(s).is_Integer]
    return tuple(dict.fromkeys((str(_torch.size_expr(s)), _torch.hint(s)) for s in sizes))


def _flops(n: fx.Node, a: fx.Node, b: fx.Node) -> int:
    """The FLOPs of one product, 2 per multiply-add; all products of a site have the same number."""
    value_a, value_b, value_y = _torch.value(a), _torch.value(b), _torch.value(n)
    if n.target not in CONV:
        return 2 * _product_of(value_a.shape) * _torch.hint(value_b.shape[-1])
    places = value_a if n.args[6] else value_y  # a transposed convolution multiplies every place of the input by the kernel
    return 2 * _torch.hint(value_a.shape[0]) * _product_of(places.shape[2:]) * _product_of(value_b.shape) if value_b.numel() else 0


def _product_of(sizes: Any) -> int:
    return math.prod(_torch.hint(s) for s in sizes)
