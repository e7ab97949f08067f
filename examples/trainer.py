"""Train one model under several backends, each in a process of its own, in turn.

All runs have the same initial weights and see the same batches in the same order. Each has a process of its own, so that its memory is its own; they
take turns, an epoch each, so that none meets a busier machine; and every backend starts with an empty compile cache. The loop (`train_once`) is that of
any PyTorch script; `backend=` is all that differs.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import data
import models
import torch
import torch.nn.functional as F
from peak_memory import peak_bytes, reset_peak
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID
from torch import Tensor, nn

from approx_compile import controls
from approx_compile._torch.known_faults import inductor

BACKENDS = {"exact": inductor, "approx": "approx"}
"""What the table and the plot call a run, and the backend behind it."""


@dataclass(frozen=True)
class Settings:
    """What all runs have in common. `options` are the approx backend's; empty: its own decisions."""

    dataset: str
    directory: Path | None
    model: str
    width: int | None
    epochs: int
    batch_size: int
    lr: float
    limit: int | None
    device: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The test set's verdict after `step` steps and `seconds` of training. `accuracy` in [0, 1], `loss` the mean cross entropy of the epoch's batches."""

    step: int
    seconds: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """One training. The first step, which compiles, is kept apart from the others (`step_s`); `peak_bytes` is the most memory held while stepping; `kept`
    the mean share of the batch that policy "adaptive" took through the backward pass."""

    name: str
    seed: int
    first_step_s: float
    step_s: tuple[float, ...]
    peak_bytes: int
    curve: tuple[Point, ...]
    kept: float = 1.0

    @property
    def accuracy(self) -> float:
        return self.curve[-1].accuracy


# --- one training ---


def train_once(name: str, seed: int, settings: Settings, turn: Callable[[], object], tell: Callable[[Point | None], object]) -> Run:
    """Train and evaluate. `turn` is called before every epoch and may wait; `tell` hears of every step (None) and every evaluation (a Point)."""
    device = torch.device(settings.device)
    dataset = load(settings)
    torch.manual_seed(seed)
    model = models.build(settings.model, dataset.shape, dataset.classes, settings.width).to(device)
    compiled: Any = torch.compile(model, backend=BACKENDS[name], options=(dict(settings.options) or None) if name == "approx" else None)
    # fused: one pass over the weights, or on a CPU the optimizer takes as long as the products
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    order = torch.Generator().manual_seed(seed)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(dataset.train_x[batch]), dataset.train_y[batch])
        loss.backward()
        optimizer.step()
        return loss.detach()

    samples = len(dataset.train_x)
    times: list[float] = []
    curve: list[Point] = []
    peak = 0
    for _ in range(settings.epochs):
        turn()
        model.train()
        losses = []
        reset_peak(device)
        # a last batch of another size would be compiled anew, so it is left out; every epoch draws anew which samples that hits
        for batch in torch.randperm(samples, generator=order).split(settings.batch_size)[: samples // settings.batch_size]:
            start = time.perf_counter()
            losses.append(step(batch.to(device)))
            _wait(device)
            times.append(time.perf_counter() - start)
            if len(times) == 1:  # the compiler's memory is not the training's
                reset_peak(device)
            tell(None)
        peak = max(peak, peak_bytes(device))
        loss = torch.stack(losses).mean().item()
        curve.append(Point(len(times), sum(times[1:]), loss, accuracy(compiled, dataset.test_x, dataset.test_y, settings.batch_size)))
        tell(curve[-1])
    kept = [c.kept for c in controls(model).values()]
    return Run(name, seed, times[0], tuple(times[1:]), peak, tuple(curve), statistics.mean(kept) if kept else 1.0)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """The share of `x` that the model, in evaluation mode, classifies as `y`."""
    model.eval()
    hits = 0
    with torch.no_grad():
        for i in range(0, len(x), batch_size):
            labels = y[i : i + batch_size]
            # the last batch is filled up: one shape for the compiler
            images = F.pad(x[i : i + batch_size], (0, 0, 0, 0, 0, 0, 0, batch_size - len(labels)))
            hits += int((model(images)[: len(labels)].argmax(1) == labels).sum())
    return hits / len(x)


def load(settings: Settings) -> data.Dataset:
    """The data set on the runs' device, cut to `limit` training samples."""
    full = data.load(settings.dataset, settings.directory)
    train_x, train_y = (t[: settings.limit].to(settings.device) for t in (full.train_x, full.train_y))
    return replace(full, train_x=train_x, train_y=train_y, test_x=full.test_x.to(settings.device), test_y=full.test_y.to(settings.device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- a process for every training ---


class Worker:
    """A fresh process that does one training, an epoch whenever it is its turn, compiling into `cache`."""

    def __init__(self, name: str, seed: int, settings: Settings, cache: Path, tell: Callable[[Point | str | None], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.what = f"{name} run with seed {seed}"
        self.tell = tell
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(name, seed, settings, cache, theirs))
        self.process.start()
        theirs.close()

    def until_ready(self) -> None:
        """Wait until it has loaded its data and model."""
        self._until("ready")

    def epoch(self) -> Run | None:
        """One epoch with its evaluation; after the last one, the result. Raises RuntimeError if the process dies (its traceback is on stderr)."""
        with contextlib.suppress(ConnectionError):  # if it is dead, the wait for its answer says so
            self.connection.send("go")
        result: Run | None = self._until("ready", "done")
        if result is not None:  # it clears up and exits, which must not take time from the next in turn
            self.process.join()
        return result

    def end(self) -> None:
        self.process.terminate()
        self.process.join()

    def _until(self, *kinds: str) -> Any:
        try:
            while True:
                kind, content = self.connection.recv()
                if kind in kinds:
                    return content
                self.tell(content)
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(f"the {self.what} ended with exit code {self.process.exitcode} before it was done") from None


def _child(name: str, seed: int, settings: Settings, cache: Path, connection: Connection) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    logging.captureWarnings(True)
    for logger in map(logging.getLogger, ("approx_compile", "py.warnings")):
        logger.addHandler(_Send(connection))
        logger.propagate = False

    def turn() -> None:
        connection.send(("ready", None))
        connection.recv()

    run = train_once(name, seed, settings, turn, lambda news: connection.send(("news", news)))
    connection.send(("done", run))


class _Send(logging.Handler):
    """Hands log messages to the parent, whose progress bar they would break."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(("news", record.getMessage().strip()))


def train_all(settings: Settings, seeds: int, steps: int, console: Console) -> list[Run]:
    """Every backend with the seeds 0 to `seeds` - 1, each run of `steps` steps. The backends take turns, an epoch each, so that both meet the same machine."""
    runs = []
    said: set[str] = set()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "steps", "{task.fields[latest]}")
    # seldom redrawn: the drawing takes time from the training
    with tempfile.TemporaryDirectory(prefix="approx-train-") as caches, Progress(*columns, console=console, refresh_per_second=2) as progress:

        def teller(task: TaskID) -> Callable[[Point | str | None], None]:
            def tell(news: Point | str | None) -> None:
                if news is None:
                    progress.update(task, advance=1, latest="")
                elif isinstance(news, Point):
                    progress.update(task, latest=f"test accuracy {news.accuracy:.2%}")
                elif news not in said:
                    said.add(news)
                    console.print(news, markup=False, highlight=False, soft_wrap=True, style="yellow")

            return tell

        for seed in range(seeds):
            tasks = {name: progress.add_task(f"{name:6} seed {seed}", total=steps, latest="") for name in BACKENDS}
            workers = {name: Worker(name, seed, settings, Path(caches, name), teller(task)) for name, task in tasks.items()}
            try:
                for worker in workers.values():
                    worker.until_ready()
                for _ in range(settings.epochs):
                    runs += [worker.epoch() for worker in workers.values()]
            finally:
                for worker in workers.values():
                    worker.end()
    return [r for r in runs if r is not None]
