"""How a graph is edited: pieces traced from readable torch are spliced in, outputs of a node with several are replaced, fake values refreshed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from approx_compile import _torch
from approx_compile.passes.sites import users_of_output


def output_of(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    with graph.inserting_after(call):
        item = graph.call_function(operator.getitem, (call, index))
    _torch.copy_provenance(call, item)
    item.meta["val"] = _torch.value(call)[index]
    return item


def replace_output(graph: fx.Graph, m: fx.Node, index: int, new: fx.Node) -> None:
    for user in list(users_of_output(m, index)):
        user.replace_all_uses_with(new)
        graph.erase_node(user)


def hoist(n: fx.Node, before: fx.Node) -> None:
    """Move a node, and what it is made of, in front of another."""
    if before < n:
        for i in n.all_input_nodes:
            hoist(i, before)
        before.prepend(n)


def refresh(node: fx.Node) -> None:
    """Recompute a node's fake value after its arguments changed."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[misc]
    with _torch.fake_mode_of(node):
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def inline(graph: fx.Graph, before: fx.Node, run: Callable[..., Any], args: Sequence[fx.Node | None], like: fx.Node | None = None) -> Any:
    """Trace `run` on the fake values of `args`, splice it in before `before`, return its results as nodes.

    The new nodes take tag, layer and checkpoint policy from `like` (by default `before`, whose operands they are).
    """
    values = [_torch.value(a) if a is not None else None for a in args]
    with _torch.fake_mode_of(*(a for a in args if a is not None)):
        traced = _torch.trace(run, values)
    new: dict[fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), args, strict=True))
    with graph.inserting_before(before):
        for n in traced.nodes:
            if n.op == "call_function":
                new[n] = graph.node_copy(n, lambda x: new[x])
                _torch.copy_provenance(like or before, new[n])
                if _torch.is_random(n) and _torch.is_backward(new[n]):
                    _torch.keep_in_backward(new[n])
    return fx.node.map_arg(traced.output_node().args[0], lambda n: new[n])
