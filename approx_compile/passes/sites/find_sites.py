"""Joint graph -> sites: every matmul and convolution of the forward pass with its gradient products, and what is legal to do with them.

A forward node and its gradients carry the same `seq_nr`; that alone is no proof (nodes without autograd reuse the last number), so a
gradient product counts only if it also reads one of the forward operands, through views, where the chain rule puts it. Nothing is edited here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import CONV, PRODUCTS
from approx_compile.passes.sites.conv_gradients import conv_groups, conv_products
from approx_compile.passes.sites.dataflow import Feeds, last_products, module_of, nodes_after_tangents, trace_feeds
from approx_compile.passes.sites.matmul_gradients import matmul_products
from approx_compile.passes.sites.site import NO_GRADIENT, Context, Module, Site

aten = torch.ops.aten


def find_sites(graph: fx.Graph, context: Context) -> list[Site]:
    """Every product of the forward pass in execution order; empty for a graph without a backward part."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    backward = [n for n in nodes if _torch.is_backward(n)]
    if not backward:
        return []
    after_tangents = nodes_after_tangents(graph)
    forward = [n for n in nodes if not _torch.is_backward(n) and n.target in PRODUCTS and n not in after_tangents]
    by_seq: dict[Any, list[fx.Node]] = defaultdict(list)
    for n in backward:
        by_seq[n.meta.get("seq_nr")].append(n)
    feeds = trace_feeds(graph, context)
    last = last_products(nodes, set(forward))
    seen: dict[str, int] = defaultdict(int)
    sites = []
    for n in forward:
        owner = module_of(n, context)
        base = owner.name or _op_name(n)
        seen[base] += 1
        name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        feeds.names[n] = name
        sites.append(_site(n, name, owner, by_seq[n.meta.get("seq_nr")], feeds, n in last, context))
    return sites


def without_product(graph: fx.Graph, sites: Sequence[Site], context: Context) -> list[str]:
    """The linear layers that train and have no site: of one row or one input Inductor writes some products as elementwise operations and sums."""
    if not _torch.has_backward(graph):
        return []
    owners = [module_of(n, context) for n in graph.nodes if n.op == "call_function" and not _torch.is_backward(n)]
    known = {s.module for s in sites}
    return list(dict.fromkeys(m.name for m in owners if m.linear and m.exact is None and m.name not in known))


def _site(n: fx.Node, name: str, owner: Module, backward_nodes: list[fx.Node], feeds: Feeds, last: bool, context: Context) -> Site:
    conv = n.target in CONV
    a, b = (n.args[0], n.args[1]) if conv else (n.args[-2], n.args[-1])
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    weight = 1 if conv or feeds.is_weight(b) else 0 if feeds.is_weight(a) else None
    describe = conv_products if conv else matmul_products
    products, blocked = describe(n, a, b, weight, backward_nodes)
    dtype = _torch.value(n).dtype
    if not dtype.is_floating_point:
        blocked = f"{str(dtype).removeprefix('torch.')} products are not sampled"
    elif context.exact or _torch.exact_mark(n):
        blocked = context.exact or _torch.exact_mark(n)
    elif owner.exact:
        blocked = owner.exact
    elif len(products) == 1 and blocked is None:
        blocked = NO_GRADIENT
    act = a if weight != 0 else b
    hazards = feeds.of(act) | (frozenset() if weight is not None else feeds.of(b))
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
        reads=tuple(dict.fromkeys(feeds.names[p] for o in (a, b) for p in feeds.products.get(o, ()))),
        last=last,
        blocked=blocked,
        symbolic=_shape(n, a, b, _torch.size_expr),
        traced=_traced(a, b),
    )


# --- matmuls ---


# --- convolutions ---


# --- what feeds a site, what comes after it ---


# --- shapes ---


def _op_name(n: fx.Node) -> str:
    if n.target not in CONV:
        return str(n.target).split(".")[1]
    rank = _torch.value(n).dim() - 2
    return f"conv_transpose{rank}d" if n.args[6] else f"conv{rank}d"


def _shape(n: fx.Node, a: fx.Node, b: fx.Node, shown: Callable[[Any], Any]) -> str:
    def by(sizes: Any) -> str:
        return "x".join(str(shown(s)) for s in sizes)

    va, vb = _torch.value(a), _torch.value(b)
    if n.target in CONV:
        groups = f" g{conv_groups(n)}" if n.args[8] != 1 else ""
        return by(va.shape) + " * " + by(vb.shape) + groups
    return by((*va.shape, vb.shape[-1]))


def _traced(*operands: fx.Node) -> tuple[tuple[str, int], ...]:
    sizes = [s for o in operands for s in _torch.value(o).shape if not _torch.size_expr(s).is_Integer]
    return tuple(dict.fromkeys((str(_torch.size_expr(s)), _torch.hint(s)) for s in sizes))


def _flops(n: fx.Node, a: fx.Node, b: fx.Node) -> int:
    """Of one product; all three of a site have the same (2 per multiply-add)."""
    va, vb, vy = _torch.value(a), _torch.value(b), _torch.value(n)
    if n.target not in CONV:
        return 2 * _prod(va.shape) * _torch.hint(vb.shape[-1])
    places = va if n.args[6] else vy  # a transposed convolution spreads every input place
    return 2 * _torch.hint(va.shape[0]) * _prod(places.shape[2:]) * _prod(vb.shape) if vb.numel() else 0


def _prod(sizes: Any) -> int:
    return math.prod(_torch.hint(s) for s in sizes)
