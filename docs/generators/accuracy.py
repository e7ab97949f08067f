"""Tables and the picture of accuracy, from the stored trainings in `benchmarks/results/accuracy.jsonl`.

A table takes, of every piece of work, the runs of one commit (the newest with at least three seeds of exact training and of the default), so that no row
mixes versions of the code.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "mnist-mlp": "MNIST, MLP 3 x 500",
    "mnist-cnn": "MNIST (20,000 images), small CNN",
    "fashion-mlp": "Fashion-MNIST, MLP 3 x 1024",
    "emnist-finetune-8": "MNIST CNN fine-tuned on EMNIST-Letters, 8 epochs",
    "char-transformer": "characters, 4 transformer blocks, from scratch (test loss)",
    "cifar-wrn": "CIFAR-10 (12,800 images), WRN-10-2 with BatchNorm",
}
SHOWN = {"exact": "exact", "adaptive": "approx (default)", "fewer steps": "exact, fewer steps", "narrower": "smaller exact model"}

Row = dict[str, Any]


def newest_whole(rows: Sequence[Row]) -> list[Row]:
    """The runs of the newest commit that has at least three seeds (else of the one with most) of both exact training and the default."""
    by_commit: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_commit[row["commit"]].append(row)

    def seeds(own: Sequence[Row]) -> int:
        return min(len({r["seed"] for r in own if r["setting"] == setting}) for setting in ("exact", "adaptive"))

    return max(by_commit.values(), key=lambda own: (min(seeds(own), 3), max(r["date"] for r in own)))


@functools.cache
def accuracy() -> dict[str, dict[str, list[Row]]]:
    """Stored trainings by work and setting."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for line in (RESULTS / "accuracy.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["work"]].append(row)
    found = {}
    for work in NAMES:
        own = newest_whole(rows[work])
        found[work] = {setting: same for setting in SHOWN if (same := [r for r in own if r["setting"] == setting])}
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    digits = 3 if max(values) < 10 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def accuracy_table(works: Sequence[str]) -> str:
    """One line for each work: the score of every setting and its seconds as a share of exact training's."""
    lines = ["| training | seeds | " + " | ".join(SHOWN.values()) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    found, commits, dates = accuracy(), set(), set()
    for work in works:
        settings = found[work]
        cells = []
        for setting in SHOWN:
            runs = settings.get(setting)
            if not runs:
                cells.append("not run")
                continue
            share = statistics.mean(r["seconds_of_exact"] for r in runs)
            cells.append(spread([r["final"] for r in runs]) + ("" if setting == "exact" else f" in {share:.2f} of the time"))
            commits |= {r["commit"] for r in runs}
            dates |= {r["date"] for r in runs}
        lines.append(f"| {NAMES[work]} | {len(settings['exact'])} | " + " | ".join(cells) + " |")
    row = next(iter(found[works[0]].values()))[0]
    lines += [
        "",
        f"Test accuracy in % (mean ± standard deviation over seeds) and seconds of the training steps as a share of exact training's. "
        f"{row['device']}, threads: {row['threads']}, {row['dtype']}, "
        f"torch {row['torch']}; {min(dates)} to {max(dates)}, commits {', '.join(sorted(commits))}; from `benchmarks/results/accuracy.jsonl`.",
    ]
    return "\n".join(lines)


def accuracy_picture(work: str, path: Path) -> None:
    """Accuracy over seconds: at most three labelled lines, the mean over seeds at the same steps."""
    colors = {"exact": "#4c566a", "adaptive": "#1b7f4d", "fewer steps": "#c2571a"}
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for setting, color in colors.items():
        runs = accuracy()[work].get(setting, [])
        length = min(len(r["curve"]) for r in runs)
        curve = np.array([[point[1:] for point in r["curve"][:length]] for r in runs]).mean(0)
        axes.plot(curve[:, 0], curve[:, 1], color=color, lw=2, marker="o", ms=3)
        offset, side = ((4, 8), "center") if setting == "adaptive" else ((4, -14), "left")
        axes.annotate(SHOWN[setting], curve[-1], xytext=offset, textcoords="offset points", color=color, ha=side)
    row = accuracy()[work]["exact"][0]
    axes.set(xlabel="seconds of training steps", ylabel="test accuracy, %", title=NAMES[work])
    axes.set_ylim(bottom=float(np.percentile([p[2] for p in row["curve"]], 15)))
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, dpi=144)
    plt.close(figure)


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"accuracy": accuracy_table(list(NAMES)), "accuracy in short": accuracy_table(["mnist-mlp", "fashion-mlp", "char-transformer", "cifar-wrn"])}
