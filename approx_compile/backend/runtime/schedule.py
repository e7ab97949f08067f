"""Enumerate the settings of a run that change with its steps and phases: the distinct assignments of settings, and which of them holds when."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.selectors import ActivePeriod, LayerPattern, StepSlice

MAX_ASSIGNMENTS = 32
"""The largest number of assignments that one model may have, because each of them is compiled."""

_OP_NAMES = ("mm", "addmm", "bmm", "baddbmm", *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)))
"""The names of sites whose products come from no module's forward. Such sites are named by their op."""


@dataclass(frozen=True)
class Schedule:
    """The assignments of a config, and which of them holds when."""

    assignments: tuple[ApproxConfig, ...]
    """The distinct settings; the first holds at step 0 without a phase."""
    timed: tuple[ActivePeriod, ...]
    """The conditions of the rules that have steps or phases."""
    phases: tuple[str | None, ...]
    """None, for no phase, and every phase that a rule names."""
    index: dict[tuple[bool, ...], int]
    """The place in `assignments`, by which of the conditions in `timed` hold."""

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(config: ApproxConfig) -> Schedule:
        """Enumerate the assignments of a config.

        Args:
            config: The user's settings.

        Returns:
            The schedule, the same object for equal settings.

        Raises:
            ConfigError: If there are more than `MAX_ASSIGNMENTS` assignments, or the strides of the steps repeat only after more than 100,000 steps.
        """
        timed = tuple(r.when(config.total_steps) for r in config.all_rules() if r.timed)
        phases = (None, *dict.fromkeys(name for w in timed for name in w.phases or ()))
        assignments: list[ApproxConfig] = []
        index: dict[tuple[bool, ...], int] = {}
        for phase, step in itertools.product(phases, _representative_steps([w.steps for w in timed if w.steps is not None])):
            active = _active_rules(timed, step, phase)
            if active not in index:
                new = config.at(step, phase)
                if new not in assignments:
                    assignments.append(new)
                index[active] = assignments.index(new)
            if len(assignments) > MAX_ASSIGNMENTS:
                raise ConfigError(
                    f"rules: their steps and phases make more than {MAX_ASSIGNMENTS} different assignments, each of which would be compiled; "
                    "use fewer rules with steps, or strides that divide each other"
                )
        return Schedule(tuple(assignments), timed, phases, index)

    def at(self, step: int, phase: str | None) -> int:
        """Find the assignment that holds.

        Args:
            step: The number of completed optimizer steps.
            phase: One of `phases`.

        Returns:
            The assignment's place in `assignments`.
        """
        return self.index[_active_rules(self.timed, step, phase)]

    def relevant(self, names: Iterable[str]) -> tuple[tuple[ApproxConfig, ...], tuple[int, ...]]:
        """Reduce the assignments to those that differ for one graph, by leaving out rules that match none of its modules.

        Args:
            names: The names of the graph's modules.

        Returns:
            The distinct assignments, and the place among them of each of `assignments`.
        """
        if len(self.assignments) == 1:
            return self.assignments, (0,)
        known = list(names)
        distinct: list[ApproxConfig] = []
        places = []
        for assignment in self.assignments:
            reduced = assignment.model_copy(update={"rules": tuple(r for r in assignment.rules if any(_may_match(p, known) for p in r.patterns))})
            if reduced not in distinct:
                distinct.append(reduced)
            places.append(distinct.index(reduced))
        return tuple(distinct), tuple(places)


def _active_rules(timed: Sequence[ActivePeriod], step: int, phase: str | None) -> tuple[bool, ...]:
    return tuple(w.holds(step, phase) for w in timed)


def _representative_steps(slices: Sequence[StepSlice]) -> Iterable[int]:
    """Return steps that together show every combination of slices that ever holds. Between neighbouring ends of slices the combinations are periodic."""
    period = math.lcm(*(s.stride for s in slices)) if slices else 1
    ends = sorted({0, *(s.start for s in slices), *(s.stop for s in slices if s.stop is not None)})
    if period > 100_000:
        raise ConfigError(f"rules: the strides of their steps repeat only after {period} steps; use strides that divide each other")
    for begin, end in itertools.zip_longest(ends, ends[1:]):
        yield from range(begin, begin + period if end is None else min(end, begin + period))


def _may_match(pattern: LayerPattern, names: Sequence[str]) -> bool:
    """Tell whether a rule's pattern may match a site of a graph with modules of these names; True if the names alone cannot decide it."""
    return not pattern.is_name or "#" in pattern.text or pattern.regex is not None or pattern.matches_name(*names, *_OP_NAMES)
