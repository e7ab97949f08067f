"""Make the measurements of `tune`. Errors are measured first, because settings that exceed the allowed error need not be timed.

A trial begins only if it is expected to end within the time budget, judged by the last trial of its kind, and leaves enough time to measure the error and the
time of the chosen plan. A trial takes longer than expected on a busy machine, above all a compilation; `deadline` interrupts it when the budget is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from rich.progress import Progress

from approx_compile.passes.planning.plan import SitePlan
from approx_compile.tools.tuning.search_space import SearchSpace
from approx_compile.tools.tuning.step_time_model import MeasuredPlan, group_of
from approx_compile.tools.tuning.trial import SECONDS, Gradients, StepTimes, Trials

DRAWS = 3
"""The number of steps over which the error is averaged (as the root mean square) if entries are chosen at random."""

REVISIONS = 6
"""The number of plans whose error is measured before the best of them is chosen."""

COMPILING = 10.0
"""The assumed time of a compilation before one has been measured, in multiples of the time of a step that is traced and run op by op."""

RESERVE = 1.25
"""The time that is reserved for the chosen plan at the end, in multiples of the time that it is expected to need."""

now = monotonic
"""The clock of the time budget, in seconds."""

T = TypeVar("T")


class OutOfTime(Exception):
    """No time is left for another trial."""


@dataclass
class _TrialCosts:
    """The seconds that each kind of trial takes."""

    gradient: float = 0.0
    """A step run op by op."""
    compiling: float | None = None
    """A compilation; None if none has been measured yet."""
    comparing: float = 2 * SECONDS
    """A comparison of steps."""

    def of_times(self, compilations: int) -> float:
        """Estimate the time of a comparison of steps.

        Args:
            compilations: The number of steps that must be compiled first.

        Returns:
            Seconds.
        """
        return compilations * (self.compiling if self.compiling is not None else COMPILING * self.gradient) + self.comparing


@dataclass(frozen=True)
class TrialError:
    """The measured error of some settings."""

    options: Mapping[str, Any]
    """The settings."""
    sites: tuple[SitePlan, ...]
    """The sites as planned."""
    error: float
    """The relative error of the gradient."""


@dataclass
class Measurements:
    """The results of all measurements so far, and methods that measure more."""

    trials: Trials
    space: SearchSpace
    max_error: float
    """The relative error that the gradient may have."""
    ladder: Sequence[float]
    """The ratios to try, from the highest to the lowest."""
    time_budget_s: float
    bar: Progress
    alone: dict[tuple[str, float], TrialError] = field(default_factory=dict)
    """The error of each site alone, by its name and ratio."""
    times: list[MeasuredPlan] = field(default_factory=list)
    """Whole compiled steps with several sites sampled."""
    rows: dict[float, tuple[TrialError, float]] = field(default_factory=dict)
    """The error and the saved share of the step's time, by the share of the rows that the backward pass runs on."""

    def __post_init__(self) -> None:
        self._began = now()
        self._costs = _TrialCosts()
        self._task = self.bar.add_task("reading the model", total=None)
        self._exact: dict[int, Gradients] = {}

    def survey(self) -> None:
        """Find the sites of the model, and which of them may be sampled."""
        self.space.survey(self.trials, min(self.ladder))

    def measure_all(self, rows: bool) -> None:
        """Measure everything that the time budget allows, after `survey`.

        Args:
            rows: Whether to measure the backward pass on a share of the rows too.

        Raises:
            OutOfTime: If there is no time for all of it.
        """
        sites = sorted(self.space.sampled, key=lambda s: -s.flops_exact)
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
        """The sites and ratios whose error is allowed."""
        return [key for key, tried in self.alone.items() if tried.error <= self.max_error]

    @property
    def timed_sites(self) -> set[str]:
        """The sites that were sampled in a step that was timed."""
        return {s.name for measured in self.times for s in measured.sites if s.decision == "sampled"}

    def measure_error(self, options: Mapping[str, Any], random: bool | None = None) -> TrialError:
        """Measure the error of some settings.

        Args:
            options: The settings.
            random: Whether entries are chosen at random, so that the error is averaged over several draws. By default this is so if any site of the search
                space chooses at random.

        Returns:
            The error, and the sites as planned.
        """
        results = []
        for draw in range(self._draws(random)):
            exact = self._exact_gradients(draw)
            gradients = self._gradients(options, draw)
            results.append((gradients.error(exact) ** 2, gradients.sites))
        return TrialError(options, results[0][1], math.sqrt(sum(square for square, _ in results) / len(results)))

    def measure_time(self, options: Mapping[str, Any]) -> StepTimes:
        """Compile the step with some settings, and time it beside the exact step.

        Args:
            options: The settings.

        Returns:
            The times.

        Raises:
            OutOfTime: If no time is left for the other step after the exact step is compiled.
        """
        if not self.trials.exact_is_compiled:
            self._compiling(lambda: self.trials.exact)
            if self.no_time_for(self._costs.of_times(1)):
                raise OutOfTime
        step = self._compiling(lambda: self.trials.compiled(options))
        begin = now()
        times = self.trials.times(step, lambda: self.no_time_for(0.0))
        self._costs.comparing = now() - begin
        return times

    def time_of_the_choice(self, options: Mapping[str, Any]) -> StepTimes | None:
        """Measure the time of the chosen plan.

        Args:
            options: Its settings.

        Returns:
            The times; None if the time budget does not allow it.
        """
        try:
            return None if self.no_time_for(self._timing_s) else self.measure_time(options)
        except OutOfTime:
            return None

    def no_time_for_errors(self, plans: int) -> bool:
        """Tell whether the time left is too short to measure the errors of more plans, given that one of them must still be compiled and timed.

        Args:
            plans: The number of plans.

        Returns:
            True if it is too short.
        """
        return self.no_time_for(plans * self._draws(None) * self._costs.gradient + RESERVE * self._timing_s)

    def no_time_for(self, seconds: float) -> bool:
        """Tell whether less than `seconds` of the time budget is left.

        Args:
            seconds: The time that is needed.

        Returns:
            True if less is left.
        """
        return seconds > self.time_budget_s - (now() - self._began)

    @property
    def seconds_left(self) -> float:
        """The seconds of the time budget that are left, 0 if it is over."""
        return max(0.0, self.time_budget_s - (now() - self._began))

    @property
    def _timing_s(self) -> float:
        return self._costs.of_times(1 if self.trials.exact_is_compiled else 2)

    def _draws(self, random: bool | None) -> int:
        return DRAWS if (self.space.random if random is None else random) else 1

    def _exact_gradients(self, draw: int) -> Gradients:
        if draw not in self._exact:
            self._exact[draw] = self._gradients(self.space.options({}), draw)
        return self._exact[draw]

    def _gradients(self, options: Mapping[str, Any], draw: int) -> Gradients:
        begin = now()
        gradients = self.trials.gradients(options, draw)
        self._costs.gradient = now() - begin
        return gradients

    def _compiling(self, compile: Callable[[], T]) -> T:
        begin = now()
        step = compile()
        self._costs.compiling = now() - begin
        return step

    def _say_how_long(self, errors: int, groups: int, rows: int) -> None:
        """Print an upper estimate of how long all measurements take. It is based on one gradient of the exact step, which is needed in any case."""
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

    def show_progress(self, label: str, advance: int = 0) -> None:
        """Update the progress bar.

        Args:
            label: What is being measured.
            advance: How many trials have ended.
        """
        self.bar.update(self._task, description=label, advance=advance)

    def _errors_of(self, name: str) -> None:
        """Measure a site's error at each ratio, from the highest down, until the error is too large."""
        for i, ratio in enumerate(self.ladder):
            draws = self._draws(None)
            tried = self._trial(f"gradient error of {name} at {ratio:g}", self.measure_error, self.space.options({name: ratio}), draws * self._costs.gradient)
            self.alone[name, ratio] = tried
            if tried.error > self.max_error:
                self.show_progress("", advance=len(self.ladder) - i - 1)
                return

    def _times_of(self, usable: Mapping[str, Sequence[float]]) -> None:
        """Time steps in which some sites are sampled together: once all at the highest ratio that they may have, and once all at the lowest."""
        choices = [{name: pick(ratios) for name, ratios in usable.items()} for pick in (max, min)]
        for chosen in choices[: 1 if choices[0] == choices[1] else 2] if usable else ():
            options = self.space.options(chosen)
            more = f" and {len(chosen) - 1} more" if len(chosen) > 1 else ""
            times = self._trial(f"time of {next(iter(chosen))}{more}", self.measure_time, options, self._timing_s)
            self.times.append(MeasuredPlan(self.trials.planned(options), 1 - times.share))

    def _rows(self) -> None:
        """Measure the error and the time of the backward pass on a share of the rows, from the highest share down, until the error is too large."""
        for ratio in self.ladder:
            options = self.space.on_rows(ratio)
            each = DRAWS * self._costs.gradient
            tried = self._trial(f"gradient error of {ratio:g} of the rows", lambda options: self.measure_error(options, random=True), options, each)
            if tried.error > self.max_error or not any(p.decision == "rows" for s in tried.sites for p in s.products):
                return
            times = self._trial(f"time of {ratio:g} of the rows", self.measure_time, options, self._timing_s)
            self.rows[ratio] = tried, 1 - times.share

    def _trial(self, label: str, run: Callable[[Mapping[str, Any]], T], options: Mapping[str, Any], seconds: float) -> T:
        """Run one of the measurements, which takes about `seconds`, unless that leaves too little time to compile and measure the chosen plan."""
        choice_s = self._costs.of_times(1) + self._draws(None) * self._costs.gradient
        if self.no_time_for(seconds + RESERVE * choice_s):
            raise OutOfTime
        self.show_progress(label)
        result = run(options)
        self.show_progress(label, advance=1)
        return result
