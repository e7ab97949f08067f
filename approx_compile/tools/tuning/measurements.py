"""What `tune` measures, in the order in which it is worth knowing: errors first, for what is over the error allowed need not be timed.

Nothing is begun that would not end within the time budget, by what the last trial of its kind took, with what the plan chosen then still needs: its error
and its time. What has begun is finished; only a comparison of steps can be cut short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from rich.progress import Progress

from approx_compile.passes.planning.plan import SitePlan
from approx_compile.tools.tuning.search_space import Candidates
from approx_compile.tools.tuning.step_time_model import Measured, group_of
from approx_compile.tools.tuning.trial import SECONDS, Gradients, Times, Trials

DRAWS = 3
"""Steps over which the error of a random choice is averaged (root mean square)."""

REVISIONS = 6
"""Plans whose error is measured before the best of them is taken."""

COMPILING = 10.0
"""How many times as long as a step run op by op, tracing included, a compilation is taken to last before one has been measured."""

RESERVE = 1.25
"""Times what the plan chosen is expected to need at the end, which is left for it."""

now = monotonic

T = TypeVar("T")


class OutOfTime(Exception):
    """No time is left for another trial."""


@dataclass
class _Costs:
    """Seconds of a step run op by op, of a compilation (None: not known yet), and of a comparison of steps."""

    gradient: float = 0.0
    compiling: float | None = None
    comparing: float = 2 * SECONDS

    def of_times(self, compilations: int) -> float:
        """Seconds of a comparison, so many compilations included."""
        return compilations * (self.compiling if self.compiling is not None else COMPILING * self.gradient) + self.comparing


@dataclass(frozen=True)
class Tried:
    """Settings whose error is measured: the sites as planned, and the relative error of the gradient."""

    options: Mapping[str, Any]
    sites: tuple[SitePlan, ...]
    error: float


@dataclass
class Measurements:
    """`alone`: each site alone at each ratio; `times`: whole steps with several sites sampled; `rows`: the backward pass on a share of the rows, and the
    share of the step's time that saved."""

    trials: Trials
    candidates: Candidates
    max_error: float
    ladder: Sequence[float]
    time_budget_s: float
    bar: Progress
    alone: dict[tuple[str, float], Tried] = field(default_factory=dict)
    times: list[Measured] = field(default_factory=list)
    rows: dict[float, tuple[Tried, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = now()
        self._costs = _Costs()
        self._task = self.bar.add_task("reading the model", total=None)
        self._exact: dict[int, Gradients] = {}

    def take(self, rows: bool) -> None:
        """Everything, as far as time goes. Raises OutOfTime."""
        self.candidates.survey(self.trials, min(self.ladder))
        sites = sorted(self.candidates.sampled, key=lambda s: -s.flops_exact)
        groups = list(dict.fromkeys(map(group_of, sites)))
        self.bar.update(self._task, total=len(sites) * len(self.ladder) + 2 * (len(groups) + 1) + 2 * len(self.ladder) * rows + 3)
        if sites or rows:
            self._say_how_long(len(sites) * len(self.ladder), len(groups), len(self.ladder) * rows)
        for site in sites:
            self._errors_of(site.name)
        if rows:
            self._rows()
        usable = {s.name: [r for r in self.ladder if (s.name, r) in self.usable] for s in sites}
        self._times_of({name: ratios for name, ratios in usable.items() if ratios})
        for group in groups if len(groups) > 1 else ():
            self._times_of({s.name: usable[s.name] for s in sites if group_of(s) == group and usable[s.name]})

    @property
    def usable(self) -> list[tuple[str, float]]:
        """Sites and ratios whose error is within the one allowed."""
        return [key for key, tried in self.alone.items() if tried.error <= self.max_error]

    @property
    def timed_sites(self) -> set[str]:
        """Sites that were sampled in a step that was timed."""
        return {s.name for measured in self.times for s in measured.sites if s.decision == "sampled"}

    def tried(self, options: Mapping[str, Any], random: bool | None = None) -> Tried:
        """The error of any settings."""
        found = []
        for draw in range(self._draws(random)):
            exact = self._exact_gradients(draw)
            gradients = self._gradients(options, draw)
            found.append((gradients.error(exact) ** 2, gradients.sites))
        return Tried(options, found[0][1], math.sqrt(sum(square for square, _ in found) / len(found)))

    def timed(self, options: Mapping[str, Any]) -> Times:
        """The step compiled under any settings, beside the exact one. Raises OutOfTime if only that could still be compiled."""
        if not self.trials.exact_is_compiled:
            self._compiling(lambda: self.trials.exact)
            if self.no_time_for(self._costs.of_times(1)):
                raise OutOfTime
        step = self._compiling(lambda: self.trials.compiled(options))
        begin = now()
        times = self.trials.times(step, lambda: self.no_time_for(0.0))
        self._costs.comparing = now() - begin
        return times

    def time_of_the_choice(self, options: Mapping[str, Any]) -> Times | None:
        """The time of the plan chosen, if there is time to measure it."""
        try:
            return None if self.no_time_for(self._timing_s) else self.timed(options)
        except OutOfTime:
            return None

    def no_time_for_errors(self, plans: int) -> bool:
        """Whether the errors of so many plans can't be measured, as one of them must still be compiled and timed."""
        return self.no_time_for(plans * self._draws(None) * self._costs.gradient + RESERVE * self._timing_s)

    def no_time_for(self, seconds: float) -> bool:
        return now() - self._began + seconds > self.time_budget_s

    @property
    def _timing_s(self) -> float:
        return self._costs.of_times(1 if self.trials.exact_is_compiled else 2)

    def _draws(self, random: bool | None) -> int:
        return DRAWS if (self.candidates.random if random is None else random) else 1

    def _exact_gradients(self, draw: int) -> Gradients:
        if draw not in self._exact:
            self._exact[draw] = self._gradients(self.candidates.options({}), draw)
        return self._exact[draw]

    def _gradients(self, options: Mapping[str, Any], draw: int) -> Gradients:
        begin = now()
        found = self.trials.gradients(options, draw)
        self._costs.gradient = now() - begin
        return found

    def _compiling(self, compile: Callable[[], T]) -> T:
        begin = now()
        step = compile()
        self._costs.compiling = now() - begin
        return step

    def _say_how_long(self, errors: int, groups: int, rows: int) -> None:
        """What all of it would take at most, by one gradient of the exact step (which is needed anyhow)."""
        if self.bar.disable:
            return
        self._exact_gradients(0)
        gradients = (errors + 2 * REVISIONS) * self._draws(None) + rows * DRAWS
        compilations = 2 + rows + (2 * (groups + (groups > 1)) if errors else 0)
        costs = self._costs
        all_s = gradients * costs.gradient + compilations * costs.of_times(1)
        rest = "" if all_s <= self.time_budget_s else "; what does not fit stays exact and is said to be not measured"
        self.bar.console.print(
            f"tune: up to {gradients} gradients and {compilations} compilations, at most about {all_s:.0f} s by the first gradient ({costs.gradient:.2g} s); "
            f"the time budget is {self.time_budget_s:g} s{rest}",
            highlight=False,
            soft_wrap=True,
        )

    def show(self, label: str, advance: int = 0) -> None:
        self.bar.update(self._task, description=label, advance=advance)

    def _errors_of(self, name: str) -> None:
        """From the highest ratio down, until the error is too large."""
        for i, ratio in enumerate(self.ladder):
            draws = self._draws(None)
            tried = self._trial(f"gradient error of {name} at {ratio:g}", self.tried, self.candidates.options({name: ratio}), draws * self._costs.gradient)
            self.alone[name, ratio] = tried
            if tried.error > self.max_error:
                self.show("", advance=len(self.ladder) - i - 1)
                return

    def _times_of(self, usable: Mapping[str, Sequence[float]]) -> None:
        """Of some sites sampled together: all at the highest ratio they may have, and all at the lowest."""
        choices = [{name: pick(ratios) for name, ratios in usable.items()} for pick in (max, min)]
        for chosen in choices[: 1 if choices[0] == choices[1] else 2] if usable else ():
            options = self.candidates.options(chosen)
            more = f" and {len(chosen) - 1} more" if len(chosen) > 1 else ""
            times = self._trial(f"time of {next(iter(chosen))}{more}", self.timed, options, self._timing_s)
            self.times.append(Measured(self.trials.planned(options), 1 - times.share))

    def _rows(self) -> None:
        for ratio in self.ladder:
            options = self.candidates.on_rows(ratio)
            each = DRAWS * self._costs.gradient
            tried = self._trial(f"gradient error of {ratio:g} of the rows", lambda options: self.tried(options, random=True), options, each)
            if tried.error > self.max_error or not any(p.decision == "rows" for s in tried.sites for p in s.products):
                return
            times = self._trial(f"time of {ratio:g} of the rows", self.timed, options, self._timing_s)
            self.rows[ratio] = tried, 1 - times.share

    def _trial(self, label: str, run: Callable[[Mapping[str, Any]], T], options: Mapping[str, Any], seconds: float) -> T:
        """One of the measurements, which takes about so long, while there is time: the plan chosen must then still be compiled and measured."""
        choice_s = self._costs.of_times(1) + self._draws(None) * self._costs.gradient
        if self.no_time_for(seconds + RESERVE * choice_s):
            raise OutOfTime
        self.show(label)
        found = run(options)
        self.show(label, advance=1)
        return found
