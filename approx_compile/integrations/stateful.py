"""The state of a model's approximation as checkpoint functions of several libraries take it: of all ranks, and as an object with `state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from approx_compile.backend.runtime.state import load_state_dict, state_dict
from approx_compile.rows.step_counter import require_module


def state_of_ranks(model: nn.Module) -> dict[str, Any]:
    """Collect the states of the model on all ranks. Every rank of the process group must call this.

    Args:
        model: The model, compiled or not, wrapped or not.

    Returns:
        What `approx_compile.state_dict` returns, if there is one rank or the states of all ranks are equal; else `{"ranks": [that of rank 0, ...]}`.
    """
    own = state_dict(model)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return {"ranks": states} if any(s != own for s in states) else own


def load_state_of_ranks(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore the state of this rank. If the number of ranks is another than it was, every rank takes up the state of rank 0.

    Args:
        model: The model, compiled or not, wrapped or not.
        state: What `state_of_ranks` or `approx_compile.state_dict` returned.
    """
    if "ranks" in state:
        states = state["ranks"]
        known = dist.is_available() and dist.is_initialized() and dist.get_world_size() == len(states)
        state = states[dist.get_rank() if known else 0]
    load_state_dict(model, state)


class ApproxState:
    """What a checkpoint must hold of a model that is trained with this backend, for `accelerator.register_for_checkpointing`, `fabric.save` and the like.

    Args:
        model: The model, compiled or not, wrapped or not.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import torch
        >>> from approx_compile.integrations.stateful import ApproxState
        >>> state = ApproxState(torch.nn.Linear(64, 64))  # accelerator.register_for_checkpointing(state)
        >>> state.load_state_dict(state.state_dict())
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = require_module(model, "ApproxState")

    def state_dict(self) -> dict[str, Any]:
        """Return what `approx_compile.state_dict` returns for the model, on all ranks. In a process group every rank must call this."""
        return state_of_ranks(self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of this rank. If the number of ranks has changed, every rank takes up the state of rank 0."""
        load_state_of_ranks(self.model, state)
