"""What is stored of the study of sampling on CPUs, of figure 1 of Adelman et al., and of the speed of units left out, beside the figures of the papers."""

from __future__ import annotations

from collections.abc import Sequence

from generators.papers import CPU_ACCURACY, CPU_SECONDS
from generators.stored import RESULTS, Row, block, by, caption, newest, rows, table, times

NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "emnist-letters": "EMNIST-Letters", "cifar10": "CIFAR-10"}
METHODS = {
    "standard": "exact",
    "dropout": "Dropout",
    "adaptive_dropout": "Adaptive-Dropout",
    "alsh": "ALSH-approx",
    "mc": "MC-approx",
    "default": "default here",
}
PAPER_ACCURACY = {  # (method, batch): the column of table 2
    ("alsh", 1): 0,
    ("mc", 20): 1,
    ("mc", 1): 2,
    ("dropout", 1): 3,
    ("adaptive_dropout", 1): 4,
    ("standard", 1): 5,
}
NOTHING = "*No row is stored yet.*"
TRAINED = ("dataset", "depth", "batch", "method", "seed")


def stored(name: str, *keys: str) -> list[Row]:
    """The newest rows of a file in benchmarks/results for each combination of keys; none if there is no such file."""
    return list(newest(rows(name), *keys).values()) if (RESULTS / name).exists() else []


def _trainings(**where: object) -> list[Row]:
    return [r for r in stored("cpu_study.jsonl", *TRAINED) if all(r[k] == v for k, v in where.items())]


def _length(r: Row) -> str:
    return f"{r['epochs']} x {r['samples_of_an_epoch']:,}"


def accuracy_table() -> str:
    """Table 2 of the study beside the trainings stored here."""
    runs = _trainings(depth=3)
    if not runs:
        return NOTHING
    lines = []
    for r in runs:
        column = PAPER_ACCURACY.get((r["method"], r["batch"]))
        paper = CPU_ACCURACY[NAMES[r["dataset"]]][column] if column is not None else ""
        lines.append([NAMES[r["dataset"]], METHODS[r["method"]], r["batch"], paper, f"{r['final']:.2f}", _length(r), r["commit"]])
    what = "Test accuracy in % of networks with three hidden layers of 1,000 units; the paper trained 50 epochs. Epochs x samples of an epoch are those here."
    return block(table(["data", "method", "batch", "paper", "here", "epochs here", "commit"], lines), caption(what, runs, "cpu_study.jsonl"))


def seconds_table() -> str:
    """Tables 3 and 4 of the study beside the trainings stored here."""
    runs = _trainings(depth=3, dataset="mnist")
    if not runs:
        return NOTHING
    lines = []
    for r in runs:
        paper = CPU_SECONDS.get(f"batch {r['batch']}: {METHODS[r['method']]}", ("", "", ""))
        ours = [f"{r[k]:.1f}" for k in ("epoch_s", "forward_s", "backward_s", "optimizer_s")]
        lines.append([r["batch"], METHODS[r["method"]], *paper, *ours, f"{r['peak_mb']:.0f}", r["commit"]])
    what = (
        "Seconds of a whole epoch on MNIST, three hidden layers, in all and in the two passes, from the steps that were run. Our total is both passes and the "
        "optimizer. Memory is the process's largest resident size in MB, with torch and data."
    )
    head = ["batch", "method", "paper", "paper, forward", "paper, backward", "here", "forward", "backward", "optimizer", "memory", "commit"]
    return block(table(head, lines), caption(what, runs, "cpu_study.jsonl"))


def depth_table() -> str:
    """Accuracy by depth, and the share of the label that is predicted most (figures 4, 5, 7 and 13)."""
    runs = _trainings(dataset="mnist")
    if not runs:
        return NOTHING
    depths = sorted({r["depth"] for r in runs})
    lines = []
    for (method, batch), group in by(runs, lambda r: (r["method"], r["batch"])).items():
        of_depth = {r["depth"]: r for r in group}
        cells = [f"{of_depth[d]['final']:.1f} ({100 * max(of_depth[d]['predicted']):.0f}%)" if d in of_depth else "" for d in depths]
        lines.append([METHODS[method], batch, *cells, _length(group[-1])])
    what = (
        "MNIST: test accuracy in % by the number of hidden layers, and in brackets the share of the test images that get the label predicted most "
        "(an even prediction has 10%). The paper's ALSH-approx falls from 70.07 at five layers to 25.14 at seven."
    )
    head = ["method", "batch", *(f"depth {d}" for d in depths), "epochs here"]
    return block(table(head, lines), caption(what, runs, "cpu_study.jsonl"))


def theorem_table() -> str:
    """The error of a sampled forward pass by depth, beside theorem 7.2."""
    found = stored("cpu_error.csv", "dataset", "depth", "batch", "method", "layer")
    if not found:
        return NOTHING
    layers = sorted({int(r["layer"]) for r in found})
    lines = []
    for method, group in by(found, lambda r: r["method"]).items():
        of_layer = {int(r["layer"]): r for r in group}
        cells = [f"{float(of_layer[k]['error']):.2f} ({float(of_layer[k]['theorem']):.2f})" if k in of_layer else "" for k in layers]
        lines.append([f"`{method}`", *cells])
    what = (
        "Relative error of the activations, |a - a'| / |a'|, after so many sampled layers, and in brackets what theorem 7.2 tells from the first layer's: "
        "((c + 1) / c)^k - 1. A network of seven hidden layers with ReLU that was trained exactly; 5% of the units, or 10% of a layer's inputs with `topk` and "
        "`bernoulli`, whose first layer is exact. The theorem is about linear units."
    )
    return block(table(["method", *(f"{k}" for k in layers)], lines), caption(what, found, "cpu_error.csv"))


def estimators_table() -> str:
    """Figure 1 of Adelman et al., measured here."""
    found = stored("estimator_error.csv", "mean", "method", "ratio")
    if not found:
        return NOTHING
    lines = []
    for (mean, method), group in by(found, lambda r: (r["mean"], r["method"])).items():
        lines.append(["a" if float(mean) == 1 else "b", f"`{method}`", *(f"{float(r['error']):.4f}" for r in group)])
    ratios = list(dict.fromkeys(r["ratio"] for r in found))
    what = (
        f"Error |A'B' - AB| / (|A| |B|) of products of 100 x 100 matrices by the share of the axis that is kept, mean of {found[0]['runs']} runs: a, all "
        "entries from N(1, 1); b, the entries of A from N(0, 1). "
        "`bernoulli` is water-filled here, and has room for four standard deviations more than it keeps on average."
    )
    return block(table(["figure", "method", *ratios], lines), caption(what, found, "estimator_error.csv"))


def speed_table() -> str:
    """Speed of the methods that choose units, and of MC-approx, beside Inductor."""
    found = [r for r in stored("units.csv", "work", "setting", "threads") if r["setting"] != "inductor"]
    if not found:
        return NOTHING
    lines: Sequence[Sequence[object]] = [[r["work"], f"`{r['setting']}`", r["threads"], times(r), r["bar"], r["commit"]] for r in found]
    what = "Speed of a training step as times Inductor's, with its 20th and 80th percentile, timed in turn in one process; `bar` is what was asked for."
    return block(table(["work", "setting", "threads", "speed", "bar", "commit"], lines), caption(what, found, "units.csv"))


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        "beside CPU: accuracy": accuracy_table(),
        "beside CPU: seconds": seconds_table(),
        "beside CPU: depth": depth_table(),
        "beside CPU: theorem": theorem_table(),
        "estimators' error": estimators_table(),
        "speed of units": speed_table(),
    }
