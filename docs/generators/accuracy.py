"""Tables and pictures of accuracy, from the stored trainings in `benchmarks/results/accuracy.jsonl`.

A table takes, of every piece of work, the runs of one commit (the newest with at least three seeds of exact training and of the default), so that no row
mixes versions of the code.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from generators.stored import Row, block, by, caption, explained, mark, named, rows, seeds, spread, table

NAMES = {
    "mnist-mlp": "MNIST, MLP 3 x 500",
    "mnist-cnn": "MNIST (20,000 images), small CNN",
    "fashion-mlp": "Fashion-MNIST, MLP 3 x 1024",
    "emnist-finetune": "MNIST CNN fine-tuned on EMNIST-Letters, 3 epochs",
    "emnist-finetune-8": "MNIST CNN fine-tuned on EMNIST-Letters, 8 epochs",
    "char-transformer": "characters, 4 transformer blocks, from scratch (test loss)",
    "cifar-wrn": "CIFAR-10 (12,800 images), WRN-10-2 with BatchNorm",
    "mnist-mlp-constant": "MNIST, MLP 3 x 500, batches of 50, constant learning rate",
    "mnist-cnn-constant": "MNIST, CNN of Adelman et al., batches of 50, constant learning rate",
    "minilm-mean": "MiniLM fine-tuned on movie reviews, mean over tokens, 3 epochs",
    "minilm-class": "MiniLM fine-tuned on movie reviews, class token, 3 epochs",
}
FILES = {"minilm-mean": "minilm.jsonl", "minilm-class": "minilm.jsonl"}
"""The files of works whose rows are not in accuracy.jsonl."""
IN_SHORT = ("minilm-mean", "mnist-mlp", "fashion-mlp", "char-transformer", "cifar-wrn")
IMAGES_AND_TEXT = ("mnist-mlp", "mnist-cnn", "fashion-mlp", "emnist-finetune", "emnist-finetune-8", "char-transformer", "cifar-wrn")
COMPARED = ("minilm-mean", *IMAGES_AND_TEXT)
PICTURED = ("mnist-mlp", "fashion-mlp", "mnist-cnn", "emnist-finetune-8")
SHOWN = {"exact": "exact", "adaptive": "approx (default)", "fewer steps": "exact, fewer steps", "narrower": "smaller exact model"}
SETTINGS = {
    "adaptive": "default",
    "default": "default",
    "adaptive rows": '`grad: {"axis": "rows"}`',
    "tokens tau .1": '`adaptive: {"tau": 0.1}`',
    "zeros only": '`adaptive: {"tau": 0}`',
    "infobatch": "exact, InfoBatch",
    "adaptive tau .1": '`adaptive: {"tau": 0.1}`',
    "adaptive tau auto": '`adaptive: {"tau": "auto"}`',
    "rows .25": "rows, ratio 0.25",
    "rows .125": "rows, ratio 0.125",
    "rows .25 uniform": "rows, ratio 0.25, method `uniform`",
    "rows .5 through BatchNorm": 'rows, ratio 0.5, `batch_norm: "approximate"`',
    "tokens .5": "`grad_weight` on half of its rows (tokens)",
    "fewer steps": "exact, fewer steps",
    "narrower": "exact, smaller model",
    "forward topk .5": "forward `topk`, ratio 0.5",
    "forward topk .25": "forward `topk`, ratio 0.25",
    "forward topk .33": "forward `topk`, ratio 0.33",
    "forward topk .5, end exact": "forward `topk`, ratio 0.5, exact end",
    "forward topk .33, end exact": "forward `topk`, ratio 0.33, exact end",
}


def _file(work: str) -> str:
    return FILES.get(work, "accuracy.jsonl")


def newest_whole(stored: Sequence[Row]) -> list[Row]:
    """The runs of the newest commit that has at least three seeds (else of the one with most) of both exact training and the default."""

    def count(runs: Sequence[Row]) -> int:
        return min(len({r["seed"] for r in runs if r["setting"] == setting}) for setting in ("exact", "adaptive"))

    return max(by(stored, lambda r: r["commit"]).values(), key=lambda runs: (min(count(runs), 3), max(r["date"] for r in runs)))


@functools.cache
def accuracy() -> dict[str, dict[str, list[Row]]]:
    """Stored trainings by work and setting."""
    by_work = {}
    for work in COMPARED:
        runs = newest_whole([r | {"setting": "adaptive"} if r["setting"] == "default" else r for r in rows(_file(work), work=work)])
        by_work[work] = {setting: same for setting in SHOWN if (same := [r for r in runs if r["setting"] == setting])}
    return by_work


def _share(runs: Sequence[Row]) -> float:
    return statistics.mean(r["seconds_of_exact"] for r in runs)


def accuracy_table(works: Sequence[str]) -> str:
    """One line for each work: the score of every setting and its seconds as a share of exact training's."""
    lines, used = [], []
    for work in works:
        cells = []
        for setting in SHOWN:
            runs = accuracy()[work].get(setting, [])
            used += runs
            score = spread([r["final"] for r in runs]) if runs else "not run"
            of_default = mark(runs[0]) if runs and setting == "adaptive" else ""
            cells.append(score + (f" in {_share(runs):.2f} of the time{of_default}" if runs and setting != "exact" else ""))
        exact = accuracy()[work]["exact"]
        lines.append([NAMES[work], len(exact), *cells, exact[0]["commit"]])
    what = "Test accuracy in % (mean ± standard deviation over seeds) and seconds of the training steps as a share of exact training's."
    files = dict.fromkeys(_file(work) for work in works)
    what = explained(what, (r for r in used if r["setting"] == "adaptive"))
    return block(table(["training", "seeds", *SHOWN.values(), "commit"], lines), caption(what, used, *files))


