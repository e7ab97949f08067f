"""Compare the accuracy and the time of a user's training under this backend with exact training: `approx-compile compare FILE:run`.

The user's function `run(seed)` trains with `backend="approx"` and returns the accuracy. It is called in fresh processes in turn (A B A B): exact, with
`APPROX_COMPILE_DISABLE=1`, and approximate, both with the same seed.

The decision rule. Let ``d_i`` be the accuracy of the approximate run with seed ``i`` less that of the exact run (with the sign changed where lower is better),
``n`` the number of seeds, ``s`` the standard deviation of the ``d_i``, and ``t`` the 97.5 % point of Student's distribution with ``n - 1`` degrees of freedom.
The 95 % confidence interval of the mean difference is ``mean(d) ± t s / sqrt(n)``. With a margin ``m``, the loss of accuracy that would not matter:

- the interval lies above ``-m``: as accurate (no loss beyond the margin);
- it lies below ``-m``: less accurate;
- otherwise: undecided; more seeds are needed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from approx_compile.machine import device_name
from approx_compile.utils import DISABLE, counted, printed

MARGIN = 0.005
"""The default margin as a share of the exact runs' mean accuracy."""


class RunFailed(Exception):
    """A training run failed; its output is on stderr."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    value: float
    """The accuracy, or another measure."""
    seconds: float
    """The seconds that `run(seed)` took, or those that it returned."""


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, or ratios, over seeds, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Compute the interval ``mean ± t s / sqrt(n)`` of at least two values."""
        from scipy.stats import t  # imported here because only this command needs it

        mean, half = statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class AccuracyComparison:
    """The result of `compare_accuracy`. `str()` is a table and the verdict.

    Attributes:
        seeds: The seeds.
        exact: The run of each seed under plain Inductor.
        approx: The run of each seed under this backend.
        margin: The loss of accuracy that would not matter.
        lower_is_better: Whether the measure is a loss or an error.
        threads: torch's threads in the runs.
    """

    seeds: tuple[int, ...]
    exact: tuple[Run, ...]
    approx: tuple[Run, ...]
    margin: float
    lower_is_better: bool
    threads: int

    @property
    def _differences(self) -> list[float]:
        """The difference of every pair of runs, approximate less exact, with the sign changed where lower is better."""
        sign = -1 if self.lower_is_better else 1
        return [sign * (a.value - e.value) for e, a in zip(self.exact, self.approx, strict=True)]

    @property
    def difference(self) -> Interval:
        """The paired difference of the accuracies, approximate less exact; its sign is changed where lower is better, so that below 0 is worse."""
        return Interval.of(self._differences)

    @property
    def time(self) -> Interval:
        """The paired ratio of the times, approximate to exact: the geometric mean, with the interval of the logarithms, which no ratio below 0 belongs to."""
        logs = Interval.of([math.log(a.seconds / e.seconds) for e, a in zip(self.exact, self.approx, strict=True)])
        return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))

    @property
    def decision(self) -> str:
        """Return "as accurate", "less accurate" or "undecided", by the rule above."""
        return "as accurate" if self.difference.low > -self.margin else "less accurate" if self.difference.high < -self.margin else "undecided"

    @property
    def seeds_needed(self) -> int | None:
        """About how many seeds would decide, if their mean and spread stayed; None if that is more than a hundred."""
        distance, spread = abs(statistics.fmean(self._differences) + self.margin), statistics.stdev(self._differences)
        needed = math.ceil((2.2 * spread / distance) ** 2) if distance else 101  # 2.2: Student's 97.5 % point at about a dozen seeds
        return max(needed, len(self.seeds) + 1) if needed <= 100 else None

    @property
    def verdict(self) -> str:
        """The decision in a sentence."""
        d, time = self.difference, self.time
        interval = f"mean difference {d.mean:+.4g}, 95 % interval {d.low:+.4g} to {d.high:+.4g}, margin {self.margin:.4g}"
        took = f"takes {time.mean:.2f} of the time ({time.low:.2f} to {time.high:.2f})"
        if self.decision == "less accurate":
            return f"Do not use it as it is: approx is less accurate by more than the margin ({interval}). Lower adaptive.tau, or approximate less."
        if self.decision == "undecided":
            more = f"run about {self.seeds_needed} seeds" if self.seeds_needed else "the spread is too large for this margin: choose a larger one, or more data"
            return f"Undecided: {len(self.seeds)} seeds do not tell whether approx loses more than the margin ({interval}); {more}. It {took}."
        if time.high < 1:
            return f"Use it: approx is as accurate within the margin ({interval}) and {took}."
        return f"Approx is as accurate within the margin ({interval}), but is not measurably faster: it {took}."

    def to_dict(self) -> dict[str, Any]:
        """Return runs, intervals and the verdict as plain values, for JSON."""
        derived = {"difference": asdict(self.difference), "time": asdict(self.time), "decision": self.decision, "verdict": self.verdict}
        device = device_name("cuda" if torch.cuda.is_available() else "cpu")
        return asdict(self) | derived | {"device": device, "torch": torch.__version__, "python": platform.python_version()}

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("run", "accuracy", "seconds"):
            table.add_column(title, justify="left" if title == "run" else "right")
        for name, runs in (("exact", self.exact), ("approx", self.approx)):
            table.add_row(name, _spread([r.value for r in runs]), _spread([r.seconds for r in runs]))
        threads = counted(self.threads, "thread")
        return printed(table, f"Mean ± standard deviation over {len(self.seeds)} seeds, {threads}, torch {torch.__version__}.", self.verdict)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"


