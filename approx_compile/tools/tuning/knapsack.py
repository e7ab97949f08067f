"""Choose which sites to sample at which ratio, so that the most time is saved within an error budget. The choice is solved as a mixed-integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TIME_LIMIT_S = 10.0
"""The default of `time_limit_s`."""


@dataclass(frozen=True)
class Option:
    """One way to treat a site."""

    site: str
    gain: float
    """The time that it saves, in any unit."""
    cost: float
    """Its error, in the unit of the error budget."""


def solve_knapsack(
    options: Sequence[Option], budget: float, overlaps: Mapping[tuple[int, int], float] | None = None, time_limit_s: float = TIME_LIMIT_S
) -> list[int]:
    """Choose at most one option for each site.

    The choice maximizes ``sum_i gain_i x_i - sum_(i,j) overlap_ij x_i x_j`` subject to ``sum_i cost_i x_i <= budget``, with x in {0, 1}. Each product
    ``x_i x_j`` is replaced by a variable ``z_ij >= x_i + x_j - 1``, so that the objective is linear.

    Args:
        options: The options.
        budget: The most that the chosen options may cost together.
        overlaps: The gain, 0 or more, that two options have in common, by the indices of the two. It is counted only once.
        time_limit_s: Seconds after which the solver returns the best solution that it has.

    Returns:
        The indices of the chosen options.
    """
    from scipy.optimize import (  # imported here because only tuning needs it, whereas `import approx_compile` is part of every run
        Bounds,
        LinearConstraint,
        milp,
    )
    from scipy.sparse import lil_array

    eligible = [i for i, o in enumerate(options) if o.gain > 0 and o.cost <= budget]
    if not eligible:
        return []
    place = {i: n for n, i in enumerate(eligible)}
    pairs = [(place[i], place[j], w) for (i, j), w in (overlaps or {}).items() if i in place and j in place and w > 0]
    n, m = len(eligible), len(pairs)
    objective = np.array([-options[i].gain for i in eligible] + [w for *_, w in pairs])
    sites = list(dict.fromkeys(options[i].site for i in eligible))
    # one row for the budget, then one for each site, then one for each pair
    rows = lil_array((1 + len(sites) + m, n + m))
    for p, i in enumerate(eligible):
        rows[0, p] = options[i].cost / budget
        rows[1 + sites.index(options[i].site), p] = 1
    for q, (a, b, _) in enumerate(pairs):
        row = 1 + len(sites) + q
        rows[row, a], rows[row, b], rows[row, n + q] = 1, 1, -1
    most = np.ones(1 + len(sites) + m)
    solution = milp(
        objective,
        constraints=LinearConstraint(rows.tocsr(), -np.inf, most),
        integrality=np.concatenate([np.ones(n), np.zeros(m)]),
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
    )
    if solution.x is None:
        return []
    return [i for p, i in enumerate(eligible) if solution.x[p] > 0.5]
