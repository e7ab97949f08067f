"""The measurements that `recommend` cites: figures of rows in benchmarks/results, and of the tables of a published study.

A test compares every figure with the stored rows, so that none can be out of date or without a row.
"""

from __future__ import annotations

from dataclasses import dataclass

STUDY = "Ebrahimi, Advani and Asudeh 2023, tables 2 to 4 (docs/results/papers.md)"


@dataclass(frozen=True)
class Evidence:
    """Trainings of one setting beside exact training, at one commit.

    Attributes:
        work: What was trained, in words.
        name: The name of the work in the file.
        setting: The name of the setting in the file.
        commit: The commit of the rows.
        seeds: How many trainings of each there are.
        score: The mean of the final scores: test accuracy in %, or test loss.
        exact: The same of exact training.
        time: The mean time of the training steps, as a share of exact training's.
        file: The file in benchmarks/results.
    """

    work: str
    name: str
    setting: str
    commit: str
    seeds: int
    score: float
    exact: float
    time: float
    file: str = "accuracy.jsonl"

    def __str__(self) -> str:
        what = f"{self.work}: {self.score:.2f} beside {self.exact:.2f} exact in {self.time:.2f} of the time ({self.seeds} seeds)"
        return f"{what}; benchmarks/results/{self.file}, work {self.name}, setting {self.setting!r}, commit {self.commit}"


MLP = Evidence("Fashion-MNIST, MLP 3 x 1024, batch 128", "fashion-mlp", "adaptive", "288b964", 3, 90.29, 90.38, 0.60)
CNN = Evidence("MNIST, small CNN without BatchNorm, batch 128", "mnist-cnn", "adaptive", "bfee634", 3, 98.83, 98.79, 0.61)
FINE_TUNED = Evidence("MNIST CNN fine-tuned on EMNIST-Letters, 8 epochs", "emnist-finetune-8", "adaptive", "cc28893", 3, 91.96, 91.94, 0.71)
FINE_TUNED_SHORT = Evidence("MNIST CNN fine-tuned on EMNIST-Letters, 3 epochs", "emnist-finetune", "adaptive", "288b964", 2, 88.59, 88.71, 0.85)
LANGUAGE = Evidence("characters, 4 transformer blocks, from scratch (test loss)", "char-transformer", "adaptive", "a31e085", 2, 2.40, 2.40, 1.00)
BATCH_NORM = Evidence("CIFAR-10, WRN-10-2 with BatchNorm", "cifar-wrn", "adaptive", "cc28893", 2, 67.87, 67.87, 1.00)

ALL = (MLP, CNN, FINE_TUNED, FINE_TUNED_SHORT, LANGUAGE, BATCH_NORM)
