"""Run, at each call of a compiled graph, the assignment of settings that holds at the current step and phase.

All assignments are compiled together with the graph. A switch between them therefore costs only a few dictionary lookups and never recompiles.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from approx_compile import _torch
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.rows.step_counter import StepCount, step_count_of
from approx_compile.utils import warn_once

UNCOUNTED_CALLS = 200
"""The number of training calls without an optimizer's step after which the user is warned that no steps are counted."""


class Dispatch:
    """The compiled assignments of one graph as one function: each call runs the one that holds at the step of the graph's parameters.

    Args:
        schedule: The schedule.
        compiled: The compiled assignments. Assignments that are equal for this graph are in it only once.
        index: The place in `compiled` of every assignment of the schedule.
        parameters: The places of the graph's parameters among its arguments.
        name: The model's name, for warnings.
        root: The module that was compiled. If FSDP2 shards it, the steps of its sharded parameters count.
    """

    def __init__(
        self,
        schedule: Schedule,
        compiled: Sequence[Callable[..., Any]],
        index: Sequence[int],
        parameters: Sequence[int],
        name: str,
        root: nn.Module | None = None,
    ) -> None:
        self.schedule = schedule
        self.compiled = tuple(compiled)
        self.index = tuple(index)
        self.parameters = tuple(parameters)
        self.name = name
        self._root = weakref.ref(root) if root is not None and _torch.is_sharded(root) else None
        self._uncounted_calls = 0

    def __call__(self, *args: Any) -> Any:
        """Run the assignment that holds now."""
        root = self._root() if self._root is not None else None
        count = step_count_of(_torch.sharded_parameters(root) if root is not None else (args[i] for i in self.parameters))
        if count is None:
            self._note_uncounted_call()
            count = StepCount()
        if count.phase not in self.schedule.phases:
            self._warn_of_unknown_phase(count.phase)
            count = StepCount(count.step)
        return self.compiled[self.index[self.schedule.at(count.step, count.phase)]](*args)

    def _note_uncounted_call(self) -> None:
        self._uncounted_calls += 1
        if self._uncounted_calls == UNCOUNTED_CALLS:
            warn_once(
                f"approx: {UNCOUNTED_CALLS} training calls of {self.name} and no step of a torch.optim optimizer over its parameters: the settings of step 0 "
                "go on holding; count with approx_compile.set_step(model, step)"
            )

    def _warn_of_unknown_phase(self, phase: str | None) -> None:
        known = ", ".join(repr(p) for p in self.schedule.phases[1:])
        warn_once(f"approx: phase {phase!r} is set for {self.name}, which no rule asks for; " + (f"rules name {known}" if known else "no rule names one"))
