"""Choose some cases of a parametrized test, which run where all of them would take too long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest


def spread(cases: Sequence[Mapping[str, int]], number: int) -> set[int]:
    """Return the positions of so many cases, each given by the position of its value of every parameter.

    Every next case is one with the most values that no chosen one has, of these one with the most new pairs of values, and of these the first in an order drawn
    once. So all values are met if `number` is at least that of the longest parameter, and the choice is the same in every run.
    """
    order = random.Random(0).sample(range(len(cases)), len(cases))
    chosen: set[int] = set()
    seen: set[object] = set()
    values = [set(case.items()) for case in cases]
    pairs = [set(itertools.combinations(sorted(case.items()), 2)) for case in cases]
    while len(chosen) < min(number, len(cases)):
        best = max((i for i in order if i not in chosen), key=lambda i: (len(values[i] - seen), len(pairs[i] - seen)))
        chosen.add(best)
        seen |= values[best] | pairs[best]
    return chosen


def mark_exhaustive(items: Sequence[pytest.Item]) -> None:
    """Give the mark `exhaustive` to the cases that the mark `sample(number)` of their test leaves out."""
    tests: dict[tuple[object, ...], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sample") and not item.get_closest_marker("exhaustive"):
            tests.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("sample")
        assert mark is not None
        kept = spread([case.callspec.indices for case in cases], *mark.args)
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker("exhaustive")


def all_but(kept: Sequence[object], cases: Iterable[object]) -> list[Any]:
    """Return the cases for `parametrize`; those that are not among the kept ones have the mark `exhaustive`."""
    return [case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive) for case in cases]
