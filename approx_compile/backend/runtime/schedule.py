"""Settings that change during a run: which step a model is at, and which assignment of settings holds there.

A step is a completed step of the `torch.optim` optimizer that owns the parameters, counted by torch's own hook on all optimizers. Every assignment of a graph
is compiled when the graph is; from then on `Dispatch` picks one at each call, so that a switch costs a few dictionary lookups and never recompiles.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile import _torch
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.selectors import Pattern, Steps, When
from approx_compile.utils import warn_once

MOST = 32
"""Assignments of one model; each is compiled."""

PATIENCE = 200
"""Training calls without an optimizer's step after which the user hears that nobody counts."""


# --- the clock ---


@dataclass(eq=False)
class Clock:
    """Completed optimizer steps of the parameters that share it, and the phase they are in. `owned`: an optimizer steps them; `by`: its id."""

    step: int = 0
    phase: str | None = None
    owned: bool = False
    by: int | None = None


_clocks = WeakIdKeyDictionary()
"""Parameter -> clock."""
_counted: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int, list[Clock]]] = weakref.WeakKeyDictionary()
_version = [0]


@functools.cache
def count_steps() -> None:
    """From now on every step of every optimizer is counted."""
    register_optimizer_step_pre_hook(_begin)
    register_optimizer_step_post_hook(_stepped)


@_torch.not_traced
def _begin(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Find the clocks of an optimizer's parameters. One that steps them from inside another's step takes them over, so the step counts once."""
    parameters = sum(len(g["params"]) for g in optimizer.param_groups)
    known = _counted.get(optimizer)
    if known is None or known[:2] != (_version[0], parameters):
        clocks = _shared((p for g in optimizer.param_groups for p in g["params"]), id(optimizer))
        _counted[optimizer] = (_version[0], parameters, clocks)


@_torch.not_traced
def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for clock in _counted[optimizer][2] if optimizer in _counted else ():
        clock.step += 1


def _shared(parameters: Iterable[Tensor], by: int) -> list[Clock]:
    """One clock for all parameters of an optimizer that are at the same step of the same phase. Whoever counted them before has to look again."""
    found: dict[tuple[int, str | None], Clock] = {}
    for p in parameters:
        old = _clocks.get(p) or Clock()
        if old.by not in (None, by):
            _version[0] += 1
        _clocks[p] = found.setdefault((old.step, old.phase), Clock(old.step, old.phase, True, by))
    return list(found.values())


def _set(parameters: Iterable[Tensor], step: int | None, phase: tuple[str | None] | None) -> None:
    """Give parameters clocks of their own; the optimizer's next step joins those that are equal."""
    for p in parameters:
        old = _clocks.get(p) or Clock()
        _clocks[p] = Clock(old.step if step is None else step, old.phase if phase is None else phase[0], old.owned)
    _version[0] += 1


def set_step(model: nn.Module, step: int) -> None:
    """Say that `step` optimizer steps of a model are done: for whoever resumes without `load_state_dict`, or trains with no `torch.optim` optimizer."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"set_step: got {step!r}; the number of completed optimizer steps is expected, 0 or more")
    _set(_module(model, "set_step").parameters(), step, None)


def set_phase(model: nn.Module, name: str | None) -> None:
    """Set the phase that rules with `phase` ask for; None: no phase. Holds from the model's next forward pass on."""
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"set_phase: got {name!r}; the name of a phase, as in a rule's 'phase', or None is expected")
    _set(_module(model, "set_phase").parameters(), None, (name,))


