"""The autograd engine: which backward pass is running, and whether its graph is kept."""

from __future__ import annotations

import torch


def current_backward_id() -> int:
    """Return the number of the backward pass that the autograd engine is in; -1 outside of one, or where torch does not tell it."""
    number = getattr(torch._C, "_current_graph_task_id", None)
    return int(number()) if number is not None else -1


def graph_is_kept() -> bool:
    """Return whether the backward pass that is running keeps its graph (`retain_graph=True`), and with it the saved tensors; True where torch does not tell."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(kept()) if kept is not None else True
