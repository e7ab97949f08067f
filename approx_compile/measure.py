"""What `tune` measures, in the order in which it is worth knowing: errors first, for what is over the error allowed need not be timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.progress import Progress

from approx_compile.candidates import Candidates
from approx_compile.passes.planned import SitePlan
from approx_compile.step_time import Measured, group_of
from approx_compile.trials import Gradients, Times, Trials

DRAWS = 3
"""Steps over which the error of a random choice is averaged (root mean square)."""

RESERVE = 1.5
"""Times the last compile and timing that are left for those of the plan chosen."""

T = TypeVar("T")


class OutOfTime(Exception):
    """No time is left for another trial."""


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
        self._began = time.monotonic()
        self._compiling_s = 0.0
        self._task = self.bar.add_task("reading the model", total=None)
        self._exact: dict[int, Gradients] = {}

    def take(self, rows: bool) -> None:
        """Everything, as far as time goes. Raises OutOfTime."""
        self.candidates.survey(self.trials, min(self.ladder))
        sites = sorted(self.candidates.sampled, key=lambda s: -s.flops_exact)
        groups = list(dict.fromkeys(map(group_of, sites)))
        self.bar.update(self._task, total=len(sites) * len(self.ladder) + 2 * (len(groups) + 1) + 2 * len(self.ladder) * rows + 3)
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

    def tried(self, options: Mapping[str, Any], random: bool | None = None) -> Tried:
        """The error of any settings."""
        found = []
        for draw in range(DRAWS if (self.candidates.random if random is None else random) else 1):
            if draw not in self._exact:
                self._exact[draw] = self.trials.gradients(self.candidates.options({}), draw)
            gradients = self.trials.gradients(options, draw)
            found.append((gradients.error(self._exact[draw]) ** 2, gradients.sites))
        return Tried(options, found[0][1], math.sqrt(sum(square for square, _ in found) / len(found)))

    def timed(self, options: Mapping[str, Any]) -> Times:
        """The step compiled under any settings, beside the exact one."""
        begin = time.monotonic()
        times = self.trials.times(self.trials.compiled(options))
        self._compiling_s = time.monotonic() - begin
        return times

    @property
    def late(self) -> bool:
        """Whether there is no time for another trial, as what is chosen must still be compiled and measured."""
        return time.monotonic() - self._began + RESERVE * self._compiling_s > self.time_budget_s

    def show(self, label: str, advance: int = 0) -> None:
        self.bar.update(self._task, description=label, advance=advance)

    def _errors_of(self, name: str) -> None:
        """From the highest ratio down, until the error is too large."""
        for i, ratio in enumerate(self.ladder):
            tried = self._trial(f"gradient error of {name} at {ratio:g}", self.tried, self.candidates.options({name: ratio}))
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
            times = self._trial(f"time of {next(iter(chosen))}{more}", self.timed, options)
            self.times.append(Measured(self.trials.planned(options), 1 - times.share))

    def _rows(self) -> None:
        for ratio in self.ladder:
            options = self.candidates.on_rows(ratio)
            tried = self._trial(f"gradient error of {ratio:g} of the rows", lambda options: self.tried(options, random=True), options)
            if tried.error > self.max_error or not any(p.decision == "rows" for s in tried.sites for p in s.products):
                return
            times = self._trial(f"time of {ratio:g} of the rows", self.timed, options)
            self.rows[ratio] = tried, 1 - times.share

    def _trial(self, label: str, run: Callable[[Mapping[str, Any]], T], options: Mapping[str, Any]) -> T:
        """One of the measurements, while there is time."""
        if self.late:
            raise OutOfTime
        self.show(label)
        found = run(options)
        self.show(label, advance=1)
        return found