def _module(model: nn.Module, what: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: got {type(model).__name__}; the model (a torch.nn.Module, compiled or not) is expected")
    return model


def clock_of(parameters: Iterable[Any]) -> Clock | None:
    """The clock of the first of these that an optimizer steps, or else of the first that has one (frozen, or set by hand)."""
    found: Clock | None = None
    for p in parameters:
        clock: Clock | None = _clocks.get(p)
        if clock is not None and (clock.owned or not _counted):  # as long as no optimizer has made a step there is none to look for
            return clock
        found = found or clock
    return found


def clocks_state(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """[{step, phase, parameters}] for the parameters that are counted."""
    groups: dict[tuple[int, str | None], list[str]] = {}
    for name, p in named.items():
        if (clock := _clocks.get(p)) is not None:
            groups.setdefault((clock.step, clock.phase), []).append(name)
    return [{"step": step, "phase": phase, "parameters": names} for (step, phase), names in groups.items()]


def load_clocks(named: dict[str, nn.Parameter], state: Sequence[dict[str, Any]]) -> None:
    for group in state:
        _set([named[n] for n in group["parameters"]], int(group["step"]), (group["phase"],))


# --- assignments ---


@dataclass(frozen=True)
class Schedule:
    """The assignments of a config: what holds when. `assignments[0]` holds at the start."""

    assignments: tuple[ApproxConfig, ...]
    timed: tuple[When, ...]
    """Of the rules that have steps or phases."""
    phases: tuple[str | None, ...]
    """No phase, and every name that a rule asks for."""
    index: dict[tuple[bool, ...], int]
    """The assignment, by which of the timed rules hold."""

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(config: ApproxConfig) -> Schedule:
        """Raises ConfigError if there are more than `MOST` assignments."""
        timed = tuple(r.when(config.total_steps) for r in config.all_rules() if r.timed)
        phases = (None, *dict.fromkeys(name for w in timed for name in w.phases or ()))
        assignments: list[ApproxConfig] = []
        index: dict[tuple[bool, ...], int] = {}
        for phase, step in itertools.product(phases, _moments([w.steps for w in timed if w.steps is not None])):
            held = _held(timed, step, phase)
            if held not in index:
                new = config.at(step, phase)
                if new not in assignments:
                    assignments.append(new)
                index[held] = assignments.index(new)
            if len(assignments) > MOST:
                raise ConfigError(
                    f"rules: their steps and phases make more than {MOST} different assignments, each of which would be compiled; "
                    "use fewer rules with steps, or strides that divide each other"
                )
        return Schedule(tuple(assignments), timed, phases, index)

    def at(self, step: int, phase: str | None) -> int:
        """The number of the assignment that holds."""
        return self.index[_held(self.timed, step, phase)]

    def relevant(self, names: Iterable[str]) -> tuple[tuple[ApproxConfig, ...], tuple[int, ...]]:
        """The assignments that differ for a graph with modules of these names; and for every assignment which of them it is."""
        if len(self.assignments) == 1:
            return self.assignments, (0,)
        known = list(names)
        distinct: list[ApproxConfig] = []
        which = []
        for assignment in self.assignments:
            mine = assignment.model_copy(update={"rules": tuple(r for r in assignment.rules if any(_may_match(t, known) for t in r.layers))})
            if mine not in distinct:
                distinct.append(mine)
            which.append(distinct.index(mine))
        return tuple(distinct), tuple(which)


def _held(timed: Sequence[When], step: int, phase: str | None) -> tuple[bool, ...]:
    return tuple(w.holds(step, phase) for w in timed)


def _moments(slices: Sequence[Steps]) -> Iterable[int]:
    """Steps at which every combination of slices that ever holds is met: between two ends of slices all is periodic."""
    period = math.lcm(*(s.stride for s in slices)) if slices else 1
    ends = sorted({0, *(s.start for s in slices), *(s.stop for s in slices if s.stop is not None)})
    if period > 100_000:
        raise ConfigError(f"rules: the strides of their steps repeat only after {period} steps; use strides that divide each other")
    for begin, end in itertools.zip_longest(ends, ends[1:]):
        yield from range(begin, begin + period if end is None else min(end, begin + period))


def _may_match(text: str, names: Sequence[str]) -> bool:
    pattern = Pattern.parse(text)
    return not pattern.is_name or "#" in text or pattern.regex is not None or pattern.matches_name(*names, *_OP_NAMES)


_OP_NAMES = ("mm", "addmm", "bmm", "baddbmm", *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)))
"""Sites of products that no module's forward made are named by their op."""


# --- dispatch ---


class Dispatch:
    """The compiled assignments of one graph as one function: each call runs the one that holds at the clock of the graph's parameters.

    `which`: for every assignment of the schedule the compiled one; `parameters`: their places among the arguments; `name`: the model's, for notices.
    """

    def __init__(self, schedule: Schedule, compiled: Sequence[Callable[..., Any]], which: Sequence[int], parameters: Sequence[int], name: str) -> None:
        self.schedule = schedule
        self.compiled = tuple(compiled)
        self.which = tuple(which)
        self.parameters = tuple(parameters)
        self.name = name
        self._uncounted = 0

    def __call__(self, *args: Any) -> Any:
        clock = clock_of(args[i] for i in self.parameters)
        if clock is None:
            self._complain()
            clock = Clock()
        if clock.phase not in self.schedule.phases:
            self._unknown(clock.phase)
            clock = Clock(clock.step)
        return self.compiled[self.which[self.schedule.at(clock.step, clock.phase)]](*args)

    def _complain(self) -> None:
        self._uncounted += 1
        if self._uncounted == PATIENCE:
            warn_once(
                f"approx: {PATIENCE} training calls of {self.name} and no step of a torch.optim optimizer over its parameters: the settings of step 0 go on "
                "holding; count with approx_compile.set_step(model, step)"
            )

    def _unknown(self, phase: str | None) -> None:
        known = ", ".join(repr(p) for p in self.schedule.phases[1:])
        warn_once(f"approx: phase {phase!r} is set for {self.name}, which no rule asks for; " + (f"rules name {known}" if known else "no rule names one"))
