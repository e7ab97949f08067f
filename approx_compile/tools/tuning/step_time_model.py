"""What a plan saves of a training step's time, from a few steps measured whole.

    saved = sum over sites of rate[group] * (FLOPs saved there / FLOPs of all sites) - sum over sampled sites of overhead[group]

Sites of one op, shape and dtype are a group; a size that is a symbol in one trial and a number in another is the number it was traced with. FLOPs are
those of the plan, so that what two sites both save (zeros that are skipped) counts once. The rates are fitted to whole compiled steps: a site alone has
other neighbours, and other things to fuse with, than in its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from approx_compile.passes.planning.plan import SitePlan

NOISE = 0.01
"""Of a measured share of the step's time."""

SPREAD = 0.5
"""How far a group's rate is expected to be from that of all, relatively: what decides where little was measured."""


def shape_of(site: SitePlan) -> str:
    """The site's shape in numbers, those that symbols were traced with."""
    shape = site.shape
    for expression, size in sorted(site.traced, key=lambda t: -len(t[0])):  # s3 is in 2*s3 and in s33, too
        shape = shape.replace(expression, str(size))
    return shape


def group_of(site: SitePlan) -> str:
    return f"{site.op} {shape_of(site)} {site.dtype}"


@dataclass(frozen=True)
class Measured:
    """A plan and the share of the exact step's time that it saved."""

    sites: tuple[SitePlan, ...]
    saved: float


class StepTime:
    """The model above, fitted to `measured`; with none of them the time is taken to go with the FLOPs."""

    def __init__(self, sites: Sequence[SitePlan], measured: Sequence[Measured]) -> None:
        self.flops = max(1, sum(s.flops_exact for s in sites))
        self.groups = list(dict.fromkeys(map(group_of, sites)))
        found = np.array([m.saved for m in measured])
        rows = np.array([self._features(m.sites) for m in measured]).reshape(len(measured), 2 * len(self.groups))
        n = len(self.groups)
        if not n:
            self.rates = np.zeros(0)
            return
        mean, overhead = _solve(np.stack([rows[:, :n].sum(1), rows[:, n:].sum(1)], 1), found, np.array([1.0, 0.0]), np.array([1.0, 0.01]))
        prior = np.repeat([mean, overhead], n)
        self.rates = _solve(rows, found, prior, np.maximum(SPREAD * prior, [*[0.05] * n, *[0.002] * n]))

    def rate(self, site: SitePlan) -> float:
        """Share of the step's time saved per share of its FLOPs."""
        return float(self.rates[self.groups.index(group_of(site))])

    def saved(self, sites: Sequence[SitePlan]) -> float:
        """The share of the exact step's time that a plan saves."""
        return float(self._features(sites) @ self.rates)

    def _features(self, sites: Sequence[SitePlan]) -> np.ndarray:
        features = np.zeros(2 * len(self.groups))
        for s in sites:
            g = self.groups.index(group_of(s))
            features[g] += (s.flops_exact - s.flops_sampled) / self.flops
            features[len(self.groups) + g] -= s.decision == "sampled"
        return features


def _solve(rows: np.ndarray, found: np.ndarray, prior: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Least squares above 0, with a prior for what the rows leave open."""
    from scipy.optimize import lsq_linear  # here, as only tuning needs it

    a = np.concatenate([rows / NOISE, np.diag(1 / spread)])
    b = np.concatenate([found / NOISE, prior / spread])
    return np.asarray(lsq_linear(a, b, bounds=(0, np.inf)).x)
