"""Margins that a predicted or measured saving must reach before a product is sampled, shares indices, or skips zeros."""

from __future__ import annotations

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


def is_worth_sampling(kind: str, exact_us: float, sampled_us: float, machine: Machine) -> bool:
    """Return whether the predicted times of a site call for sampling it.

    Args:
        kind: Kind of the site; "conv" has a larger margin than the others.
        exact_us: Predicted time of the exact products, in us.
        sampled_us: Predicted time of the sampled products, in us.
        machine: Profile with the time of a launch, and whether it was measured quickly.
    """
    margin = (CONV_MARGIN if kind == "conv" else MARGIN) * (QUICK_MARGIN if machine.quick else 1)
    least = LEAST_LAUNCHES * machine.table("kernel").at()
    return pays(exact_us, sampled_us, margin) and exact_us - sampled_us > least
