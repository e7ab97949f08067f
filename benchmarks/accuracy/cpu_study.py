"""The study of sampling on CPUs (Ebrahimi, Advani, Asudeh) with this package: `python -m benchmarks.accuracy.cpu_study run|error|table`.

`run` trains MLPs of 1 to 7 hidden layers of 1,000 units with ReLU (10 and 20 for `mc`) by the methods of the paper at batch 1 and 20, with Adam (CIFAR-10:
SGD) at the paper's rates, the methods of one network in turn, an epoch each. A row of results/cpu_study.jsonl is one training: test accuracy by epoch,
seconds of an epoch in the forward pass, the backward pass and the optimizer, the most memory, the confusion matrix and the share of each predicted label. A
training that has its row is not repeated. `error` measures the error of a sampled forward pass by depth (theorem 7.2) in networks that were trained exactly,
for results/cpu_error.csv.

The paper's networks end in log-softmax with the negative log-likelihood, which is the cross entropy of the last layer here.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from approx_compile._torch.known_faults import inductor
from approx_compile.config import presets
from approx_compile.kernels.estimators import make_estimator
from approx_compile.kernels.gather import Axis, sample
from approx_compile.kernels.hash_tables import Hashing, HashTables, most_found
from approx_compile.kernels.unit_selection import UnitChoice, choose_units
from benchmarks.common.rows import RESULTS, conditions, console, show, store
from benchmarks.common.works import mlp
from examples import data
from examples.peak_memory import peak_bytes, reset_peak

PICKED = 0.05
"""The share of units that the paper picks for Dropout and Adaptive-Dropout, and the share that ALSH finds."""

METHODS: dict[str, dict[str, Any] | None] = {
    "standard": None,
    **{m: {"policy": "always", "method": m, "ratio": PICKED} for m in ("dropout", "adaptive_dropout", "alsh")},
    "mc": presets.mc(),
    "default": {},
}
ROWS = RESULTS / "cpu_study.jsonl"
CPU = torch.device("cpu")
app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Cell:
    """One network on one data set: what the methods are compared on."""

    dataset: str
    depth: int
    batch: int
    width: int = 1000

    def rate(self, method: str) -> float:
        """The learning rate: 1e-3, and 1e-4 for `mc` at batch 1."""
        return 1e-4 if method == "mc" and self.batch == 1 else 1e-3

    def key(self, method: str, seed: int) -> tuple[Any, ...]:
        return (self.dataset, self.depth, self.batch, method, seed)


@dataclass
class Training:
    """One training on its way; the seconds are those of all epochs but their first steps, which may compile."""

    model: nn.Module
    compiled: Any
    optimizer: torch.optim.Optimizer
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0, "optimizer": 0.0})
    timed: int = 0
    peak: int = 0
    curve: list[float] = field(default_factory=list)


def start(cell: Cell, method: str, seed: int, inputs: int, classes: int) -> Training:
    torch.manual_seed(seed)
    model = mlp(inputs, *[cell.width] * cell.depth, classes)
    options = METHODS[method]
    compiled = torch.compile(model, backend=inductor) if options is None else torch.compile(model, backend="approx", options=options)
    rate = cell.rate(method)
    sgd = cell.dataset == "cifar10"
    optimizer = torch.optim.SGD(model.parameters(), rate, fused=True) if sgd else torch.optim.Adam(model.parameters(), rate, fused=True)
    return Training(model, compiled, optimizer)


WARM = 3
"""Steps at the beginning of each epoch that are not timed."""


def epoch(t: Training, batches: list[Tensor], x: Tensor, y: Tensor) -> None:
    t.model.train()
    reset_peak(CPU)
    for i, batch in enumerate(batches):
        inputs, labels = x[batch], y[batch]
        marks = [time.perf_counter()]
        loss = F.cross_entropy(t.compiled(inputs), labels)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        t.optimizer.step()
        t.optimizer.zero_grad()
        marks.append(time.perf_counter())
        if i >= WARM:
            t.timed += 1
            for part, begin, end in zip(t.seconds, marks[:-1], marks[1:], strict=True):
                t.seconds[part] += end - begin
    t.peak = max(t.peak, peak_bytes(CPU))


def confusion(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> Tensor:
    """How many test images of each class (rows) are taken for each class (columns), by the exact network."""
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in x.split(1000)])
    return torch.bincount(y * classes + predicted, minlength=classes**2).view(classes, classes)


def done() -> set[tuple[Any, ...]]:
    stored = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return {(r["dataset"], r["depth"], r["batch"], r["method"], r["seed"]) for r in stored}


def split(name: str, directory: Path) -> data.Dataset:
    """A data set with flat images. The paper's training sets are smaller by the validation images, which are not used here either."""
    d = data.load(name, directory)
    kept = {"mnist": 55_000, "fashion-mnist": 55_000, "emnist-letters": 104_800, "cifar10": 45_000}.get(name, len(d.train_x))
    return data.Dataset(name, d.train_x[:kept].flatten(1), d.train_y[:kept], d.test_x.flatten(1), d.test_y, d.classes)


