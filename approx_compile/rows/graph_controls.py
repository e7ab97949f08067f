"""Find the controls and draws of one compiled graph for the model that it runs for, because models of one class share compiled code."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from approx_compile import _torch
from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import RowSettings
from approx_compile.reasons import Reason
from approx_compile.rows.bare_names import Owner
from approx_compile.rows.controller import Draws, RowControl, StepFlops
from approx_compile.rows.ownership import GraphName, control_for, draws_for, note_fixed_share
from approx_compile.rows.variance_budget import VarianceBudget


class GraphControls:
    """Finds the controls and draws of one graph for the model that it is called for.

    They belong to the first parameter whose gradient the graph computes, or else to the module that was compiled.
    """

    kind: type[RowControl] = RowControl
    budget_kind: type[VarianceBudget] = VarianceBudget

    def __init__(
        self,
        config: ApproxConfig,
        root: nn.Module | None,
        name: GraphName,
        levels: Sequence[RowSettings],
        places: Mapping[int, str],
        work: StepFlops | Sequence[StepFlops],
        unmeasured: Reason | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        """Make the controls, draws and budget that hold where a call has no owner.

        Args:
            config: The user's configuration.
            root: The module that is compiled.
            name: The name of the graph.
            levels: The settings of level 1, 2, ...
            places: What each level decides about, in words.
            work: How many FLOPs each level decides about; one for all, or one for each.
            unmeasured: Why the variance of the whole gradient is not measured, if so.
            keys: What the names of the levels' controls end in; their numbers by default.
        """
        self.adaptive = config.adaptive
        self.keys = tuple(keys) if keys is not None else tuple(str(i) for i, _ in enumerate(levels, 1))
        self.places = dict(places)
        self.works = [work] * len(levels) if isinstance(work, StepFlops) else list(work)
        self.name = name
        self.root = weakref.ref(root) if root is not None else None
        self.ratios = [s.ratio for s in levels]
        self.unowned = [self.kind(config.adaptive, f"{name.key}{key}") for key in self.keys]
        self.unowned_draws = Draws(f"{name.key}draws")
        self.unowned_budget = self.budget_kind(config.adaptive, f"{name.key}variance")
        self.unmeasured = unmeasured

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

    def budget(self, owner: Owner | None) -> VarianceBudget | None:
        """Return the budget of this graph for an owner; None where no share is found during the run."""
        if None not in self.ratios:
            return None
        budget = control_for(owner, self.adaptive, self.name + "variance", self.budget_kind) if owner is not None else self.unowned_budget
        budget.declined = budget.declined or self.unmeasured
        return budget

    def of(self, owner: Owner | None) -> list[RowControl | None]:
        """Return the control of every level for an owner, with None for the levels whose ratio is fixed."""
        controls: list[RowControl | None] = []
        budget = self.budget(owner)
        if budget is not None:
            budget.apply_pending()  # before its excess is read, so that a run in which `state_dict` applies it earlier is the same
        for i, (ratio, unowned, key, work) in enumerate(zip(self.ratios, self.unowned, self.keys, self.works, strict=True), 1):
            if ratio is not None:
                if owner is not None:
                    note_fixed_share(owner, self.name + key, ratio, work)
                controls.append(None)
                continue
            control = control_for(owner, self.adaptive, self.name + key, self.kind) if owner is not None else unowned
            control.place, control.work, control.level = self.places.get(i, control.place), work, i
            control.excess = budget.excess if budget is not None else 1.0
            controls.append(control)
        return controls
