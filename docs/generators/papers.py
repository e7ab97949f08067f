"""The tables of the three papers that the methods come from, beside what this package stored. The papers' figures are typed here."""

from __future__ import annotations

from collections.abc import Sequence

from generators.stored import Row, block, by, caption, newest_commit, rows, spread, table

ADELMAN = (  # table 1: network, compute left out, communication left out, accuracy, accuracy of the exact network, speed-up
    ("MLP (MNIST)", "50%", "", "98.22", "98.22", ""),
    ("CNN (MNIST)", "66%", "", "99.25", "99.35", ""),
    ("WRN-28-10 (CIFAR-10)", "50%", "", "95.89", "96.17", "1.33"),
    ("ResNet-50 (ImageNet)", "6.5%", "", "75.63", "75.6", "1.04"),
    ("ResNet-152 (ImageNet), one node", "40%", "", "76.44", "77.65", "1.16"),
    ("ResNet-152 (ImageNet), one node", "9%", "", "77.66", "77.65", "1.04"),
    ("ResNet-152 (ImageNet), 8 nodes", "40%", "48%", "76.44", "77.65", "1.37"),
    ("ResNet-152 (ImageNet), 8 nodes", "12%", "23%", "77.48", "77.65", "1.13"),
    ("ResNet-152 (ImageNet), 8 nodes", "9%", "13%", "77.8", "77.65", "1.09"),
)
OURS_OF_ADELMAN = {"MLP (MNIST)": ("mnist-mlp-constant", "forward topk .5"), "CNN (MNIST)": ("mnist-cnn-constant", "forward topk .33")}
WANG_SPEED = {  # tables 2, 3 and 4: speed-up and loss of accuracy, in percent and in points
    "two convolutions": {"zero": ("-5.7%", "0.2"), "random": ("-38%", "-0.8"), "max": ("-6.6%", "1.0")},
    "ResNet-20, schedule 1": {"zero": ("7.1%", "1.5"), "random": ("-1.4%", "1.8"), "max": ("3.5%", "0.75"), "ResNet-14": ("22%", "1.0")},
    "VGG-19": {"zero": ("7.3%", "1.0"), "random": ("over -100%", "0.1"), "max": ("1.5%", "0.7")},
}
WANG_SCHEDULES = {  # table 5: accuracy of ResNet-20 under schedules 1, 2 and 3; full gradients 91.8, ResNet-14 90.8
    "zero": ("90.3", "91.6", "91.1"),
    "random": ("90.0", "88.8", "87.9"),
    "max": ("91.1", "91.6", "91.7"),
}
CPU_METHODS = ("ALSH-approx", "MC-approx, batch 20", "MC-approx, batch 1", "Dropout, batch 1", "Adaptive-Dropout, batch 1", "exact, batch 1")
CPU_ACCURACY = {  # table 2: test accuracy of a network of three hidden layers
    "MNIST": ("94.15", "98.10", "98.38", "90.21", "98.06", "96.46"),
    "Kuzushiji-MNIST": ("72.87", "91.78", "96.50", "9.84", "90.73", "83.86"),
    "Fashion-MNIST": ("78.11", "87.85", "88.58", "76.28", "86.12", "73.64"),
    "EMNIST-Letters": ("64.97", "89.84", "90.75", "4.96", "89.50", "85.34"),
    "NORB": ("78.57", "92.05", "97.52", "32.73", "96.60", "51.61"),
    "CIFAR-10": ("10.31", "73.26", "62.11", "67.85", "75.55", "93.02"),
}
CPU_SECONDS = {  # tables 3 and 4: seconds of an epoch on MNIST, one CPU: total, forward, backward
    "batch 1: ALSH-approx": ("807.50", "168.02", "356.16"),
    "batch 1: MC-approx": ("422.23", "28.44", "110.98"),
    "batch 1: Dropout": ("196.15", "32.32", "131.02"),
    "batch 1: Adaptive-Dropout": ("225.85", "59.03", "132.68"),
    "batch 1: exact": ("361.51", "28.976", "61.88"),
    "batch 20: MC-approx": ("35.141", "4.733", "11.323"),
    "batch 20: Dropout": ("42.818", "4.789", "7.957"),
    "batch 20: Adaptive-Dropout": ("53.412", "10.539", "8.493"),
    "batch 20: exact": ("39.310", "4.213", "23.143"),
}


def adelman_table() -> str:
    """Table 1 of Adelman et al."""
    head = ["network", "compute left out", "communication left out", "accuracy", "exact", "speed-up"]
    return block(table(head, ADELMAN), "*Adelman et al., table 1: V100 GPUs, test accuracy in %, speed-up of the whole training.*")


