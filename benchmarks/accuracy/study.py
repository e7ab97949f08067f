"""Training one model in several ways, in turn in one process: what the studies share. Rows are JSON lines; a run that has its row is not repeated."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor, nn

from approx_compile._torch.known_faults import inductor
from approx_compile.machine import device_name
from approx_compile.rows.ownership import budgets, controls
from benchmarks.common.plots import score_over_seconds
from benchmarks.common.rows import RESULTS, conditions, console
from examples import data


@dataclass(frozen=True)
class Setting:
    """One way to train. `options`: the approx backend's, None for Inductor; `steps`: share of the epochs; `width`: share of the hidden units;
    `known_length`: the backend is told how many steps there will be (and makes the last of them exact where outputs are sampled); `pruned`: InfoBatch (Qin et
    al., ICLR 2024), which in every epoch but the last eighth leaves out this share of the samples whose last loss is below the mean, and weights the others
    below the mean by one over the rest."""

    options: Mapping[str, Any] | None = None
    steps: float = 1.0
    width: float = 1.0
    known_length: bool = False
    pruned: float = 0.0


def tokens(tau: float) -> Setting:
    return Setting({"grad": {"axis": "tokens"}, "adaptive": {"tau": tau}})


@dataclass(frozen=True)
class Work:
    """A model and its data. `make(width share)` gives the model; `decays`: the learning rate, by a cosine to 0; `score` is a test accuracy in %
    (higher is better) or a loss (lower). `read(directory)` gives data that `examples.data` has not: inputs and labels, for training and testing."""

    dataset: str
    make: Callable[[float], nn.Module]
    epochs: int
    batch: int
    lr: float
    settings: Mapping[str, Setting]
    limit: int | None = None
    momentum: float | None = None
    pretrain: str | None = None
    score: str = "accuracy"
    device: str = "cpu"
    decays: bool = True
    read: Callable[[Path], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None


@dataclass
class Training:
    """One model on its way."""

    setting: Setting
    model: nn.Module
    compiled: Any
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    steps: int
    times: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    losses: Tensor | None = None

    @property
    def seconds(self) -> float:
        return sum(self.times[1:])


def start(work: Work, setting: Setting, seed: int, steps: int, base: nn.Module | None) -> Training:
    torch.manual_seed(seed)
    model = work.make(setting.width)
    if base is not None:
        model.load_state_dict(base.state_dict())
        head = nn.Linear(base.head.in_features, 26)  # type: ignore[union-attr,arg-type]
        model.head = head
    options = None if setting.options is None else dict(setting.options) | ({"total_steps": steps} if setting.known_length else {})
    model.to(work.device)
    backend: dict[str, Any] = {"backend": inductor} if options is None else {"backend": "approx", "options": options}
    if work.momentum is None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=work.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=work.momentum, weight_decay=5e-4, fused=True)
    return Training(setting, model, torch.compile(model, **backend), optimizer, torch.Generator().manual_seed(seed), steps)


def epoch(t: Training, work: Work, x: Tensor, y: Tensor, steps: int) -> None:
    """At most `steps` more steps of a training."""
    t.model.train()
    order, weights = pruned(t, work, len(x)) if t.setting.pruned else (torch.randperm(len(x), generator=t.order), None)
    batches = order.split(work.batch)
    for i, batch in enumerate(batches[: min(steps, t.steps - len(t.times))]):
        done = (len(t.curve) + i / len(batches)) / work.epochs if t.setting.pruned else len(t.times) / t.steps  # pruned epochs have fewer steps
        for group in t.optimizer.param_groups:
            group["lr"] = work.lr * (0.5 * (1 + math.cos(math.pi * done)) if work.decays else 1)
        begin = time.perf_counter()
        t.optimizer.zero_grad()
        if weights is None or t.losses is None:
            loss(t.compiled(x[batch]), y[batch]).backward()
        else:
            each = F.cross_entropy(t.compiled(x[batch]), y[batch], reduction="none")
            t.losses[batch] = each.detach()
            (each * weights[batch]).mean().backward()
        t.optimizer.step()
        if work.device == "cuda":
            torch.cuda.synchronize()
        t.times.append(time.perf_counter() - begin)


def pruned(t: Training, work: Work, size: int) -> tuple[Tensor, Tensor]:
    """The samples of the next epoch under InfoBatch, in random order, and the weights of all samples."""
    share, weights = t.setting.pruned, torch.ones(size)
    if t.losses is None:
        t.losses = torch.full((size,), torch.inf)
    below = (t.losses < t.losses[t.losses.isfinite()].mean()) if len(t.curve) < math.ceil(7 / 8 * work.epochs) else torch.zeros(size, dtype=torch.bool)
    weights[below] = 1 / (1 - share)
    kept = torch.arange(size)[~below | (torch.rand(size, generator=t.order) >= share)]
    return kept[torch.randperm(len(kept), generator=t.order)], weights


def loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def score(model: nn.Module, work: Work, x: Tensor, y: Tensor) -> float:
    """Of the plain, exact model: test accuracy in %, or mean loss."""
    model.eval()
    with torch.no_grad():
        outs = [model(part) for part in x.split(500)]
    out = torch.cat(outs)
    return loss(out, y).item() if work.score == "loss" else 100 * (out.argmax(-1) == y).double().mean().item()


def load(work: Work, directory: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if work.read is not None:
        parts = work.read(directory)
    elif work.dataset == "text":
        parts = text(directory / "tinyshakespeare.txt", 128, (work.limit or 100) * work.batch)
    else:
        d = data.load(work.dataset, directory)
        parts = d.train_x[: work.limit], d.train_y[: work.limit], d.test_x, d.test_y
    x, y, test_x, test_y = (t.to(work.device) for t in parts)
    return x, y, test_x, test_y


def text(path: Path, length: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of characters and the same windows one further on; the last tenth of the text is for testing."""
    content = path.read_text()
    codes = {c: i for i, c in enumerate(sorted(set(content)))}
    ids = torch.tensor([codes[c] for c in content])
    cut = len(ids) * 9 // 10
    at = torch.randint(cut - length - 1, (samples,), generator=torch.Generator().manual_seed(0))
    windows = torch.stack([ids[i : i + length + 1] for i in at.tolist()])
    tests = torch.stack([ids[i : i + length + 1] for i in range(cut, len(ids) - length - 1, length)])[:400]
    return windows[:, :-1], windows[:, 1:].contiguous(), tests[:, :-1], tests[:, 1:].contiguous()


