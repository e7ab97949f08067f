"""Pictures of results, as PNG files. matplotlib is imported when a picture is made."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def score_over_seconds(settings: Mapping[str, list[dict[str, Any]]], title: str, accuracy: bool, path: Path) -> None:
    """Plot the score over seconds of training, one line per setting.

    Args:
        settings: rows of each setting, one per seed; the curves' means are drawn.
        title: of the picture.
        accuracy: whether the score is a test accuracy in percent; else it is a loss.
        path: where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for s, rows in settings.items():
        length = min(len(r["curve"]) for r in rows)
        seconds = [statistics.mean(r["curve"][i][1] for r in rows) for i in range(length)]
        values = [statistics.mean(r["curve"][i][2] for r in rows) for i in range(length)]
        axes.plot(seconds, values, marker=".", label=f"{s} ({len(rows)})", linewidth=2.5 if s == "exact" else 1.2)
    ends = [r["final"] for rows in settings.values() for r in rows]
    axes.set(xlabel="seconds of training steps", ylabel="test accuracy %" if accuracy else "test loss", title=title)
    if accuracy:
        axes.set_ylim(min(ends) - 2, max(ends) + 0.5)
    axes.legend(title="setting (seeds)")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def speedup_bars(rows: Mapping[str, Mapping[str, str]], label: str, path: Path) -> None:
    """Plot a horizontal bar for every row's `speedup`, with a mark at its `bar`, the value that is asked for, where it has one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
    axes.barh(list(rows), [float(r["speedup"]) for r in rows.values()], color="tab:blue")
    bars = [(i, float(r["bar"])) for i, r in enumerate(rows.values()) if r["bar"]]
    axes.plot([bar for _, bar in bars], [i for i, _ in bars], "k|", markersize=12)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(label)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
