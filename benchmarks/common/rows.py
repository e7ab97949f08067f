"""Result files: append rows to `benchmarks/results/*.csv` with the conditions that they were measured in, read them again, print them as a table."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from approx_compile.machine import device_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
console = Console()


def conditions() -> dict[str, Any]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "approx_compile"], capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit + ("+" if dirty else ""),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
    }


def store(name: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to results/<name>.csv (its header is the first row's keys)."""
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    console.print(f"{len(rows)} rows appended to {path.relative_to(ROOT)}")


def stored(name: str, where: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of results/<name>.csv that have these values."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [r for r in csv.DictReader(f) if all(r[k] == str(v) for k, v in where.items())]


def show(title: str, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console.print(table)