def beside_adelman_table() -> str:
    """The newest stored runs of networks and batch sizes of that table."""
    lines, used = [], []
    papers = {row[0]: row for row in ADELMAN}
    for network, (work, setting) in OURS_OF_ADELMAN.items():
        by_setting = by(newest_commit(rows("accuracy.jsonl", work=work), "setting", least=3), lambda r: r["setting"])
        scores = [spread([r["final"] for r in by_setting[s]]) for s in (setting, "exact")]
        seconds = sum(r["seconds_of_exact"] for r in by_setting[setting]) / len(by_setting[setting])
        lines.append([network, *papers[network][3:5], *scores, f"{1 / seconds:.2f}", len(by_setting[setting]), by_setting[setting][0]["commit"]])
        used += by_setting[setting] + by_setting["exact"]
    what = (
        "The same networks here, with as much left out, batches of 50 and a constant learning rate: forward `topk`, first and last layer exact. "
        "Accuracy in %, mean ± standard deviation over seeds; speed-up of the training steps."
    )
    head = ["network", "accuracy, paper", "exact, paper", "accuracy here", "exact here", "speed-up here", "seeds", "commit"]
    return block(table(head, lines), caption(what, used, "accuracy.jsonl"))


def wang_speed_table() -> str:
    """Tables 2 to 4 of Wang and Nelaturu."""
    lines = [[network, method, *figures] for network, methods in WANG_SPEED.items() for method, figures in methods.items()]
    return block(
        table(["network", "weight gradient", "speed-up", "accuracy lost, points"], lines),
        "*Wang and Nelaturu, tables 2 to 4: TensorFlow 1.13 on a Titan Xp, trained until the accuracy settles. No run of these lengths is stored here.*",
    )


def wang_schedule_table() -> str:
    """Table 5 of Wang and Nelaturu, with the short trainings stored here, those of one commit with most settings."""
    stored = rows("gradients.jsonl", work="resnet-20")
    lines, used = [], []
    for method, paper in WANG_SCHEDULES.items():
        cells = []
        for schedule in (1, 2, 3):
            group = [r for r in stored if r["setting"] == f"schedule {schedule} {method}"]
            runs = max(by(group, lambda r: r["commit"]).values(), key=_seeds_and_date)
            cells.append(f"{spread([r['final'] for r in runs])} ({len(runs)} seeds, {runs[0]['commit']})")
            used += runs
        lines.append([method, *paper, *cells])
    full = max(by([r for r in stored if r["setting"] == "exact"], lambda r: r["commit"]).values(), key=_seeds_and_date)
    used += full
    lines.insert(0, ["full gradients", "91.8", "", "", f"{spread([r['final'] for r in full])} ({len(full)} seeds, {full[0]['commit']})", "", ""])
    what = (
        "Left: Wang and Nelaturu, table 5, ResNet-20 on CIFAR-10 trained in full (ResNet-14: 90.8). Right: 6,400 images and 8 epochs, so that levels "
        "do not compare; of every setting the commit with most seeds."
    )
    head = ["weight gradient", *(f"schedule {i}, paper" for i in (1, 2, 3)), *(f"schedule {i} here" for i in (1, 2, 3))]
    return block(table(head, lines), caption(what, used, "gradients.jsonl").replace("every line", "every cell"))


def _seeds_and_date(runs: Sequence[Row]) -> tuple[int, str]:
    return len({r["seed"] for r in runs}), max(r["date"] for r in runs)


def cpu_accuracy_table() -> str:
    """Table 2 of the study of sampling on CPUs."""
    return block(
        table(["data", *CPU_METHODS], [[data, *figures] for data, figures in CPU_ACCURACY.items()]),
        "*Ebrahimi, Advani, Asudeh, table 2: test accuracy in % of networks with three hidden layers. MC-approx samples the products of the backward pass.*",
    )


def cpu_seconds_table() -> str:
    """Tables 3 and 4 of the study of sampling on CPUs."""
    return block(
        table(["method", "epoch, s", "forward, s", "backward, s"], [[method, *figures] for method, figures in CPU_SECONDS.items()]),
        "*The same paper, tables 3 and 4: seconds of an epoch on MNIST, three hidden layers, one CPU.*",
    )


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        "paper: Adelman": adelman_table(),
        "beside Adelman": beside_adelman_table(),
        "paper: Wang, tables 2 to 4": wang_speed_table(),
        "paper: Wang, table 5": wang_schedule_table(),
        "paper: CPU, table 2": cpu_accuracy_table(),
        "paper: CPU, tables 3 and 4": cpu_seconds_table(),
    }