def run_cell(cell: Cell, d: data.Dataset, methods: list[str], epochs: int, samples: int | None, seed: int) -> None:
    """Train by the methods that have no row yet, in turn, an epoch each."""
    there = done()
    wanted = [m for m in methods if cell.key(m, seed) not in there]
    if not wanted:
        return
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # all models share one list of entries
    trainings = {m: start(cell, m, seed, d.train_x.shape[1], d.classes) for m in wanted}
    order = torch.Generator().manual_seed(seed)
    steps = min(samples or len(d.train_x), len(d.train_x)) // cell.batch
    for e in range(epochs):
        batches = list(torch.randperm(len(d.train_x), generator=order)[: steps * cell.batch].split(cell.batch))
        for t in trainings.values():
            epoch(t, batches, d.train_x, d.train_y)
            t.curve.append(100 * confusion(t.model, d.test_x, d.test_y, d.classes).diagonal().sum().item() / len(d.test_y))
        says = ", ".join(f"{m} {t.curve[-1]:.2f} ({sum(t.seconds.values()) / t.timed * 1e3:.2f} ms)" for m, t in trainings.items())
        console.print(f"{cell} epoch {e + 1}: {says}", highlight=False)
    full = len(d.train_x) // cell.batch
    with ROWS.open("a") as f:
        for m, t in trainings.items():
            table = confusion(t.model, d.test_x, d.test_y, d.classes)
            row = conditions() | {"dataset": cell.dataset, "depth": cell.depth, "width": cell.width, "batch": cell.batch, "method": m, "seed": seed}
            row |= {"epochs": epochs, "samples_of_an_epoch": steps * cell.batch, "rate": cell.rate(m), "beside": sorted(trainings)}
            row |= {f"{part}_s": round(s / t.timed * full, 3) for part, s in t.seconds.items()}  # seconds of a whole epoch
            row |= {"epoch_s": round(sum(t.seconds.values()) / t.timed * full, 3), "peak_mb": round(t.peak / 1e6, 1)}
            row |= {"final": round(t.curve[-1], 3), "curve": [round(c, 3) for c in t.curve]}
            row |= {"predicted": [round(p, 5) for p in (table.sum(0) / table.sum()).tolist()], "confusion": table.tolist()}
            f.write(json.dumps(row) + "\n")


