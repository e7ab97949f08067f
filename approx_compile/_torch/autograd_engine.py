"""The autograd engine: which backward pass and which node of it is running, what lies below a node, and whether the graph is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def current_backward_id() -> int:
    """Return the number of the backward pass that the autograd engine is in; -1 outside of one, or where torch does not tell it."""
    number = getattr(torch._C, "_current_graph_task_id", None)
    return int(number()) if number is not None else -1


def graph_is_kept() -> bool:
    """Return whether the backward pass that is running keeps its graph (`retain_graph=True`), and with it the saved tensors; True where torch does not tell."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(kept()) if kept is not None else True


def current_backward_node() -> Any:
    """Return the node of the autograd graph whose backward function is running; None outside of one."""
    return torch._C._current_autograd_node()


def accumulated_leaves(node: Any) -> Iterator[torch.Tensor]:
    """Find the leaves whose gradients a node of the autograd graph returns directly.

    Args:
        node: The node.

    Yields:
        The leaves, in the order of the inputs of the node's forward function.
    """
    for below, _ in node.next_functions:
        if type(below).__name__ == "AccumulateGrad":
            yield below.variable


def function_of(node: Any) -> Any:
    """Return the `torch.autograd.Function` that made a node of the autograd graph; None for a node of torch's own ops."""
    return getattr(node, "_forward_cls", None)


def has_gradient_hook(value: torch.Tensor) -> bool:
    """Return whether the user has registered a hook on the gradient of a tensor."""
    return bool(value._backward_hooks)


def nodes_below(node: Any) -> Iterator[Any]:
    """Find the nodes that gradients reach after a node, without those that accumulate the gradients of leaves.

    Args:
        node: A node of the autograd graph.

    Yields:
        Every node once.
    """
    seen, pending = {node}, [node]
    while pending:
        for below, _ in pending.pop().next_functions:
            if below is not None and below not in seen and type(below).__name__ != "AccumulateGrad":
                seen.add(below)
                pending.append(below)
                yield below
