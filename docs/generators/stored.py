"""Read stored results and write them as tables: one line for each stored row, with the commit that it was measured at, and a caption with the conditions."""

from __future__ import annotations

import csv
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@functools.cache
def _read(name: str) -> tuple[Row, ...]:
    path = RESULTS / name
    if path.suffix == ".jsonl":
        return tuple(json.loads(line) for line in path.read_text().splitlines())
    with path.open(newline="") as f:
        return tuple(csv.DictReader(f))


def rows(name: str, **where: str) -> list[Row]:
    """The rows of a file in benchmarks/results that have these values, in the order they were stored."""
    return [r for r in _read(name) if all(str(r[k]) == v for k, v in where.items())]


def newest(stored: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], Row]:
    """The row stored last of every combination of the values of `keys`, in the order of first appearance."""
    by_key: dict[tuple[Any, ...], Row] = {}
    for row in stored:
        by_key[tuple(row[k] for k in keys)] = row
    return by_key


def newest_commit(stored: Sequence[Row], *keys: str, least: int = 1) -> list[Row]:
    """The rows of the commit stored last that has at least `least` combinations of the values of `keys`.

    Raises:
        ValueError: No commit has as many.
    """
    commits = list(dict.fromkeys(r["commit"] for r in stored))
    for commit in reversed(commits):
        group = [r for r in stored if r["commit"] == commit]
        if len({tuple(r[k] for k in keys) for r in group}) >= least:
            return group
    raise ValueError(f"no commit has {least} combinations of {', '.join(keys)}")


def spread(values: Sequence[float]) -> str:
    """Mean and, of two or more values, their standard deviation."""
    digits = 3 if max(values) < 10 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def times(row: Row, percentiles: str = "speedup_p") -> str:
    """A speed-up with its 20th and 80th percentile, whose columns begin with `percentiles`."""
    return f"{float(row['speedup']):.2f} ({float(row[f'{percentiles}20']):.2f} to {float(row[f'{percentiles}80']):.2f})"


def seeds(runs: Iterable[Row]) -> str:
    """The seeds of runs, as a range where they follow one another."""
    numbers = sorted({r["seed"] for r in runs})
    whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


CHOSE_SAMPLES_UNTIL = "2026-11-30"
"""The last date of stored results of the default from the time when it chose samples in every model. For those below it chooses tokens now."""
NOW_ON_TOKENS = ("char-transformer", "four transformer blocks, width 512, 16 x 128 tokens", "lora")
"""The works among those with such results for which the default chooses tokens."""
ON_SAMPLES = '"(samples)": measured when the default still chose samples; for such a model it chooses tokens now.'
"""What the mark says, for captions."""


def chose_samples(row: Row) -> bool:
    """Whether a stored result of the default is of a model for which it chose samples then, and chooses tokens now."""
    return row["work"] in NOW_ON_TOKENS and str(row["date"]) <= CHOSE_SAMPLES_UNTIL


def mark(row: Row) -> str:
    """What is written behind a result of the default, or behind its name, so that a reader knows what the default was when it was measured."""
    return " (samples)" if chose_samples(row) else ""


def explained(what: str, marked: Iterable[Row]) -> str:
    """A caption's text, with what the mark says if one of these results of the default has it."""
    return f"{what} {ON_SAMPLES}" if any(chose_samples(r) for r in marked) else what


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body])


def _several(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values))


def caption(what: str, stored: Sequence[Row], *names: str) -> str:
    """What a table shows, and what its rows were measured with: device, threads, dtype, torch, dates, commits and files."""
    dates = sorted({r["date"] for r in stored})
    threads = " or ".join(sorted({str(r["threads"]) for r in stored}))
    parts = [
        _several(r["device"] for r in stored),
        f"{threads} thread" + ("" if threads == "1" else "s"),
        *([_several(r["dtype"] for r in stored)] if "dtype" in stored[0] else []),
        f"torch {_several(r['torch'] for r in stored)}",
        dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    ]
    commits = list(dict.fromkeys(r["commit"] for r in stored))
    of_line = "; every line is of one commit" if len(commits) > 1 else ""
    files = " and ".join(f"`benchmarks/results/{name}`" for name in names)
    dirty = " (+: with changes that were not committed)" if any(c.endswith("+") for c in commits) else ""
    return f"*{what} {', '.join(parts)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}{of_line}{dirty}. From {files}.*"


def by(stored: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows in groups, in the order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in stored:
        groups.setdefault(key(row), []).append(row)
    return groups


def block(lines: str, text: str) -> str:
    """A table and its caption."""
    return f"{lines}\n\n{text}"


def named(names: Mapping[str, str], key: str) -> str:
    """The name that readers see, else the stored one."""
    return names.get(key, key)