@app.command()
def run(
    directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
    dataset: Annotated[list[str] | None, typer.Option(help="mnist, fashion-mnist, emnist-letters, cifar10; all by default")] = None,
    depth: Annotated[list[int] | None, typer.Option(help="hidden layers; 1, 3, 5, 7 by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes; 1 and 20 by default")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(METHODS)}; all by default")] = None,
    epochs: Annotated[int, typer.Option(help="epochs (the paper: 50)")] = 3,
    samples: Annotated[int | None, typer.Option(help="training images of an epoch, drawn anew for each; all by default")] = None,
    seed: Annotated[int, typer.Option(help="of weights and batches")] = 0,
    threads: Annotated[int, typer.Option(help="torch's threads")] = 2,
) -> None:
    """Train what is not in the results yet."""
    torch.set_num_threads(threads)
    if unknown := set(method or ()) - set(METHODS):
        raise typer.BadParameter(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    for name in dataset or ["mnist", "fashion-mnist", "emnist-letters", "cifar10"]:
        d = split(name, directory)
        for size in batch or [20, 1]:
            for layers in depth or [1, 3, 5, 7]:
                run_cell(Cell(name, layers, size), d, method or list(METHODS), epochs, samples, seed)


# --- theorem 7.2 ---


def sampled_layers(model: nn.Sequential, x: Tensor, method: str, tables: dict[int, HashTables]) -> list[Tensor]:
    """The hidden activations of a forward pass that is sampled by a method; exact for "standard"."""
    layers = [m for m in model if isinstance(m, nn.Linear)][:-1]
    found = []
    for i, layer in enumerate(layers):
        weight, bias = layer.weight, layer.bias
        if method in ("topk", "bernoulli"):  # the layer before is sampled
            estimator = make_estimator(method, weight.shape[1], 0.1, 10, 1)
            if i and estimator is not None:
                *_, a, b = sample(estimator, x, weight, Axis(1), Axis(1))
                x = F.relu(a @ b.t() + bias)
            else:
                x = F.relu(layer(x))
        elif method == "standard":
            x = F.relu(layer(x))
        else:
            estimator = make_estimator(method, weight.shape[0], PICKED, 1, 1)
            assert estimator is not None
            if method == "alsh":
                made = tables.setdefault(i, HashTables.make(Hashing(), i, weight))
                idx, scale = most_found(made.count(x, weight), estimator.k)
            else:
                idx, scale = choose_units(UnitChoice(estimator), x, weight.t(), bias, None, None)
            x = F.relu(layer(x)) * torch.zeros(weight.shape[0]).index_copy_(0, idx, scale)
        found.append(x)
    return found


def forward_errors(model: nn.Sequential, x: Tensor, method: str, batch: int) -> list[float]:
    """By hidden layer: |a - a'| / |a'| over all batches, where a is exact and a' sampled."""
    squares = []
    tables: dict[int, HashTables] = {}
    with torch.no_grad():
        for part in x.split(batch):
            pairs = zip(sampled_layers(model, part, "standard", tables), sampled_layers(model, part, method, tables), strict=True)
            squares.append([((a - b).square().sum().item(), b.square().sum().item()) for a, b in pairs])
    sums = [[sum(s[k][i] for s in squares) for i in (0, 1)] for k in range(len(squares[0]))]
    return [(error / max(size, 1e-30)) ** 0.5 for error, size in sums]


@app.command()
def error(
    directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
    dataset: Annotated[str, typer.Option(help="the data set")] = "mnist",
    depth: Annotated[int, typer.Option(help="hidden layers")] = 7,
    batch: Annotated[int, typer.Option(help="samples of a batch")] = 20,
    steps: Annotated[int, typer.Option(help="exact training steps of 100 samples before")] = 550,
    threads: Annotated[int, typer.Option(help="torch's threads")] = 2,
) -> None:
    """Measure the error of sampled forward passes by depth, beside ((c + 1) / c)^k - 1 with c from the first layer's error."""
    torch.set_num_threads(threads)
    d = split(dataset, directory)
    torch.manual_seed(0)
    model = mlp(d.train_x.shape[1], *[1000] * depth, d.classes)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for part in torch.randint(len(d.train_x), (steps, 100)):
        F.cross_entropy(model(d.train_x[part]), d.train_y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows, measured = [], conditions()
    for method in ("alsh", "dropout", "adaptive_dropout", "topk", "bernoulli"):
        errors = forward_errors(model, d.test_x[:1000], method, batch)
        first = 1 if method in ("topk", "bernoulli") else 0  # their first layer is exact
        for k, e in enumerate(errors[first:], 1):
            told = (errors[first] + 1) ** k - 1 if first < len(errors) else 0.0
            setting = {"dataset": dataset, "depth": depth, "batch": batch, "steps": steps, "method": method, "layer": k}
            rows.append(measured | setting | {"error": round(e, 4), "theorem": round(told, 4)})
    show("error of the sampled forward pass", rows, ("method", "layer", "error", "theorem"))
    store("cpu_error", rows)


@app.command()
def table() -> None:
    """Show the stored trainings."""
    stored = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    show(
        "study of sampling on CPUs", stored, ("dataset", "depth", "batch", "method", "seed", "epochs", "final", "forward_s", "backward_s", "epoch_s", "peak_mb")
    )


if __name__ == "__main__":
    app()