def compare_accuracy(
    spec: str,
    seeds: int = 3,
    margin: float | None = None,
    lower_is_better: bool = False,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> AccuracyComparison:
    """Train exactly and approximately with each seed, in turn, each in a process of its own.

    Args:
        spec: The training function, `package.module:run` or `path/to/file.py:run`. It takes a seed and returns the accuracy, or a dict with the key `accuracy`
            and perhaps `seconds`, which then stand for the time of the whole call.
        seeds: The number of seeds, 2 or more: 0, 1, 2 and so on.
        margin: The loss of accuracy that would not matter; by default 0.5 % of the exact runs' mean.
        lower_is_better: Whether the function returns a loss or an error.
        threads: torch's threads in the runs; its own choice by default.
        tell: Called with the result of every run.

    Returns:
        The runs and what follows from them.

    Raises:
        ValueError: If an argument is not valid.
        RunFailed: If a run fails, or returns something else.
    """
    if seeds < 2:
        raise ValueError(f"seeds: got {seeds}; at least 2 are expected, because a single pair has no spread")
    if margin is not None and not margin > 0:
        raise ValueError(f"margin: got {margin}; a number above 0 is expected")
    exact: list[Run] = []
    approx: list[Run] = []
    for seed in range(seeds):
        for name, runs in (("exact", exact), ("approx", approx)):
            runs.append(_run(spec, seed, name, threads))
            tell(f"{name}, seed {seed}: {runs[-1].value:.6g} in {runs[-1].seconds:.1f} s")
    allowed = margin if margin is not None else MARGIN * abs(statistics.fmean(r.value for r in exact))
    return AccuracyComparison(tuple(range(seeds)), tuple(exact), tuple(approx), allowed, lower_is_better, threads or torch.get_num_threads())


def _run(spec: str, seed: int, name: str, threads: int | None) -> Run:
    """Call the function in a process of its own; what it prints goes to stderr."""
    environment = {k: v for k, v in os.environ.items() if k != DISABLE.name} | ({DISABLE.name: "1"} if name == "exact" else {})
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "approx_compile.tools.accuracy_child", spec, str(seed), str(result), str(threads or 0)]
        done = subprocess.run(command, env=environment, stdout=2, check=False)
        if not result.exists():
            raise RunFailed(f"{spec} with seed {seed}, {name}: the process ended with code {done.returncode} and no result; what it said is above")
        content = json.loads(result.read_text())
    if "error" in content:
        raise RunFailed(f"{spec} with seed {seed}, {name}: {content['error']}")
    return Run(content["value"], content["seconds"])