def settings_table(works: Sequence[str], only: Sequence[str] = ()) -> str:
    """A line for every work, commit and setting, with exact training of the same commit and the same seeds beside it. The works are those of one file."""
    lines, used, (file,) = [], [], {_file(work) for work in works}
    for work in works:
        for commit, group in by(rows(file, work=work), lambda r: r["commit"]).items():
            exact = {r["seed"]: r for r in group if r["setting"] == "exact"}
            for setting, runs in by([r for r in group if r["setting"] in (only or SETTINGS)], lambda r: r["setting"]).items():
                beside = [exact[r["seed"]] for r in runs if r["seed"] in exact]
                reference = spread([r["final"] for r in beside]) if len(beside) == len(runs) else "not run"
                kept = [r["rows_kept"] for r in runs if r["rows_kept"] is not None]
                share = f"{_share(runs):.2f}" if reference != "not run" else ""
                rows_kept = f"{statistics.mean(kept):.2f}" if kept else ""
                name = named(SETTINGS, setting) + (mark(runs[0]) if setting == "adaptive" else "")
                lines.append([NAMES[work], name, seeds(runs), spread([r["final"] for r in runs]), reference, share, rows_kept, commit])
                used += runs + beside
    what = (
        "Test accuracy in % (characters: test loss), mean ± standard deviation over seeds, beside exact training of the same commit and seeds; "
        "seconds of the training steps as a share "
        "of exact training's; share of the samples (MiniLM: of the tokens) kept, on average over the steps."
    )
    what = explained(what, (r for r in used if r["setting"] == "adaptive"))
    head = ["training", "setting", "seeds", "result", "exact", "time", "kept", "commit"]
    return block(table(head, lines), caption(what, used, file))


def accuracy_picture(work: str, path: Path) -> None:
    """Accuracy over seconds: at most three labelled lines, the mean over seeds at the same steps."""
    colors = {"exact": "#4c566a", "adaptive": "#1b7f4d", "fewer steps": "#c2571a"}
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}  # so that a label is legible where it crosses a line
    for setting, color in colors.items():
        runs = accuracy()[work].get(setting, [])
        length = min(len(r["curve"]) for r in runs)
        curve = np.array([[point[1:] for point in r["curve"][:length]] for r in runs]).mean(0)
        axes.plot(curve[:, 0], curve[:, 1], color=color, lw=2, marker="o", ms=3)
        offset, side = ((4, 8), "center") if setting == "adaptive" else ((4, -14), "left")
        axes.annotate(SHOWN[setting], curve[-1], xytext=offset, textcoords="offset points", color=color, ha=side, bbox=paper)
    row = accuracy()[work]["exact"][0]
    axes.set(xlabel="seconds of training steps", ylabel="test accuracy, %", title=NAMES[work])
    axes.set_ylim(bottom=float(np.percentile([p[2] for p in row["curve"]], 15)))
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, dpi=144)
    plt.close(figure)


def picture_rows(work: str) -> list[Row]:
    """The stored trainings that the picture of a work shows."""
    return [r for setting in ("exact", "adaptive", "fewer steps") for r in accuracy()[work][setting]]


def picture_caption(work: str) -> str:
    """What the picture of a work shows, and its conditions."""
    what = f"{NAMES[work]}: test accuracy over seconds of training steps, mean over seeds {seeds(accuracy()[work]['exact'])}."
    return caption(what, picture_rows(work), "accuracy.jsonl")


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    forward = [s for s in SETTINGS if s.startswith("forward")]
    return {
        "accuracy": accuracy_table(COMPARED),
        "accuracy in short": accuracy_table(IN_SHORT),
        "accuracy of rows": accuracy_table([w for w in IN_SHORT if w not in FILES]),
        "accuracy by setting": settings_table(IMAGES_AND_TEXT, [s for s in SETTINGS if s not in forward]),
        "accuracy of forward sampling": settings_table([w for w in NAMES if w not in FILES], forward),
        "accuracy on tokens": settings_table(["minilm-mean"], ["default", "adaptive rows", "tokens tau .1", "infobatch", "fewer steps"]),
        "accuracy of fixed rows": settings_table(["mnist-mlp"], ["adaptive", "rows .25", "rows .125", "rows .25 uniform"]),
        "accuracy through BatchNorm": settings_table(["cifar-wrn"], ["rows .5 through BatchNorm"]),
        **{f"caption: {work}": picture_caption(work) for work in PICTURED},
    }
