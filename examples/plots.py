"""What the demo shows of its runs: a table of their accuracy, time, FLOPs and memory, sentences on the differences, a plot, and one JSON line per run."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import data
import models
import torch
from rich.table import Table
from trainer import BACKENDS, Run, Settings

from approx_compile import explain

UNREST = 2.0
"""The ratio of slow to fast steps from which the times are said to be disturbed; an idle machine has 1.1 to 1.4."""


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
    chosen = [r for r in runs if r.name == name]
    percent = [100 * r.accuracy for r in chosen]
    p10, *_, p90 = _deciles([t for r in chosen for t in r.step_s])
    step_s = statistics.median(t for r in chosen for t in r.step_s)
    return Summary(
        name,
        statistics.mean(percent),
        statistics.stdev(percent) if len(chosen) > 1 else float("nan"),
        step_s,
        p90 / p10,
        max(0.0, chosen[0].first_step_s - step_s),
        statistics.mean(sum(r.step_s) for r in chosen),
        round(statistics.mean(flops.of(r) for r in chosen)),
        round(statistics.mean(r.peak_bytes for r in chosen)),
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
