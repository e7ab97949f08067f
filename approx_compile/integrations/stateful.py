"""The state of a model's approximation as an object with `state_dict` and `load_state_dict`, which checkpoint functions of several libraries take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from approx_compile.backend.runtime.state import load_state_dict, state_dict
from approx_compile.rows.step_counter import require_module


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
        """Return what `approx_compile.state_dict` returns for the model."""
        return state_dict(self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state, as `approx_compile.load_state_dict` does."""
        load_state_dict(self.model, state)
