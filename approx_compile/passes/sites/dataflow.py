"""Follow the data through the forward pass: what feeds a node, which module owns it, and whether other products come after it."""

from __future__ import annotations

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import PRODUCTS
from approx_compile.passes.sites.site import Context, Module

aten = torch.ops.aten

RAW_DATA = "raw data"
"""The hazard of a product whose activation is made from an input of the model without another product in between."""
BATCH_NORM = "BatchNorm"
"""The hazard of a product whose activation comes from a BatchNorm without another product in between."""


def nodes_after_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on an output's gradient.

    These are the nodes of the backward pass, even where they lack its tag (custom autograd functions).
    """
    after: set[fx.Node] = set()
    for n in graph.nodes:
        if (n.op == "placeholder" and _torch.is_backward(n)) or any(i in after for i in n.all_input_nodes):
            after.add(n)
    return after


def module_of(node: fx.Node, context: Context) -> Module:
    """Return the innermost known module whose forward made a node, or the compiled module itself."""
    for key in reversed(list(node.meta.get("nn_module_stack") or {})):
        module = context.modules.get(key.split("@")[0])
        if module is not None:
            return module
    return context.root


class ForwardSources:
    """What reaches each node of the forward pass.

    Attributes:
        hazards: By node: the hazards that reach it with no product in between.
        products: By node: the products that reach it with no other product in between; a product is its own.
        names: By product: the name of its site, once it has one.
        from_data: The nodes that depend on anything other than parameters.
        from_parameter: The nodes that depend on a parameter.
    """

    def __init__(self) -> None:
        """Start with no nodes; `trace_forward_sources` fills them in."""
        self.hazards: dict[fx.Node, frozenset[str]] = {}
        self.products: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.names: dict[fx.Node, str] = {}
        self.from_data: set[fx.Node] = set()
        self.from_parameter: set[fx.Node] = set()

    def hazards_of(self, n: fx.Node) -> frozenset[str]:
        """Return the hazards that reach a node."""
        return self.hazards.get(n, frozenset())

    def is_weight(self, n: fx.Node) -> bool:
        """Return whether a node depends on parameters alone."""
        return n in self.from_parameter and n not in self.from_data


def trace_forward_sources(graph: fx.Graph, context: Context) -> ForwardSources:
    """Follow parameters, data, hazards and products through the forward pass.

    Args:
        graph: The joint graph.
        context: What the backend knows of the graph.
    """
    sources = ForwardSources()
    for n in graph.nodes:
        if _torch.is_backward(n):
            continue
        if n.op == "placeholder":
            _add_placeholder(n, context, sources)
            continue
        inputs = n.all_input_nodes
        if any(i in sources.from_data for i in inputs) or _torch.is_random(n):
            sources.from_data.add(n)
        if any(i in sources.from_parameter for i in inputs):
            sources.from_parameter.add(n)
        sources.products[n] = (n,)
        if n.target not in PRODUCTS:
            sources.products[n] = tuple(dict.fromkeys(p for i in inputs for p in sources.products.get(i, ())))
            hazards = frozenset[str]().union(*(sources.hazards_of(i) - _diluted_hazards(i, n, sources) for i in inputs))
            if module_of(n, context).batch_norm:
                hazards |= {BATCH_NORM}
            sources.hazards[n] = hazards
    return sources


def _add_placeholder(n: fx.Node, context: Context, sources: ForwardSources) -> None:
    index = _torch.input_index(n)
    known = context.inputs[index] if index is not None and index < len(context.inputs) else None
    if _torch.is_graph_module_state(n) or (known is not None and known.parameter):
        sources.from_parameter.add(n)
        return
    sources.from_data.add(n)
    if known is not None and known.floating and not known.requires_grad:
        sources.hazards[n] = frozenset({RAW_DATA})


def _diluted_hazards(source: fx.Node, n: fx.Node, sources: ForwardSources) -> frozenset[str]:
    """The hazards of an input that its reader `n` does not inherit."""
    return frozenset({RAW_DATA}) if dilutes_raw_input(source, n, sources) else frozenset()


def dilutes_raw_input(source: fx.Node, n: fx.Node, sources: ForwardSources) -> bool:
    """Return whether raw data is only a mask, a bias or a scale beside an activation, so that the result does not count as raw.

    Args:
        source: The input of `n` in question.
        n: The node that combines it with others.
        sources: What reaches the inputs of `n`.
    """
    beside_activation = any(sources.products.get(i) for i in n.all_input_nodes if i is not source)
    if RAW_DATA not in sources.hazards_of(source) or not beside_activation or n.target is aten.cat.default:
        return False
    tensors = isinstance(source.meta.get("val"), torch.Tensor) and isinstance(n.meta.get("val"), torch.Tensor)
    return tensors and _torch.numel(source) < _torch.numel(n)


def last_products(nodes: list[fx.Node], forward: set[fx.Node]) -> set[fx.Node]:
    """Return the products that no other product of the forward pass depends on.

    Args:
        nodes: All called nodes, in execution order.
        forward: The products of the forward pass.
    """
    product_follows: dict[fx.Node, bool] = {}
    for n in reversed(nodes):
        product_follows[n] = any(u in forward or product_follows.get(u, False) for u in n.users if not _torch.is_backward(u))
    return {n for n in forward if not product_follows[n]}
