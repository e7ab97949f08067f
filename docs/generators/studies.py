"""Tables of the studies of estimators: forward sampling against exact evaluation, shared indices, rows through BatchNorm, the rule of the default."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from generators.stored import Row, block, by, caption, named, newest, rows, seeds, spread, table

SHIFT_WORKS = {"fashion-mlp": "Fashion-MNIST, MLP 3 x 1024, 4 epochs", "cifar-wrn": "CIFAR-10 (12,800 images), WRN-10-2 with BatchNorm, 5 epochs"}
SHIFT_TITLES = {"fashion-mlp": "Fashion-MNIST, MLP", "cifar-wrn": "CIFAR-10, WRN with BatchNorm"}
SHIFT_NAMES = {
    "topk": "`topk`, first and last layer exact",
    "topk, all layers": "`topk`, all layers",
    "topk, last 20% exact": "the same, last fifth of the steps exact",
    "topk, last 10% exact": "the same, last tenth of the steps exact",
    "topk, norm kept": "the same, output scaled to keep its norm",
    "topk, renewed every 50 steps": "the same, indices renewed every 50 steps",
    "topk of noisy scores": "the same, noisy scores",
    "bernoulli": "`bernoulli` (unbiased), first and last layer exact",
    "bernoulli, last 20% exact": "the same, last fifth of the steps exact",
}


def shift_table(work: str) -> str:
    """Remedies for the shift between sampled training and exact evaluation: a line for every setting and commit."""
    stored, lines = rows("shift.jsonl", work=work), []
    for (setting, commit), runs in by(stored, lambda r: (r["setting"], r["commit"])).items():
        scores = [spread([r[key] for r in runs]) for key in ("final", "recalibrated", "sampled")]
        lines.append([named(SHIFT_NAMES, setting), seeds(runs), *scores, commit])
    lines.sort(key=lambda line: (line[-1], line[0] != "exact"))
    what = (
        f"{SHIFT_WORKS[work]}, ratio {stored[0]['ratio']}: test accuracy in % of the exact network, of the exact network with BatchNorm's statistics "
        "collected anew, and of the sampled "
        "network. Sampling written by hand in eager PyTorch."
    )
    return block(
        table(["training", "seeds", "exact evaluation", "statistics anew", "sampled evaluation", "commit"], lines), caption(what, stored, "shift.jsonl")
    )


def _one_commit(work: str) -> list[Row]:
    """The runs of the commit with most settings, exact training among them if any commit has it so."""
    groups = by(rows("shift.jsonl", work=work), lambda r: r["commit"])
    return max(groups.values(), key=lambda group: (len({r["setting"] for r in group}), group[0]["date"]))


def shift_picture(path: Path) -> None:
    """Exact evaluation after exact training and after sampled training, of one commit each."""
    figure, sides = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shown = {
        "exact": "exact training",
        "topk": "top-k",
        "topk, all layers": "top-k, all layers",
        "topk, last 20% exact": "top-k, last fifth exact",
        "bernoulli": "bernoulli",
    }
    for axes, (work, title) in zip(sides, SHIFT_TITLES.items(), strict=True):
        by_setting = by(_one_commit(work), lambda r: r["setting"])
        names = [s for s in shown if s in by_setting]
        values = [sum(r["final"] for r in by_setting[s]) / len(by_setting[s]) for s in names]
        bars = axes.barh([shown[s] for s in names], values, color=["#4c566a" if s == "exact" else "#c2571a" for s in names], height=0.6)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="accuracy of exact evaluation, %", xlim=(0, 105))
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, dpi=144)
    plt.close(figure)


def picture_rows() -> list[Row]:
    """The stored trainings that the picture shows."""
    return [r for work in SHIFT_WORKS for r in _one_commit(work)]


def shift_picture_caption() -> str:
    """The conditions of the picture."""
    sides = {work: _one_commit(work) for work in SHIFT_WORKS}
    of_side = [
        f"{SHIFT_WORKS[w].split(',')[0].split(' (')[0]}: ratio {runs[0]['ratio']}, seeds {seeds(runs)}, commit {runs[0]['commit']}" for w, runs in sides.items()
    ]
    what = f"Accuracy of exact evaluation after training with sampled outputs. {'; '.join(of_side)}."
    return caption(what, picture_rows(), "shift.jsonl").replace("every line", "each side")


def share_tables() -> str:
    """What sharing indices costs in error and saves in time."""
    stored = rows("share_study.csv")
    errors = [[r["what"], r["step"], r["ratio"], r["own"], r["shared"], r["shared_by_own"]] for r in stored if r["unit"] == "error"]
    speeds = [[r["what"], r["ratio"], f"{r['exact']} ms", f"{r['own']} ms", f"{r['shared']} ms", r["shared_by_own"]] for r in stored if r["unit"] == "ms"]
    return "\n\n".join(
        [
            table(["layers", "training step", "ratio", "error, own entries", "error, shared entries", "shared / own"], errors),
            table(["layers alone", "ratio", "exact", "own entries", "shared entries", "shared / own"], speeds),
            caption(
                "Relative error of the gradient of a small language model, and time of a step of such layers alone, with top-k.",
                stored,
                "share_study.csv",
            ),
        ]
    )


def row_bias_table() -> str:
    """The bias of rows through BatchNorm."""
    stored = list(newest(rows("row_bias.csv"), "layers", "batch").values())
    stored.sort(key=lambda r: (int(r["batch"]), int(r["layers"])))
    lines = [[r["batch"], r["layers"], r["draws"], *(f"{100 * float(r[key]):.1f}" for key in ("bias", "error", "noise"))] for r in stored]
    what = (
        'Half the rows, `batch_norm: "approximate"`: distance of the mean gradient from the exact one (bias; below 0: none that so many draws can '
        "tell) and standard deviation of one draw (noise), "
        "as a share of the gradient's norm."
    )
    return block(table(["batch", "convolutions with BatchNorm", "draws", "bias, %", "± ", "noise, %"], lines), caption(what, stored, "row_bias.csv"))


def variance_table() -> str:
    """The rule of the default against every sample's own gradient."""
    stored = rows("variance.csv")
    names = {"mnist-mlp": "MNIST, MLP 3 x 500", "char-transformer": "characters, 4 transformer blocks"}
    lines = [
        [names[r["work"]], r["step"], r["tau"], *(f"{float(r[k]):.3f}" for k in ("rule", "added", "by_variance", "correlation")), r["commit"]] for r in stored
    ]
    what = (
        "The share of rows that the default's rule asks for; the variance that it adds, as a share of the gradient's own (to be at most tau); the "
        "share that the true variances would ask for; the "
        "correlation of the norms that the rule reads with those of the samples' whole gradients."
    )
    head = ["work", "step", "tau", "rule", "variance added", "by true variances", "correlation", "commit"]
    return block(table(head, lines), caption(what, stored, "variance.csv"))


def token_variance_table() -> str:
    """What tokens left out really add, beside what `tau` allows."""
    stored = rows("token_variance.csv")
    names = {"minilm-mean": "MiniLM, mean over tokens", "minilm-class": "MiniLM, class token"}
    keys = ("kept", "excess", "added")
    lines = [[names[r["work"]], r["tau"], r["step"], *(f"{float(r[k]):.2g}" for k in keys), r["commit"]] for r in stored]
    what = (
        "Share of the tokens kept, mean over regions; how many times as much variance the training takes the whole gradient to get as the norms of a region "
        "say; the variance really added, as a share of the gradient's own (to be at most tau)."
    )
    head = ["training", "tau", "step", "kept", "taken for", "variance added", "commit"]
    return block(table(head, lines), caption(what, stored, "token_variance.csv"))


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        **{f"shift: {work}": shift_table(work) for work in SHIFT_WORKS},
        "caption: shift": shift_picture_caption(),
        "shared choice": share_tables(),
        "bias of rows": row_bias_table(),
        "rule of the default": variance_table(),
        "variance of tokens": token_variance_table(),
    }
