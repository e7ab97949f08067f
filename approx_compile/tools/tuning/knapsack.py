"""Which sites to sample, and how hard: the most time saved within an error budget, as a mixed-integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SECONDS = 10.0
"""The solver then returns the best it has found."""


@dataclass(frozen=True)
class Option:
    """One way to treat a site: `gain` (any unit of time), `cost` (a share of the error budget's unit)."""

    site: str
    gain: float
    cost: float


def choose(options: Sequence[Option], budget: float, overlaps: Mapping[tuple[int, int], float] | None = None) -> list[int]:
    """The indices of the options chosen, at most one per site.

    Maximises sum_i gain_i x_i - sum_(i,j) overlap_ij x_i x_j subject to sum_i cost_i x_i <= budget, with x in {0, 1}; the products x_i x_j become variables
    z_ij >= x_i + x_j - 1. `overlaps` (at least 0): what two options save both, which counts once.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, as only tuning needs it, and `import approx_compile` comes with every run
    from scipy.sparse import lil_array

    worth = [i for i, o in enumerate(options) if o.gain > 0 and o.cost <= budget]
    if not worth:
        return []
    place = {i: n for n, i in enumerate(worth)}
    pairs = [(place[i], place[j], w) for (i, j), w in (overlaps or {}).items() if i in place and j in place and w > 0]
    n, m = len(worth), len(pairs)
    objective = np.array([-options[i].gain for i in worth] + [w for *_, w in pairs])
    sites = list(dict.fromkeys(options[i].site for i in worth))
    # first the budget, then one row per site, then one per pair
    rows = lil_array((1 + len(sites) + m, n + m))
    for p, i in enumerate(worth):
        rows[0, p] = options[i].cost / budget
        rows[1 + sites.index(options[i].site), p] = 1
    for q, (a, b, _) in enumerate(pairs):
        row = 1 + len(sites) + q
        rows[row, a], rows[row, b], rows[row, n + q] = 1, 1, -1
    most = np.ones(1 + len(sites) + m)
    found = milp(
        objective,
        constraints=LinearConstraint(rows.tocsr(), -np.inf, most),
        integrality=np.concatenate([np.ones(n), np.zeros(m)]),
        bounds=Bounds(0, 1),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return []
    return [i for p, i in enumerate(worth) if found.x[p] > 0.5]
