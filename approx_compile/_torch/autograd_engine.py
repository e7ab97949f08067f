"""The autograd engine: which backward pass is running, and whether its graph is kept."""

from __future__ import annotations

import torch


def current_backward_id() -> int:
    """The number of the backward pass that the autograd engine is in, -1 outside of one or where torch does not tell."""
    number = getattr(torch._C, "_current_graph_task_id", None)
    return int(number()) if number is not None else -1


def graph_is_kept() -> bool:
    """Whether the user keeps the graph of the backward pass that the autograd engine is in, and with it what the forward pass saved."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(kept()) if kept is not None else True
