"""Runs of the examples with frameworks: what each stores, and the table at the end that compares exact and approximate training.

The examples import this file before their framework, because a torchvision that was built for another torch would stop the framework from being imported.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError as e:
    print(f"torchvision does not fit torch {torch.__version__} ({e}): install the one of this torch. The example does without it.", file=sys.stderr)
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # declared, its operators let torchvision be imported
    for operator in ("nms", "qnms"):
        _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

BACKENDS = ("exact", "approx")


@dataclass
class Run:
    """One training run. `seconds` holds the time of every training step, of which the first ones compile; `kept` is the mean share of the samples."""

    backend: str
    seed: int
    accuracy: float
    seconds: list[float]
    kept: float
    flops_saved: float

    @property
    def compiled_s(self) -> float:
        """The time of all steps, if none had compiled: the steps that took more than five times the median count as the median."""
        middle = statistics.median(self.seconds)
        return sum(s if s < 5 * middle else middle for s in self.seconds)


def show(title: str, runs: Sequence[Run], out: Path | None = None) -> None:
    """Print the table of the runs, and add them as JSON lines to a file if one is given."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("training", "seeds", "accuracy, %", "seconds", "seconds without compiling", "samples kept", "FLOPs saved"):
        table.add_column(name, justify="left" if name == "training" else "right")
    for backend in BACKENDS:
        mine = [r for r in runs if r.backend == backend]
        if mine:
            table.add_row(
                backend,
                str(len(mine)),
                _spread([100 * r.accuracy for r in mine]),
                f"{statistics.mean(sum(r.seconds) for r in mine):.1f}",
                f"{statistics.mean(r.compiled_s for r in mine):.1f}",
                f"{100 * statistics.mean(r.kept for r in mine):.0f} %",
                f"{100 * statistics.mean(r.flops_saved for r in mine):.0f} %",
            )
    Console(width=120).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        where = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__, "threads": torch.get_num_threads()}
        with out.open("a") as file:
            for r in runs:
                row = {"what": title, **where, "machine": platform.machine(), **asdict(r), "seconds": sum(r.seconds), "seconds_compiled": r.compiled_s}
                file.write(json.dumps(row) + "\n")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
