"""Tables of replaced weight gradients: kernels, training under the schedules of Wang and Nelaturu, and what switching costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from generators.stored import Row, block, by, caption, newest_commit, rows, seeds, spread, table, times

PAPER_KERNELS = {"256 -> 256, 8 x 8": 1.7, "128 -> 128, 16 x 16": 3.2, "512 -> 512, 4 x 4": 0.8, "512 -> 512, 2 x 2": 10.4} | {
    "64 -> 64, 32 x 32": 5.2,
    "16 -> 16, 32 x 32": 4.2,
    "32 -> 32, 16 x 16": 4.0,
    "64 -> 64, 8 x 8": 3.7,
}
"""Wang and Nelaturu, table 1: speed-up of the approximated gradient, transposes included, over cuDNN on a Titan Xp."""
WORKS = {"resnet-20": "ResNet-20, 6,400 images, 8 epochs", "two-layer": "two convolutions, 10,000 images, 6 epochs"}


def kernel_table() -> str:
    """The weight gradient `max` beside the exact product, for the layers of the paper's table."""
    stored = newest_commit(rows("gradients.csv"), "work", "setting", least=40)
    lines = []
    for layer, paper in PAPER_KERNELS.items():
        cells = []
        for layout in ("channels-last", "NCHW"):
            by_setting = {r["setting"]: r for r in stored if r["work"].startswith(layer) and r["work"].endswith(layout)}
            tiled = next((r for s, r in by_setting.items() if "tile" in s), None)
            cells += [times(by_setting["max"]), f"{float(tiled['speedup']):.2f}" if tiled else "one tile"]
        lines.append([layer, *cells, f"{paper}"])
    what = (
        "3 x 3 convolutions of the paper's table 1 (channels, height and width), batch 128: the weight gradient `max` as times the speed of the "
        "exact product under Inductor (median, 20th to 80th "
        'percentile); with `tile: "auto"`; and the paper\'s factor over cuDNN on a Titan Xp.'
    )
    head = ["layer", "channels-last", "with tiles", "NCHW", "with tiles ", "paper, GPU"]
    return block(table(head, lines), caption(what, stored, "gradients.csv"))


def training_table(work: str, paired: bool) -> str:
    """A line for every setting and commit: those with full gradients of the same commit and seeds beside (paired), or those without."""
    lines, used = [], []
    for commit, group in by(rows("gradients.jsonl", work=work), lambda r: r["commit"]).items():
        full = {r["seed"]: r for r in group if r["setting"] == "exact"}
        for setting, runs in by(group, lambda r: r["setting"]).items():
            if setting == "exact":
                continue
            beside = [full[r["seed"]] for r in runs if r["seed"] in full]
            if (len(beside) == len(runs)) != paired:
                continue
            used += runs + beside if paired else runs
            lines.append([setting, seeds(runs), spread([r["final"] for r in runs]), *(_difference(runs, beside) if paired else []), commit])
    lines.sort(key=lambda line: str(line[0]))
    what = f"CIFAR-10, {WORKS[work]}, so far from trained: test accuracy in %, mean ± standard deviation over seeds"
    what += "; full gradients with the same commit and seeds; mean difference with the same seed ± its standard error, in points." if paired else "."
    head = ["gradients", "seeds", "accuracy", *(["full gradients", "difference"] if paired else []), "commit"]
    return block(table(head, lines), caption(what, used, "gradients.jsonl"))


def _difference(runs: Sequence[Row], beside: Sequence[Row]) -> list[str]:
    """The accuracy with full gradients, and the mean difference with its standard error."""
    gaps = [a["final"] - b["final"] for a, b in zip(runs, beside, strict=True)]
    error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
    return [spread([r["final"] for r in beside]), f"{statistics.mean(gaps):+.2f}{error}"]


def step_table() -> str:
    """Steps under schedule 3, beside Inductor: the newest commit."""
    stored = [r for r in rows("schedule.csv") if r["setting"].startswith("schedule")]
    last = newest_commit(stored, "setting")
    lines = [[r["setting"], f"{float(r['median_ms']) / 4:.0f} ms", times(r)] for r in last]
    what = "ResNet-20, batch 128: mean step of a period of four, and its speed as times Inductor's (median, 20th to 80th percentile)."
    return block(table(["weight gradients", "step", "times Inductor's speed"], lines), caption(what, last, "schedule.csv"))


def repeated_step_table() -> str:
    """The same of every commit, which shows how far single runs differ."""
    stored = [r for r in rows("schedule.csv") if r["setting"] in ("schedule 3, zero", "schedule 3, max")]
    lines = [[r["date"], r["commit"], r["setting"], times(r)] for r in stored]
    what = "All stored runs of schedule 3 with `zero` and `max`."
    return block(table(["date", "commit", "weight gradients", "times Inductor's speed"], lines), caption(what, stored, "schedule.csv"))


def switch_table() -> str:
    """Two assignments in turn, step by step, over the mean of both."""
    stored = rows("switch.csv")
    lines = [[r["date"], r["commit"], r["in_turn_over_mean"], f"{float(r['dispatch_us']):.1f} µs"] for r in stored]
    what = "ResNet-20, batch 128: two assignments in turn, step by step, as times the mean of the two by themselves; and what choosing one takes."
    return block(table(["date", "commit", "in turn / mean", "choosing"], lines), caption(what, stored, "switch.csv"))


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        "gradient kernels": kernel_table(),
        **{f"gradient training: {work}": training_table(work, paired=True) for work in WORKS},
        "gradient training alone: resnet-20": training_table("resnet-20", paired=False),
        "gradient steps": step_table(),
        "gradient steps repeated": repeated_step_table(),
        "switching": switch_table(),
    }
