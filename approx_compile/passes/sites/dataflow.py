"""What feeds the nodes of the forward pass, which module owns them, and what comes after them."""

from __future__ import annotations

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import PRODUCTS
from approx_compile.passes.sites.site import Context, Module

aten = torch.ops.aten


def nodes_after_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an output's gradient: backward ones even where a tag is missing (custom autograd functions)."""
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if (n.op == "placeholder" and _torch.is_backward(n)) or any(i in found for i in n.all_input_nodes):
            found.add(n)
    return found


def module_of(node: fx.Node, context: Context) -> Module:
    """The innermost module whose forward made the node."""
    for key in reversed(list(node.meta.get("nn_module_stack") or {})):
        found = context.modules.get(key.split("@")[0])
        if found is not None:
            return found
    return context.root


class Feeds:
    """Per forward node: whether it depends on anything but parameters, and which hazards and products reach it through no (other) product."""

    def __init__(self) -> None:
        self.hazards: dict[fx.Node, frozenset[str]] = {}
        self.products: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.names: dict[fx.Node, str] = {}
        self.from_data: set[fx.Node] = set()
        self.from_parameter: set[fx.Node] = set()

    def of(self, n: fx.Node) -> frozenset[str]:
        return self.hazards.get(n, frozenset())

    def is_weight(self, n: fx.Node) -> bool:
        return n in self.from_parameter and n not in self.from_data


def trace_feeds(graph: fx.Graph, context: Context) -> Feeds:
    feeds = Feeds()
    for n in graph.nodes:
        if _torch.is_backward(n):
            continue
        if n.op == "placeholder":
            index = _torch.input_index(n)
            known = context.inputs[index] if index is not None and index < len(context.inputs) else None
            if _torch.is_graph_module_state(n) or (known is not None and known.parameter):
                feeds.from_parameter.add(n)
            else:
                feeds.from_data.add(n)
                if known is not None and known.floating and not known.requires_grad:
                    feeds.hazards[n] = frozenset({"raw data"})
            continue
        sources = n.all_input_nodes
        if any(s in feeds.from_data for s in sources) or _torch.is_random(n):
            feeds.from_data.add(n)
        if any(s in feeds.from_parameter for s in sources):
            feeds.from_parameter.add(n)
        feeds.products[n] = (n,)
        if n.target not in PRODUCTS:
            feeds.products[n] = tuple(dict.fromkeys(p for s in sources for p in feeds.products.get(s, ())))
            hazards = frozenset().union(*(feeds.of(s) - dilutes_raw_input(s, n, feeds) for s in sources)) if sources else frozenset()
            if module_of(n, context).batch_norm:
                hazards |= {"BatchNorm"}
            feeds.hazards[n] = hazards
    return feeds


def dilutes_raw_input(source: fx.Node, n: fx.Node, feeds: Feeds) -> frozenset[str]:
    """Raw data that is only a mask, a bias or a scale beside an activation does not make the result raw."""
    others = any(feeds.products.get(s) for s in n.all_input_nodes if s is not source)
    if "raw data" not in feeds.of(source) or not others or n.target is aten.cat.default:
        return frozenset()
    tensors = isinstance(source.meta.get("val"), torch.Tensor) and isinstance(n.meta.get("val"), torch.Tensor)
    return frozenset({"raw data"}) if tensors and _torch.numel(source) < _torch.numel(n) else frozenset()


def last_products(nodes: list[fx.Node], forward: set[fx.Node]) -> set[fx.Node]:
    """Products with no further product behind them in the forward pass."""
    ahead: dict[fx.Node, bool] = {}
    for n in reversed(nodes):
        ahead[n] = any(u in forward or ahead.get(u, False) for u in n.users if not _torch.is_backward(u))
    return {n for n in forward if not ahead[n]}
