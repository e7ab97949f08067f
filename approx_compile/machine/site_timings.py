"""Times of sites alone, measured once per site and machine by a process of its own (`alone`), and remembered on disk beside the machine's profile.

A process of its own, because this is asked in the middle of a compilation. What is stored never changes: the file's `store_id`, which is new whenever
the file is, therefore stands for its contents, those still to come included, and is all that a cache key needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from filelock import FileLock
from pydantic import BaseModel

from approx_compile import machine
from approx_compile.machine import float32_precision
from approx_compile.utils import write_atomically

_CHILD_TIMEOUT_S = 3600


OperandLayout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of an operand."""


@dataclass(frozen=True)
class TimedProduct:
    """What of a site decides its time: "mm", "bmm" or "convolution" of two operands; which of them is a weight, and which need a gradient.

    `rest`: the convolution's arguments behind the bias (stride, padding, dilation, transposed, output_padding, groups).
    """

    op: str
    layouts: tuple[OperandLayout, OperandLayout]
    dtype: str
    device: str
    weight: int | None = 1
    needs_grad: tuple[bool, bool] = (True, True)
    rest: tuple[Any, ...] = ()


@dataclass(frozen=True)
class TimingRequest:
    """How long does a step of this product take, exactly and under each of these options, new buffers on huge pages or not?"""

    product: TimedProduct
    options: tuple[dict[str, Any], ...]
    huge_pages: bool = True

    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


class StoredTimes(BaseModel):
    """The file: its name, and microseconds by question (exact, then each of its options)."""

    name: str
    us: dict[str, list[float]] = {}

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json())


def path_of(profile: machine.Machine) -> Path:
    """Another profile, or another precision of float32, another file: the times belong to them."""
    return machine.path_of(profile.device).parent / f"times-{profile.digest[:16]}{float32_precision.label(profile.device)}.json"


def store_id(profile: machine.Machine) -> str:
    """The name of the file of times, made here if there is none."""
    return _update_file(path_of(profile), lambda times: times).name


def step_times_us(questions: Sequence[TimingRequest], profile: machine.Machine, say: machine.Notice = lambda text: None) -> list[list[float]]:
    """Microseconds of each question's steps. Raises RuntimeError with the child's last words if it fails to measure."""

    def complete(times: StoredTimes) -> StoredTimes:
        missing = list({q.key(): q for q in questions if q.key() not in times.us}.values())
        if missing:
            say(f"measuring {len(missing)} kinds of sites, some seconds each; the times are kept in {path_of(profile)}")
            found = _run_benchmark(missing, profile)
            times = times.model_copy(update={"us": times.us | {q.key(): us for q, us in zip(missing, found, strict=True)}})
        return times

    times = _update_file(path_of(profile), complete)
    return [times.us[q.key()] for q in questions]


def _update_file(path: Path, change: Callable[[StoredTimes], StoredTimes]) -> StoredTimes:
    """The file's contents, changed under a lock; a damaged file is begun anew, under a new name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        try:
            before = StoredTimes.model_validate_json(path.read_text())
        except (OSError, pydantic.ValidationError):
            before = StoredTimes(name=uuid.uuid4().hex)
            before.save(path)
        after = change(before)
        if after != before:
            after.save(path)
        return after


def _run_benchmark(questions: Sequence[TimingRequest], profile: machine.Machine) -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "machine.json")
        asked = {"threads": torch.get_num_threads(), "precision": float32_precision.settings(), "questions": [dataclasses.asdict(q) for q in questions]}
        paths = os.pathsep.join(p for p in sys.path if p)
        env = {k: v for k, v in os.environ.items() if k != "APPROX_COMPILE_DISABLE"} | {machine.FILE: f"{folder}/machine.json", "PYTHONPATH": paths}
        child = [sys.executable, "-m", "approx_compile.backend.site_benchmark"]
        done = subprocess.run(child, input=json.dumps(asked), env=env, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"policy 'measure': the process that times sites failed ({last}); policy 'cost' needs no measurement of sites")
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found
