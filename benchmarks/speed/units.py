"""Speed of the methods of the study of sampling on CPUs beside Inductor: `python -m benchmarks.speed.units wide|narrow|small`, with `--rounds`, `--threads`.

- `wide`: a training step of an MLP 784-4096-4096-4096-10 at batch 256 under `dropout` and `adaptive_dropout` at half the units, without and with the optimizer,
  and its hidden layers alone: what a network with two more hidden layers takes longer.
- `narrow`: the steps of an epoch of an MLP 784-1000-1000-1000-10 at batch 20, under `alsh` at 5% of the units, `mc` and the others.
- `small`: the same at batch 1.

Contestants are timed in turn in one process (A B A B). Every result is a row in benchmarks/results/units.csv.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from approx_compile._torch.known_faults import inductor
from approx_compile.config import presets
from approx_compile.tools import compare
from benchmarks.common.races import SPEED_COLUMNS, raced, raced_times
from benchmarks.common.rows import show, store
from benchmarks.common.works import mlp

HALF: dict[str, dict[str, Any]] = {m: {"policy": "always", "method": m, "ratio": 0.5} for m in ("dropout", "adaptive_dropout")}
STUDY: dict[str, dict[str, Any]] = {m: {"policy": "always", "method": m, "ratio": 0.05} for m in ("alsh", "dropout", "adaptive_dropout")} | {
    "mc": presets.mc(),
    "mc, policy cost": presets.mc(policy="cost"),
    "default": {},
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
app = typer.Typer(help=__doc__)
Rounds = Annotated[int, typer.Option(help="timed steps of each")]
Threads = Annotated[int, typer.Option(help="torch's threads")]
Settings = Annotated[list[str] | None, typer.Option("--setting", help="only these settings")]


def stepper(widths: tuple[int, ...], batch: int, options: dict[str, Any] | None, optimizer: str | None) -> Callable[[], None]:
    """A training step; same weights and data for all. `options`: None for Inductor; `optimizer`: None for none."""
    torch.manual_seed(0)
    model = mlp(*widths)
    x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    compiled = torch.compile(model, backend=inductor) if options is None else torch.compile(model, backend="approx", options=options)
    update = OPTIMIZERS[optimizer](model.parameters(), lr=1e-4, fused=True) if optimizer is not None else None

    def step() -> None:
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(compiled(x), y).backward()
        if update is not None:
            update.step()

    return step


def race(
    title: str, make: Callable[[dict[str, Any] | None], Callable[[], None]], settings: dict[str, dict[str, Any]], rounds: int, bars: dict[str, float]
) -> None:
    """Time settings beside Inductor, each in turn with Inductor alone, and store the rows."""
    rows = []
    for name, options in settings.items():
        torch._dynamo.reset()
        rows += raced(title, {"inductor": make(None), name: make(options)}, rounds, bars)
    show("training step against Inductor", rows, SPEED_COLUMNS)
    store("units", rows)


def hidden(title: str, settings: dict[str, dict[str, Any]], rounds: int, bars: dict[str, float]) -> None:
    """Store rows for two hidden layers of a chain: the differences of times of networks with five and with three hidden layers, of the same round."""
    rows = []
    for name, options in settings.items():
        torch._dynamo.reset()
        contest = {(n, d): stepper((784, *[4096] * d, 10), 256, o, None) for n, o in (("inductor", None), (name, options)) for d in (3, 5)}
        times = compare.race({f"{n} {d}": step for (n, d), step in contest.items()}, rounds)
        rows += raced_times(title, {n: [b - a for a, b in zip(times[f"{n} 3"], times[f"{n} 5"], strict=True)] for n in ("inductor", name)}, rounds, bars)
    show("two hidden layers against Inductor", rows, SPEED_COLUMNS)
    store("units", rows)


def _only(settings: dict[str, dict[str, Any]], names: list[str] | None) -> dict[str, dict[str, Any]]:
    if unknown := set(names or ()) - set(settings):
        raise typer.BadParameter(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(settings)}")
    return {n: o for n, o in settings.items() if not names or n in names}


@app.command()
def wide(rounds: Rounds = 15, threads: Threads = 2, setting: Settings = None) -> None:
    """Dropout at half the units on a wide MLP: over all, and on the hidden chain."""
    torch.set_num_threads(threads)
    settings = _only(HALF, setting)
    widths = (784, 4096, 4096, 4096, 10)
    bars = {"dropout": 2.2, "adaptive_dropout": 1.8}
    race("MLP 784-3x4096-10, batch 256", lambda o: stepper(widths, 256, o, None), settings, rounds, bars)
    race("MLP 784-3x4096-10, batch 256, with SGD", lambda o: stepper(widths, 256, o, "sgd"), settings, rounds, {})
    hidden("two hidden layers of 4096 in a chain, batch 256", settings, rounds, {"dropout": 2.8})


@app.command()
def narrow(
    rounds: Rounds = 200, threads: Threads = 2, setting: Settings = None, optimizer: Annotated[str, typer.Option(help="sgd or adam")] = "adam", depth: int = 3
) -> None:
    """The study's network at batch 20, with the optimizer."""
    torch.set_num_threads(threads)
    widths = (784, *[1000] * depth, 10)
    bars = {"alsh": 1.0, "mc": 1.12}
    race(f"MLP 784-{depth}x1000-10, batch 20, {optimizer}", lambda o: stepper(widths, 20, o, optimizer), _only(STUDY, setting), rounds, bars)


@app.command()
def small(
    rounds: Rounds = 400, threads: Threads = 2, setting: Settings = None, optimizer: Annotated[str, typer.Option(help="sgd or adam")] = "sgd", depth: int = 3
) -> None:
    """The study's network at batch 1, with the optimizer."""
    torch.set_num_threads(threads)
    widths = (784, *[1000] * depth, 10)
    race(f"MLP 784-{depth}x1000-10, batch 1, {optimizer}", lambda o: stepper(widths, 1, o, optimizer), _only(STUDY, setting), rounds, {})


if __name__ == "__main__":
    app()
