"""Tables of the cost model's predictions, and of unmodified models beside Inductor."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from generators.stored import Row, block, by, caption, newest, newest_commit, rows, table


def predictions() -> list[Row]:
    """The newest rows whose times were measured at the commit that predicted them."""
    return newest_commit([r for r in rows("predict.csv") if r["timed"] == r["commit"]], "kind", "dtype", "shape", "ratio", least=60)


def _error(row: Row, what: str) -> float:
    return abs(float(row[f"predicted_{what}_us"]) / float(row[f"{what}_us"]) - 1)


def predictions_table() -> str:
    """How far predictions are off, and what wrong decisions cost."""
    stored, lines = predictions(), []
    for kind, group in [*by(stored, lambda r: r["kind"]).items(), ("all", stored)]:
        errors = [_error(r, what) for r in group for what in ("exact", "sampled")]
        chosen = [r for r in group if r["decision"] == "sampled"]
        slower = sum(float(r["sampled_us"]) > 1.02 * float(r["exact_us"]) for r in chosen)
        regret = statistics.mean(float(r["regret"]) for r in group)
        ninth = statistics.quantiles(errors, n=10)[-1]
        lines.append([kind, len(group), f"{100 * statistics.median(errors):.0f}%", f"{100 * ninth:.0f}%", f"{100 * regret:.1f}%", len(chosen), slower])
    what = (
        "Predicted against measured times of sites alone, in fp32 and bf16. Error: of the predicted time of a step, exact and sampled. Regret: how "
        "much longer the choice "
        "takes than the better one, on average."
    )
    head = ["kind", "sites", "median error", "90th percentile", "regret", "sampled", "of these over 2% slower than exact"]
    return block(table(head, lines), caption(what, stored, "predict.csv"))


def predictions_picture(path: Path) -> None:
    """Predicted over measured time of every site."""
    figure, axes = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    for what, color, marker in (("exact", "#4c566a", "o"), ("sampled", "#1b7f4d", "^")):
        x, y = ([float(r[f"{prefix}{what}_us"]) / 1e3 for r in predictions()] for prefix in ("", "predicted_"))
        axes.scatter(x, y, s=14, color=color, marker=marker, alpha=0.7, label=what, lw=0)
    low, high = 0.03, 300
    axes.plot([low, high], [low, high], color="black", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured time of a step, ms", ylabel="predicted, ms", xlim=(low, high), ylim=(low, high))
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, dpi=144)
    plt.close(figure)


def never_slower_table(policy: str) -> str:
    """Every model's newest row, and the geometric mean of these rows."""
    last = list(newest(rows("never_slower.csv", policy=policy), "work").values())
    gains = [float(r["speedup"]) for r in last]
    lines = [
        [
            r["work"],
            f"{r['sampled']} of {r['sites']}",
            f"{float(r['inductor_ms']):.1f} ms",
            f"{float(r['ours_ms']):.1f} ms",
            f"{float(r['speedup']):.3f}",
            r["commit"],
        ]
        for r in sorted(last, key=lambda r: -float(r["speedup"]))
    ]
    mean = (
        f"Over all {len(gains)} models: geometric mean {statistics.geometric_mean(gains):.3f} times Inductor's speed, "
        f"lowest {min(gains):.3f}, highest {max(gains):.3f}."
    )
    what = "A training step without the optimizer, beside Inductor in turn in one process; of every model the row stored last."
    head = ["model", "sites approximated", "Inductor", "approx", "times Inductor's speed", "commit"]
    return block(f"{mean}\n\n{table(head, lines)}", caption(what, last, "never_slower.csv"))


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        "predictions": predictions_table(),
        "caption: predictions": caption(
            "Predicted and measured time of a step on every site alone; the line is where they agree.", predictions(), "predict.csv"
        ),
        "never slower: cost": never_slower_table("cost"),
        "never slower: default": never_slower_table("adaptive"),
    }
