"""The cases of a long test that `make test` runs: every value of every parameter is among them, and they are the same in every run."""

from __future__ import annotations

import itertools

from helpers.sampling import spread


def test_a_sample_of_cases_meets_every_value_and_is_always_the_same() -> None:
    sizes = {"method": 5, "layer": 3, "dtype": 2}
    cases = [dict(zip(sizes, values, strict=True)) for values in itertools.product(*map(range, sizes.values()))]
    chosen = spread(cases, 5)
    assert len(chosen) == 5 and chosen == spread(cases, 5)
    assert all({cases[i][name] for i in chosen} == set(range(size)) for name, size in sizes.items())
    pairs = {(cases[i]["method"], cases[i]["layer"]) for i in spread(cases, 18)}
    assert len(pairs) == 15 and spread(cases, 100) == set(range(30))
