"""Time a call on one device: the timer that microbenchmarks, the timing of single sites and the trials of `tune` share.

A CUDA device is synchronised before and after each sample. On a CPU with one thread the timer counts the CPU time of the process instead of wall-clock
time, so that other processes on a busy machine do not disturb it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Run = Callable[[], Any]


class BenchmarkTimer:
    """Measure the seconds that a call takes.

    Attributes:
        least: Seconds that all samples of a measurement take together, at least.
        wait: Waits until the device has finished its work.
        now: The clock, in seconds: `time.process_time` on a CPU with one thread, else `time.perf_counter`.
    """

    def __init__(self, device: str, least: float) -> None:
        """Choose the clock for a device.

        Args:
            device: "cpu" or "cuda".
            least: Seconds that all samples of a measurement take together, at least.
        """
        self.least = least
        self.wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        single_threaded = device == "cpu" and torch.get_num_threads() == 1
        self.now = time.process_time if single_threaded else time.perf_counter

    def __call__(self, run: Run) -> float:
        """Return the seconds of one call: the fastest of at least three samples that take at least `least` seconds together, after one warm-up call."""
        run()
        calls = self.calls(run, self.least / 6)
        samples: list[float] = []
        spent = 0.0
        while len(samples) < 3 or spent < self.least:
            samples.append(self.sample(run, calls))
            spent += samples[-1] * calls
        return min(samples)

    def calls(self, run: Run, seconds: float | None = None) -> int:
        """Estimate from a single call how many calls take `seconds` together (by default `least`); at least one."""
        return max(1, int((self.least if seconds is None else seconds) / max(self.sample(run, 1), 1e-7)))

    def sample(self, run: Run, calls: int) -> float:
        """Return the mean seconds of a call over `calls` calls in a row."""
        self.wait()
        start = self.now()
        for _ in range(calls):
            run()
        self.wait()
        return (self.now() - start) / calls

    def in_turn(self, runs: Sequence[Run], calls: Sequence[int] | None = None) -> Iterator[tuple[float, ...]]:
        """Sample several runs in turn (A B A B), so that a machine that becomes slower or faster meanwhile affects all of them alike.

        Args:
            runs: What to time.
            calls: How many calls of each run make a sample; by default one.

        Yields:
            Round by round, without end, the mean seconds of a call of each run.
        """
        while True:
            yield tuple(self.sample(run, n) for run, n in zip(runs, calls or [1] * len(runs), strict=True))
