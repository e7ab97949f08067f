"""Train one model twice, with torch.compile's Inductor and with approx_compile, and show both: `python examples/train.py --help`.

Both runs have the same initial weights and see the same batches in the same order. Each has a process of its own, so that its memory is its own;
they take turns, an epoch each, so that neither meets a busier machine; and both backends start with an empty compile cache. The loop
(`train_once`) is that of any PyTorch script; `backend=` is all that differs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import data
import models
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID
from rich.table import Table
from torch import Tensor, nn

from approx_compile import ApproxConfig, controls, explain
from approx_compile._torch.known_faults import inductor

BACKENDS = {"exact": inductor, "approx": "approx"}
"""What the table and the plot call a run, and the backend behind it."""

UNREST = 2.0
"""The ratio of slow to fast steps from which the times are said to be disturbed; an idle machine has 1.1 to 1.4."""


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


def reset_peak(device: torch.device) -> None:
    """Start to measure memory anew (where the system allows it; elsewhere the peak is that of the process so far)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """CUDA: the most that tensors held. Else: the process's largest resident size, libraries and data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


# --- what is shown ---


@dataclass(frozen=True)
class Summary:
    """All runs of one backend. Accuracies in percent, spread as sample standard deviation over seeds (nan for one seed), FLOPs of one step.

    `unrest`: the 90th percentile of the step times over the 10th.
    """

    name: str
    accuracy: float
    spread: float
    step_s: float
    unrest: float
    compile_s: float
    train_s: float
    flops: int
    peak_bytes: int


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of the matrix products of one training step, sampling included; `on_rows` of them are multiplied by the share of the batch kept."""

    exact: int
    approx: int
    on_rows: int

    def of(self, run: Run) -> int:
        return self.exact if run.name == "exact" else round(self.approx - (1 - run.kept) * self.on_rows)


def summarise(name: str, runs: Sequence[Run], flops: StepFlops) -> Summary:
    """Medians over the steps of all seeds; times and memory of a whole run as means; the compile time of the first run, whose cache was empty."""
    own = [r for r in runs if r.name == name]
    percent = [100 * r.accuracy for r in own]
    p10, *_, p90 = _deciles([t for r in own for t in r.step_s])
    step_s = statistics.median(t for r in own for t in r.step_s)
    return Summary(
        name,
        statistics.mean(percent),
        statistics.stdev(percent) if len(own) > 1 else float("nan"),
        step_s,
        p90 / p10,
        max(0.0, own[0].first_step_s - step_s),
        statistics.mean(sum(r.step_s) for r in own),
        round(statistics.mean(flops.of(r) for r in own)),
        round(statistics.mean(r.peak_bytes for r in own)),
    )


def _deciles(times: Sequence[float]) -> list[float]:
    return statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [*times] * 9


def step_flops(settings: Settings, dataset: data.Dataset) -> StepFlops:
    """What `explain` counts, forward and backward."""
    model = models.build(settings.model, dataset.shape, dataset.classes, settings.width).to(settings.device)
    report = explain(model, dataset.train_x[: settings.batch_size], config=dict(settings.options))
    adaptive = [c.ratio is None for c in report.cuts]
    on_rows = sum(p.flops_sampled for s in report.sites for p in s.products.values() if p.decision == "rows") if any(adaptive) else 0
    return StepFlops(report.flops_exact, report.flops_sampled, on_rows)


def table(summaries: Sequence[Summary]) -> Table:
    shown = Table(title="Same weights, same batches, two backends")
    for column in ("run", "test accuracy %", "ms / step", "speed-up", "training s", "compile s", "GFLOP / step", "peak MiB"):
        shown.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for s in summaries:
        spread = "" if s.spread != s.spread else f" ± {s.spread:.2f}"
        numbers = (f"{1e3 * s.step_s:.2f}", f"{summaries[0].step_s / s.step_s:.2f}x", f"{s.train_s:.1f}", f"{s.compile_s:.1f}")
        shown.add_row(s.name, f"{s.accuracy:.2f}{spread}", *numbers, f"{s.flops / 1e9:.3g}", f"{s.peak_bytes / 2**20:.0f}")
    return shown


