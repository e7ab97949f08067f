"""Time a training step of the user's own model under Inductor and under this backend, in turn in one process."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from approx_compile import _torch
from approx_compile._torch import known_faults
from approx_compile.backend import Backend
from approx_compile.config import ApproxConfig
from approx_compile.machine import device_name
from approx_compile.machine.timer import BenchmarkTimer
from approx_compile.utils import counted, printed

WARM_UP = 2
"""The number of rounds that are run before any is timed; compilation happens in them."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a step: the median, and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @staticmethod
    def of(times: list[float]) -> Timing:
        """Summarize the times of several steps.

        Args:
            times: Milliseconds, at least one.

        Returns:
            Their median and percentiles.
        """
        fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        return Timing(statistics.median(times), fifths[0], fifths[-1])


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    inductor: Timing
    approx: Timing
    speedup: float
    """The median time under Inductor divided by the median time under approx."""
    speedup_p20: float
    """The 20th percentile of the speed-ups of the single rounds."""
    speedup_p80: float
    """The 80th percentile of the speed-ups of the single rounds."""
    repeats: int
    threads: int
    device: str
    torch: str
    python: str

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        table = Table("backend", "median, ms", "20th to 80th percentile")
        for name, timing in (("inductor", self.inductor), ("approx", self.approx)):
            table.add_row(name, f"{timing.median_ms:.3f}", f"{timing.p20_ms:.3f} to {timing.p80_ms:.3f}")
        ratio = f"approx is {self.speedup:.2f}x as fast as Inductor ({self.speedup_p20:.2f} to {self.speedup_p80:.2f})"
        conditions = f"{self.repeats} steps of each in turn, forward and backward, without an optimizer"
        return f"{printed(table)}\n{ratio}; {conditions}; {counted(self.threads, 'thread')}, {self.device}, torch {self.torch}"


def compare(model: Callable[..., Any], *args: Any, config: ApproxConfig | Mapping[str, Any] | None = None, repeats: int = 15, **kwargs: Any) -> Comparison:
    """Time a training step (forward pass, `loss_of`, backward pass) of a model under Inductor and under this backend, in turn (A B A B).

    The model's gradients are cleared. Buffers, such as BatchNorm's statistics, change as in training.

    Args:
        model: The model or function.
        *args: Its positional arguments.
        config: The settings of this backend.
        repeats: The number of timed steps of each backend, after two of each for compilation.
        **kwargs: The model's keyword arguments.

    Returns:
        Times and speed-ups.

    Raises:
        ValueError: If `repeats` is below 1, or no gradient flows to the model's output.
        ConfigError: If the settings are not valid.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; at least 1 is expected")
    backend = Backend(config)
    contestants = {"inductor": torch.compile(model, backend=known_faults.inductor), "approx": torch.compile(model, backend=backend)}
    steps = {name: _step(model, compiled, args, kwargs) for name, compiled in contestants.items()}
    times = race(steps, repeats)
    rounds = Timing.of([a / b for a, b in zip(times["inductor"], times["approx"], strict=True)])
    inductor, approx = Timing.of(times["inductor"]), Timing.of(times["approx"])
    return Comparison(
        inductor=inductor,
        approx=approx,
        speedup=inductor.median_ms / approx.median_ms,
        speedup_p20=rounds.p20_ms,
        speedup_p80=rounds.p80_ms,
        repeats=repeats,
        threads=torch.get_num_threads(),
        device=device_name("cuda" if torch.cuda.is_available() else "cpu"),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def race(steps: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = WARM_UP, now: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Time several steps in turn (A B A B).

    Args:
        steps: The steps by name.
        rounds: The number of times that each step is timed.
        warm_up: The number of times that each step runs before.
        now: The clock, in seconds.

    Returns:
        Milliseconds of every step, round by round.
    """
    timer = BenchmarkTimer("cuda" if torch.cuda.is_available() else "cpu", 0.0)
    timer.now = now
    seconds = list(itertools.islice(timer.in_turn(list(steps.values())), warm_up, warm_up + rounds))
    return {name: [row[i] * 1e3 for row in seconds] for i, name in enumerate(steps)}


def _step(model: Callable[..., Any], compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], None]:
    leaves = [t for t in _torch.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.requires_grad]
    leaves += list(model.parameters()) if isinstance(model, nn.Module) else []

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss_of(compiled(*args, **kwargs)).backward()

    return step


def loss_of(output: Any) -> Tensor:
    """Find or compute the scalar that a step's backward pass starts from.

    Args:
        output: What the model returned.

    Returns:
        The output's own `loss` (attribute or key); else the only tensor that needs a gradient, if it is a scalar; else the sum
        of the mean squares of these tensors.

    Raises:
        ValueError: If no gradient flows to any of them.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    tensors = [t for t in _torch.tree_leaves(loss if isinstance(loss, Tensor) else output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError(f"the model returned {type(output).__name__} without a tensor that needs a gradient: there is no training step to time")
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 0 else torch.stack([t.abs().square().mean().float() for t in tensors]).sum()
