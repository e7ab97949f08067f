"""Predict the share of a training step's time that a plan saves, from measurements of a few whole steps.

    saved = sum over sites of rate[group] * (FLOPs saved there / FLOPs of all sites) - sum over sampled sites of overhead[group]

Sites with the same op, shape and dtype form a group. A size that is a symbol in one trial and a number in another counts as the number that it was traced
with. FLOPs are those of the plan, so that work which two sites both save (zeros that are skipped) is counted once. The rates are fitted to whole compiled
steps, because the operations that a site can be fused with are those of its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from approx_compile.passes.planning.plan import SitePlan

NOISE = 0.01
"""The assumed standard deviation of a measured share of the step's time."""

SPREAD = 0.5
"""The expected relative deviation of a group's rate from the mean rate. This prior decides if little was measured."""


def shape_of(site: SitePlan) -> str:
    """Write a site's shape in numbers.

    Args:
        site: The site as planned.

    Returns:
        Its shape. Symbols are replaced by the sizes that they were traced with.
    """
    shape = site.shape
    for expression, size in sorted(site.traced, key=lambda t: -len(t[0])):  # the longest first, because s3 is a part of 2*s3 and of s33
        shape = shape.replace(expression, str(size))
    return shape


def group_of(site: SitePlan) -> str:
    """Name the group of sites with the same op, shape and dtype.

    Args:
        site: The site as planned.

    Returns:
        The group's name.
    """
    return f"{site.op} {shape_of(site)} {site.dtype}"


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan, and the share of the exact step's time that it was measured to save."""

    sites: tuple[SitePlan, ...]
    saved: float


class StepTimeModel:
    """The model in the docstring of this module, fitted to measured plans. Without measured plans, time is assumed to be proportional to FLOPs.

    Args:
        sites: All sites of the exact step.
        measured: The measured plans.
    """

    def __init__(self, sites: Sequence[SitePlan], measured: Sequence[MeasuredPlan]) -> None:
        self.flops = max(1, sum(s.flops_exact for s in sites))
        self.groups = list(dict.fromkeys(map(group_of, sites)))
        saved = np.array([m.saved for m in measured])
        rows = np.array([self._features(m.sites) for m in measured]).reshape(len(measured), 2 * len(self.groups))
        n = len(self.groups)
        if not n:
            self.rates = np.zeros(0)
            return
        mean, overhead = _solve(np.stack([rows[:, :n].sum(1), rows[:, n:].sum(1)], 1), saved, np.array([1.0, 0.0]), np.array([1.0, 0.01]))
        prior = np.repeat([mean, overhead], n)
        self.rates = _solve(rows, saved, prior, np.maximum(SPREAD * prior, [*[0.05] * n, *[0.002] * n]))

    def rate(self, site: SitePlan) -> float:
        """Return the fitted rate of a site's group.

        Args:
            site: The site as planned.

        Returns:
            The share of the step's time saved for each share of its FLOPs.
        """
        return float(self.rates[self.groups.index(group_of(site))])

    def saved(self, sites: Sequence[SitePlan]) -> float:
        """Predict the time that a plan saves.

        Args:
            sites: The sites as planned.

        Returns:
            A share of the exact step's time.
        """
        return float(self._features(sites) @ self.rates)

    def _features(self, sites: Sequence[SitePlan]) -> np.ndarray:
        features = np.zeros(2 * len(self.groups))
        for s in sites:
            g = self.groups.index(group_of(s))
            features[g] += (s.flops_exact - s.flops_sampled) / self.flops
            features[len(self.groups) + g] -= s.decision == "sampled"
        return features


def _solve(rows: np.ndarray, measured: np.ndarray, prior: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Solve a non-negative least squares problem, with a prior for the unknowns that the rows leave undetermined."""
    from scipy.optimize import lsq_linear  # imported here because only tuning needs it

    a = np.concatenate([rows / NOISE, np.diag(1 / spread)])
    b = np.concatenate([measured / NOISE, prior / spread])
    return np.asarray(lsq_linear(a, b, bounds=(0, np.inf)).x)