def pretrained(work: Work, directory: Path, seed: int) -> nn.Module | None:
    """An exact model after one epoch on another data set."""
    if work.pretrain is None:
        return None
    plain = Work(work.pretrain, work.make, 1, work.batch, 1e-3, {}, device=work.device)
    x, y, _, _ = load(plain, directory)
    steps = 20_000 // work.batch
    t = start(plain, Setting(), seed, steps, None)
    epoch(t, plain, x, y, steps)
    return t.model


@dataclass(frozen=True)
class Study:
    """Works, and the file of their rows: results/`name`.jsonl."""

    name: str
    works: Mapping[str, Work]

    @property
    def rows(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"

    def done(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.rows.read_text().splitlines()] if self.rows.exists() else []

    def run(self, directory: Path, works: list[str] | None, settings: list[str] | None, seeds: int, device: str = "cpu") -> None:
        for name in works or [w for w in self.works if not w.endswith("-full")]:
            if name not in self.works:
                raise typer.BadParameter(f"no work {name!r}; there are {', '.join(self.works)}")
            w = replace(self.works[name], device=device)
            parts = load(w, directory)
            for seed in range(seeds):
                there = {(r["work"], r["setting"], r["seed"]) for r in self.done()}
                wanted = [s for s in w.settings if (name, s, seed) not in there and (not settings or s in (*settings, "exact"))]
                if wanted and "exact" not in wanted:
                    wanted.insert(0, "exact")  # seconds are only comparable within one process
                if wanted and wanted != ["exact"]:
                    self.one_seed(name, w, seed, wanted, parts, pretrained(w, directory, seed))

    def one_seed(self, name: str, work: Work, seed: int, wanted: list[str], parts: tuple[Tensor, ...], base: nn.Module | None) -> None:
        x, y, test_x, test_y = parts
        per_epoch = len(x) // work.batch
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # all models of a class share one list of entries; beyond the limit Dynamo would run them uncompiled
        runs = {s: start(work, work.settings[s], seed, round(work.settings[s].steps * work.epochs * per_epoch), base) for s in wanted}
        for e in range(work.epochs):
            for t in runs.values():
                if len(t.times) < t.steps:
                    epoch(t, work, x, y, per_epoch)
                    t.curve.append((len(t.times), round(t.seconds, 3), score(t.model, work, test_x, test_y)))
            console.print(
                f"{name} seed {seed} epoch {e + 1}: " + ", ".join(f"{s} {t.curve[-1][2]:.2f} {t.seconds:.1f}s" for s, t in runs.items()), highlight=False
            )
        rows = []
        known = {(r["work"], r["setting"], r["seed"]) for r in self.done()}
        for s, t in runs.items():
            if (name, s, seed) in known:
                continue  # run again only for the others' seconds
            kept = [c.kept for c in controls(t.model).values()]
            added = [a for b in budgets(t.model).values() for _, a in b.measurements]
            rows.append(
                conditions()
                | {"device": device_name(work.device)}
                | {"work": name, "setting": s, "seed": seed, "score": work.score, "steps": len(t.times), "seconds": round(t.seconds, 2)}
                | {"seconds_of_exact": round(t.seconds / runs["exact"].seconds, 4), "median_step_ms": round(1e3 * statistics.median(t.times[1:]), 3)}
                | {"first_step_s": round(t.times[0], 2), "final": round(t.curve[-1][2], 4), "rows_kept": round(statistics.mean(kept), 4) if kept else None}
                | {"variance_added": round(statistics.mean(added), 4) if added else None}
                | {"curve": [[a, b, round(c, 4)] for a, b, c in t.curve]}
            )
        RESULTS.mkdir(parents=True, exist_ok=True)
        with self.rows.open("a") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)

    def groups(self, works: list[str] | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
        groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for r in self.done():
            if not works or r["work"] in works:
                groups[r["work"]][r["setting"]].append(r)
        return groups

    def table(self, works: list[str] | None) -> None:
        """Mean and spread over seeds of the final score, and of the seconds as a share of exact's in the same process."""
        for name, settings in self.groups(works).items():
            t = Table("setting", "seeds", self.works[name].score, "spread", "seconds / exact's", "rows kept", "first step s", title=name)
            for s, runs in settings.items():
                final = [r["final"] for r in runs]
                share = statistics.mean(r["seconds_of_exact"] for r in runs)
                kept = [r["rows_kept"] for r in runs if r["rows_kept"] is not None]
                spread = f"{statistics.stdev(final):.3f}" if len(final) > 1 else ""
                first = statistics.mean(r["first_step_s"] for r in runs)
                t.add_row(
                    s, str(len(runs)), f"{statistics.mean(final):.3f}", spread, f"{share:.3f}", f"{statistics.mean(kept):.3f}" if kept else "", f"{first:.1f}"
                )
            console.print(t)

    def plot(self, works: list[str] | None) -> None:
        """Score over seconds, mean over seeds, one PNG per work beside the rows."""
        for name, settings in self.groups(works).items():
            score_over_seconds(settings, name, self.works[name].score == "accuracy", RESULTS / f"{self.name}-{name}.png")

    def app(self, help: str | None) -> typer.Typer:
        """The study's command line: run, table, plot."""
        app = typer.Typer(help=help, epilog="works: " + ", ".join(self.works))

        @app.command()
        def run(
            directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
            work: Annotated[list[str] | None, typer.Option(help="by default all but those that end in -full, which want a GPU")] = None,
            setting: Annotated[list[str] | None, typer.Option(help="only these settings (exact is always among them)")] = None,
            seeds: Annotated[int, typer.Option(help="trainings of each setting")] = 3,
            threads: Annotated[int | None, typer.Option(help="torch's threads")] = None,
            device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
        ) -> None:
            """Train what is not in the results yet."""
            if threads is not None:
                torch.set_num_threads(threads)
            self.run(directory, work, setting, seeds, device)

        @app.command()
        def table(work: Annotated[list[str] | None, typer.Option(help="all by default")] = None) -> None:
            """Mean and spread over seeds of the final score, and of the seconds as a share of exact's in the same process."""
            self.table(work)

        @app.command()
        def plot(work: Annotated[list[str] | None, typer.Option(help="all by default")] = None) -> None:
            """Score over seconds, mean over seeds, one PNG per work beside the rows."""
            self.plot(work)

        return app
