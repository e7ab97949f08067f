"""Contestants timed in turn in one process, compared with the one called inductor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from approx_compile.tools.compare import race
from benchmarks.common.rows import conditions

SPEED_COLUMNS = ("work", "setting", "median_ms", "p20_ms", "p80_ms", "speedup", "speedup_p20", "speedup_p80", "bar")


def raced(title: str, contest: dict[str, Callable[[], None]], rounds: int, bars: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every contestant; the one called inductor is what the others are compared with."""
    return raced_times(title, race(contest, rounds), rounds, bars)


def raced_times(title: str, times: dict[str, list[float]], rounds: int, bars: dict[str, float]) -> list[dict[str, Any]]:
    """The same from the times of the rounds, in milliseconds."""
    rows = []
    base = statistics.median(times["inductor"])
    for setting, milliseconds in times.items():
        low, median, high = (round(statistics.quantiles(milliseconds, n=10)[i], 1) for i in (1, 4, 7))
        pairs = sorted(a / b for a, b in zip(times["inductor"], milliseconds, strict=True))
        rows.append(
            conditions()
            | {"work": title, "setting": setting, "rounds": rounds, "median_ms": median, "p20_ms": low, "p80_ms": high}
            | {"speedup": round(base / statistics.median(milliseconds), 3)}
            | {"speedup_p20": round(pairs[len(pairs) // 5], 3), "speedup_p80": round(pairs[-1 - len(pairs) // 5], 3), "bar": bars.get(setting, "")}
        )
    return rows
