"""A training step of the user's own model under Inductor and under this backend, in turn in one process."""

from __future__ import annotations

import io
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from approx_compile import _torch
from approx_compile._torch import known_faults
from approx_compile.backend import Backend
from approx_compile.config import ApproxConfig
from approx_compile.machine import device_name

WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a step: the median, and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @staticmethod
    def of(times: list[float]) -> Timing:
        fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        return Timing(statistics.median(times), fifths[0], fifths[-1])


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. `speedup`: Inductor's median over approx's; `speedup_p20`, `speedup_p80`: of the ratios round by round."""

    inductor: Timing
    approx: Timing
    speedup: float
    speedup_p20: float
    speedup_p80: float
    repeats: int
    threads: int
    device: str
    torch: str
    python: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = Table("backend", "median, ms", "20th to 80th percentile")
        for name, timing in (("inductor", self.inductor), ("approx", self.approx)):
            table.add_row(name, f"{timing.median_ms:.3f}", f"{timing.p20_ms:.3f} to {timing.p80_ms:.3f}")
        out = io.StringIO()
        Console(file=out, width=120).print(table)
        ratio = f"approx is {self.speedup:.2f}x as fast as Inductor ({self.speedup_p20:.2f} to {self.speedup_p80:.2f})"
        how = f"{self.repeats} steps of each in turn, forward and backward, without an optimizer"
        return f"{out.getvalue()}{ratio}; {how}; {self.threads} threads, {self.device}, torch {self.torch}"


def compare(model: Callable[..., Any], *args: Any, config: ApproxConfig | Mapping[str, Any] | None = None, repeats: int = 15, **kwargs: Any) -> Comparison:
    """Time a training step (forward, `loss_of`, backward) of `model(*args, **kwargs)` under Inductor and under this backend with `config`, A B A B, after
    two steps of each for compiling. The model's gradients are cleared; buffers such as BatchNorm's statistics move on, as in training."""
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; at least 1 is expected")
    backend = Backend(config)
    contest = {"inductor": torch.compile(model, backend=known_faults.inductor), "approx": torch.compile(model, backend=backend)}
    steps = {name: _step(model, compiled, args, kwargs) for name, compiled in contest.items()}
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
    """Milliseconds of every step, taken in turn A B A B after `warm_up` rounds, by a clock in seconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + warm_up):
        for name, step in steps.items():
            _wait()
            start = now()
            step()
            _wait()
            if i >= warm_up:
                times[name].append((now() - start) * 1e3)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _step(model: Callable[..., Any], compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], None]:
    leaves = [t for t in _torch.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.requires_grad]
    leaves += list(model.parameters()) if isinstance(model, nn.Module) else []

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss_of(compiled(*args, **kwargs)).backward()

    return step


def loss_of(output: Any) -> Tensor:
    """What a step goes back from: the output's own `loss` (attribute or key), an output that is one number, else the mean square of its floating tensors.

    Raises ValueError if no gradient flows to any of them."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    tensors = [t for t in _torch.tree_leaves(own if isinstance(own, Tensor) else output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError(f"the model returned {type(output).__name__} without a tensor that needs a gradient: there is no training step to time")
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 0 else torch.stack([t.abs().square().mean().float() for t in tensors]).sum()
