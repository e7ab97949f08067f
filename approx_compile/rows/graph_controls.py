"""Find the adaptive state of the model that a backward pass runs for, because models of one class share compiled code."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import RowSettings
from approx_compile.rows.controller import Draws, Owner, RowControl, control_for, draws_for


class GraphControls:
    """Finds the controls and draws of one graph for the model that it is called for.

    They belong to a parameter among the tensors that the forward pass saved, or else to the module that was compiled.
    """

    def __init__(self, config: ApproxConfig, root: nn.Module | None, key: str, levels: Sequence[RowSettings], places: Mapping[int, str]) -> None:
        """Make the controls and draws that hold where a call has no owner. `places` says in words what each level decides about."""
        self.adaptive = config.adaptive
        self.places = dict(places)
        self.key = key
        self.root = weakref.ref(root) if root is not None else None
        self.asked = [s.ratio is None for s in levels]
        self.unowned = [RowControl(config.adaptive, f"{key}{i}") for i, _ in enumerate(levels, 1)]
        self.unowned_draws = Draws(f"{key}draws")

    def owner(self, saved: Iterable[Any]) -> Owner | None:
        """Return the parameter or module that the controls of a backward pass belong to.

        Args:
            saved: The inputs of the backward pass; the first parameter among them is the owner.

        Returns:
            The owner; None if no parameter was saved and the compiled module is gone or was never known.
        """
        return next((v for v in saved if isinstance(v, nn.Parameter)), self.root() if self.root is not None else None)

    def draws(self, owner: Owner | None) -> Draws:
        """Return the random draws of this graph for an owner; without an owner those of this object."""
        return draws_for(owner, self.unowned_draws.name) if owner is not None else self.unowned_draws

    def of(self, owner: Owner | None) -> list[RowControl | None]:
        """Return the control of every level for an owner, with None for the levels whose ratio is fixed."""
        if not any(self.asked):
            return [None] * len(self.asked)
        if owner is None:
            return [c if a else None for a, c in zip(self.asked, self.unowned, strict=True)]
        controls = [control_for(owner, self.adaptive, f"{self.key}{i}", RowControl) if a else None for i, a in enumerate(self.asked, 1)]
        for i, control in enumerate(controls, 1):
            if control is not None and i in self.places:
                control.place = self.places[i]
        return controls