def conclusions(exact: Summary, approx: Summary, seeds: int) -> list[str]:
    """What was measured, in sentences, whatever it is."""
    whole = (exact.train_s + exact.compile_s) / (approx.train_s + approx.compile_s)
    difference = f"Accuracy, approx less exact: {approx.accuracy - exact.accuracy:+.2f} points."
    if seeds == 1:
        meaning = "One seed has no spread to compare that with; a difference below the spread over seeds means nothing (--seeds 3 shows it)."
    else:
        meaning = f"A difference below the spread over the {seeds} seeds (± is their sample standard deviation) means nothing."
    unrest = max(exact.unrest, approx.unrest)
    busy = [f"Step times vary {unrest:.1f}-fold (90th over 10th percentile): the machine was busy with other work; measure again when it is idle."]
    return [
        f"Speed-up: {exact.step_s / approx.step_s:.2f}x per step (medians), {whole:.2f}x for training and compiling together.",
        *(busy if unrest > UNREST else ()),
        f"{difference} {meaning}",
        "Training seconds leave out evaluation and the first step, which compiles (compile s, with an empty cache).",
        "FLOPs are those of the matrix products, forward and backward, sampling included.",
        "Peak memory is that of the training steps: on a CPU the process's resident size, libraries and data included; on CUDA what tensors held.",
    ]


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Test accuracy over steps and over training seconds: the mean over seeds and a band of one sample standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, colour in zip(BACKENDS, ("tab:blue", "tab:orange"), strict=True):
        curves = [r.curve for r in runs if r.name == name]
        points = list(zip(*curves, strict=True))  # one tuple per epoch, of all seeds
        mean = [100 * statistics.mean(p.accuracy for p in epoch) for epoch in points]
        spread = [100 * statistics.stdev(p.accuracy for p in epoch) if len(curves) > 1 else 0.0 for epoch in points]
        steps = [epoch[0].step for epoch in points]
        seconds = [statistics.mean(p.seconds for p in epoch) for epoch in points]
        for axis, x in ((left, steps), (right, seconds)):
            axis.plot(x, mean, color=colour, label=f"{name} ({mean[-1]:.2f} %)", marker="." if len(x) < 40 else None)
            if len(curves) > 1:
                low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    left.set(xlabel="training steps", ylabel="test accuracy (%)")
    right.set(xlabel="training seconds (without compiling and evaluating)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_rows(runs: Sequence[Run], settings: Settings, flops: StepFlops, path: Path) -> None:
    """One JSON object per run and line: the result, its settings and what it ran on."""
    device = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else platform.processor() or platform.machine()
    with path.open("w") as file:
        for r in runs:
            p10, *_, p90 = _deciles(r.step_s)
            row = {
                "run": r.name,
                "seed": r.seed,
                "dataset": settings.dataset,
                "model": settings.model,
                "width": settings.width,
                "epochs": settings.epochs,
                "batch_size": settings.batch_size,
                "lr": settings.lr,
                "limit": settings.limit,
                "options": dict(settings.options) if r.name == "approx" else {},
                "test_accuracy": r.accuracy,
                "steps": r.curve[-1].step,
                "step_s_p10": p10,
                "step_s_p50": statistics.median(r.step_s),
                "step_s_p90": p90,
                "first_step_s": r.first_step_s,
                "train_s": sum(r.step_s),
                "flops_per_step": flops.of(r),
                "rows_kept": r.kept,
                "peak_bytes": r.peak_bytes,
                "curve": [[p.step, p.seconds, p.loss, p.accuracy] for p in r.curve],
                "device": device,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            file.write(json.dumps(row) + "\n")


# --- the command ---

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_APPROX = "The approx backend"


@app.command(help="Train the same model with torch.compile's Inductor and with approx_compile; compare accuracy, time, FLOPs and memory.")
def main(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.NAMES)}.")] = "digits",
    directory: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Where the data set's files are (not for digits).")] = None,
    model: Annotated[str, typer.Option(help=f"One of {models.VALID}.")] = "mlp",
    width: Annotated[int | None, typer.Option(min=1, help="Hidden units of mlp, channels of the first stage of the others.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training samples; each ends with an evaluation.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="A last, smaller batch of an epoch is left out: one shape is compiled.")] = 256,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train on the first N samples.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per backend, each with other weights and batches.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the plot goes.")] = Path("out"),
    rows: Annotated[bool, typer.Option("--json", help="Also write one JSON line per run.")] = False,
    ratio: Annotated[float | None, typer.Option(help="Kept share of a sampled axis.", rich_help_panel=_APPROX)] = None,
    method: Annotated[str | None, typer.Option(help="Which indices are kept: topk, crs, ...", rich_help_panel=_APPROX)] = None,
    sampling: Annotated[str | None, typer.Option(help="forward, backward or blackbox.", rich_help_panel=_APPROX)] = None,
    group: Annotated[str | None, typer.Option(help="Contiguous indices kept together, or auto.", rich_help_panel=_APPROX)] = None,
    policy: Annotated[str | None, typer.Option(help="adaptive: rows of the batch; cost; or always: every legal site.", rich_help_panel=_APPROX)] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # in a file no line need be broken
    given = {"ratio": ratio, "method": method, "sampling": sampling, "group": int(group) if group and group.isdecimal() else group, "policy": policy}
    options = {k: v for k, v in given.items() if v is not None}
    try:  # DataError and ConfigError are ValueErrors
        ApproxConfig.of(options)
        settings = Settings(dataset, directory, model, width, epochs, batch_size, lr, limit, _device(device), options)
        loaded = load(settings)
        models.build(model, loaded.shape, loaded.classes, width)
        samples = len(loaded.train_x)
        steps = epochs * (samples // batch_size)
        if steps < 2:
            raise ValueError(f"--epochs {epochs}, --batch-size {batch_size} and {samples} training samples make {steps} steps; at least 2 are needed")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    title = f"{model}{f' (width {width})' if width else ''} on {dataset}, {samples} training images, batches of {batch_size}"
    decisions = ", ".join(f"{k} {v}" for k, v in options.items()) or "the backend's own decisions"
    console.print(f"{title}; {epochs} epochs, {steps} steps per run, {settings.device}; approx: {decisions}", highlight=False, soft_wrap=True)
    flops = step_flops(settings, loaded)
    del loaded
    try:
        runs = train_all(settings, seeds, steps, console)
    except RuntimeError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(1) from None
    exact, approx = (summarise(name, runs, flops) for name in BACKENDS)
    console.print(table((exact, approx)))
    left_out = samples % batch_size
    dropped = [f"The last {left_out} of an epoch's {samples} samples, a smaller batch, are left out: one shape is compiled."] if left_out else []
    plot(runs, title, out / "train.png")
    written = [out / "train.png"]
    if rows:
        write_rows(runs, settings, flops, out / "train.jsonl")
        written.append(out / "train.jsonl")
    for line in (*conclusions(exact, approx, seeds), *dropped, f"Written: {', '.join(map(str, written))}"):
        console.print(line, highlight=False, soft_wrap=True)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"--device: got {name!r}; auto, cpu, cuda or cuda:N is expected")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {name!r}, and torch sees no CUDA device here; cpu works")
    return name


if __name__ == "__main__":
    app()
