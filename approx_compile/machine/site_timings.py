"""Have single sites timed in a child process, once per site and machine, and keep the times on disk beside the machine's profile.

A child process (`approx_compile.backend.site_benchmark`) compiles and times the sites, because the times are asked for in the middle of a compilation.
This module is the parent's side: it writes the requests, runs the child and stores the answers.

Stored times never change. The `name` in the file is new whenever the file is; it therefore stands for all contents of the file, also for those that will
be added, and is all that a cache key needs (`store_id`).
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

from approx_compile.machine import float32_precision, store
from approx_compile.machine.profile import Machine
from approx_compile.machine.store import Notify
from approx_compile.utils import DISABLE, MACHINE, write_atomically

_CHILD_TIMEOUT_S = 3600

OperandLayout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of an operand, in elements."""


@dataclass(frozen=True)
class TimedProduct:
    """The part of a site that decides its time.

    Attributes:
        op: "mm", "bmm" or "convolution".
        layouts: Shape and strides of the two operands.
        dtype: The dtype of the operands, such as "float32".
        device: "cpu" or "cuda".
        weight: Which operand is a weight, 0 or 1; None if neither is.
        needs_grad: Which operands need a gradient.
        rest: The arguments of a convolution after the bias: stride, padding, dilation, transposed, output_padding, groups.
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
    """A request to time a step (forward and backward pass) of a product, exactly and under some options.

    Attributes:
        product: The product.
        options: Options of the backend, one dict for every way to sample the product.
        huge_pages: Whether large new buffers ask for huge pages in all of these steps.
    """

    product: TimedProduct
    options: tuple[dict[str, Any], ...]
    huge_pages: bool = True

    def key(self) -> str:
        """Return the key under which the times of this request are stored: its fields as JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


class StoredTimes(BaseModel):
    """The contents of the file.

    Attributes:
        name: A random name, new whenever the file is begun anew.
        us: Microseconds of a step by the request's key: first the exact step, then one for each of the request's options.
    """

    name: str
    us: dict[str, list[float]] = {}

    def save(self, path: Path) -> None:
        """Write the times to a file as JSON, atomically. Raises OSError if the file cannot be written."""
        write_atomically(path, self.model_dump_json())


def path_of(profile: Machine) -> Path:
    """Return the file of times for a profile and the present precision of float32."""
    return store.path_of(profile.device).parent / f"times-{profile.digest[:16]}{float32_precision.label(profile.device)}.json"


def store_id(profile: Machine) -> str:
    """Return the name that stands for the contents of the file of times; the file is made if there is none.

    Args:
        profile: The profile of the machine that the times belong to.

    Returns:
        The name, for a cache key.

    Raises:
        OSError: The file cannot be written.
    """
    return _update_file(path_of(profile), lambda times: times).name


def step_times_us(requests: Sequence[TimingRequest], profile: Machine, notify: Notify = lambda text: None) -> list[list[float]]:
    """Return the times of requested steps: stored ones, and new ones that a child process measures and that are then stored.

    Args:
        requests: The steps to time.
        profile: The profile of the machine that the times belong to.
        notify: Is told when something has to be measured.

    Returns:
        For every request the microseconds of the exact step and of the step under each of its options.

    Raises:
        RuntimeError: The child fails to measure; the message has its last line of output.
    """

    def complete(times: StoredTimes) -> StoredTimes:
        missing = list({r.key(): r for r in requests if r.key() not in times.us}.values())
        if missing:
            notify(f"measuring {len(missing)} kinds of sites, some seconds each; the times are kept in {path_of(profile)}")
            measured = _run_benchmark(missing, profile)
            times = times.model_copy(update={"us": times.us | {r.key(): us for r, us in zip(missing, measured, strict=True)}})
        return times

    times = _update_file(path_of(profile), complete)
    return [times.us[r.key()] for r in requests]


def _update_file(path: Path, change: Callable[[StoredTimes], StoredTimes]) -> StoredTimes:
    """Apply `change` to the contents of the file under a lock and return them; a damaged file is begun anew, under a new name."""
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


def _run_benchmark(requests: Sequence[TimingRequest], profile: Machine) -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "machine.json")
        asked = {"threads": torch.get_num_threads(), "precision": float32_precision.settings(), "questions": [dataclasses.asdict(r) for r in requests]}
        paths = os.pathsep.join(p for p in sys.path if p)
        env = {k: v for k, v in os.environ.items() if k != DISABLE.name} | {MACHINE.name: f"{folder}/machine.json", "PYTHONPATH": paths}
        child = [sys.executable, "-m", "approx_compile.backend.site_benchmark"]
        done = subprocess.run(child, input=json.dumps(asked), env=env, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"policy 'measure': the process that times sites failed ({last}); policy 'cost' needs no measurement of sites")
    times: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return times
