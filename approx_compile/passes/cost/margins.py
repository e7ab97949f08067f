"""Margins that a predicted or measured saving must reach before a product is sampled, shares indices, or skips zeros."""

from __future__ import annotations

from dataclasses import dataclass

from approx_compile.machine import Machine

MARGIN = 1.2
"""Ratio of predicted exact to predicted sampled time that a site must exceed (benchmarks/cost_model/predict.py measures how far predictions are off)."""

CONV_MARGIN = 1.5
"""The same for convolutions. It is larger because Inductor chooses the memory layout of their gathers, after this decision."""

QUICK_MARGIN = 1.25
"""Factor on both margins where the machine's profile was measured quickly."""

LEAST_LAUNCHES = 30
"""The time saved must also exceed this many kernel launches. What the expressions leave out (allocations, checks, dispatch) grows with the number of launches:
sampling small sites (up to 500 us) took longer than predicted by 9 launches in the median and by 31 at the 90th percentile (predict.csv, times of aa6a4e4)."""

MEASURED_MARGIN = 1.05
"""The margin where times were measured: each is a median, which repeats within a few percent."""

SHARE_MARGIN = 1.1
"""Ratio of the time with separate indices to the time with shared indices that sharing must reach. Sharing between query, key and value raises the error of the
gradient by a tenth on average, between gate and up not at all (benchmarks/accuracy/share_study.py); keeping more entries
would undo a tenth at about this price."""

SKIP_MARGIN = 1.05
"""The margin for skipping zeros and for narrowing producers, which cost no accuracy."""


def pays(exact_us: float, sampled_us: float, margin: float) -> bool:
    """Return whether the first time exceeds the second by more than the factor `margin`.

    Args:
        exact_us: Time without the change, in us.
        sampled_us: Time with the change, in us.
        margin: Ratio of the two that must be exceeded.
    """
    return exact_us > margin * sampled_us


@dataclass(frozen=True)
class Threshold:
    """What sampling a site must save.

    Attributes:
        speedup: The ratio of exact to sampled time that must be exceeded.
        saved_us: The time saved that must be exceeded, in us.
    """

    speedup: float
    saved_us: float = 0.0

    def is_exceeded(self, exact_us: float, sampled_us: float) -> bool:
        """Return whether the times of a site, in us, call for sampling it."""
        return pays(exact_us, sampled_us, self.speedup) and exact_us - sampled_us > self.saved_us

    def missed(self, exact_us: float, sampled_us: float) -> str:
        """Return which condition the times of a site, in us, do not fulfil."""
        if not pays(exact_us, sampled_us, self.speedup):
            return f"must exceed {self.speedup:.3g}x"
        saved, least = (f"{us:.2g}" if us < 10 else f"{us:.0f}" for us in (exact_us - sampled_us, self.saved_us))
        return f"saves {saved} us, must exceed {least} us"


def threshold(kind: str, machine: Machine) -> Threshold:
    """Return what sampling a site must save by predicted times.

    Args:
        kind: Kind of the site; "conv" has a larger margin than the others.
        machine: Profile with the time of a launch, and whether it was measured quickly.
    """
    speedup = (CONV_MARGIN if kind == "conv" else MARGIN) * (QUICK_MARGIN if machine.quick else 1)
    return Threshold(speedup, LEAST_LAUNCHES * machine.table("kernel").at())
