"""Find the controls and draws of one compiled graph for the model that it runs for, because models of one class share compiled code."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from approx_compile import _torch
from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import RowSettings
from approx_compile.rows.bare_names import Owner
from approx_compile.rows.controller import Draws, RowControl, StepFlops
from approx_compile.rows.ownership import GraphName, control_for, draws_for, note_fixed_share


class GraphControls:
    """Finds the controls and draws of one graph for the model that it is called for.

    They belong to the first parameter whose gradient the graph computes, or else to the module that was compiled.
    """

    kind: type[RowControl] = RowControl

    def __init__(
        self, config: ApproxConfig, root: nn.Module | None, name: GraphName, levels: Sequence[RowSettings], places: Mapping[int, str], work: StepFlops
    ) -> None:
        """Make the controls and draws that hold where a call has no owner. `places` says in words what each level decides about, `work` how many FLOPs."""
        self.adaptive = config.adaptive
        self.places = dict(places)
        self.work = work
        self.name = name
        self.root = weakref.ref(root) if root is not None else None
        self.ratios = [s.ratio for s in levels]
        self.unowned = [self.kind(config.adaptive, f"{name.key}{i}") for i, _ in enumerate(levels, 1)]
        self.unowned_draws = Draws(f"{name.key}draws")

    def owner(self, saved: Iterable[Any]) -> Owner | None:
        """Return the parameter or module that the controls of a backward pass belong to.

        Args:
            saved: The inputs of the backward pass.

        Returns:
            The first parameter whose gradient the running backward function returns. If none is known, as in compiled autograd, it is the first parameter
            that was saved, else the compiled module; None if that is gone or was never known.
        """
        node = _torch.current_backward_node()
        leaves = _torch.accumulated_leaves(node) if node is not None else ()
        return next((v for v in (*leaves, *saved) if isinstance(v, nn.Parameter)), self.root() if self.root is not None else None)

    def draws(self, owner: Owner | None) -> Draws:
        """Return the random draws of this graph for an owner; without an owner those of this object."""
        return draws_for(owner, self.name + "draws") if owner is not None else self.unowned_draws

    def of(self, owner: Owner | None) -> list[RowControl | None]:
        """Return the control of every level for an owner, with None for the levels whose ratio is fixed."""
        if owner is None:
            return [c if ratio is None else None for ratio, c in zip(self.ratios, self.unowned, strict=True)]
        controls: list[RowControl | None] = []
        for i, ratio in enumerate(self.ratios, 1):
            if ratio is not None:
                note_fixed_share(owner, self.name + str(i), ratio, self.work)
                controls.append(None)
                continue
            control = control_for(owner, self.adaptive, self.name + str(i), self.kind)
            control.place, control.work = self.places.get(i, control.place), self.work
            controls.append(control)
        return controls
