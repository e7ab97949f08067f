"""The profile of one device: measured rates and latencies from which every prediction of time is computed.

A `Machine` is a set of tables, each over a grid of sizes, for one device, number of threads, precision of float32 and version of torch.
`microbenchmarks` measures the tables, `calibration` decides when, and `store` keeps the profile in the user's cache folder.

A profile is part of the cache key of compiled code, so measuring again on the same machine must not change it. Two rules ensure that. Values are
rounded to a grid of eighths of an octave (an error of at most 4.4%), and a new measurement within a quarter of an octave (19%) of the stored value
keeps the stored value.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from rich.table import Table as RichTable

from approx_compile.config.words import ESTIMATORS, PRODUCTS
from approx_compile.utils import counted, write_atomically

FORMAT = 3
"""Version of the file and of what is measured. A profile of another version is measured anew."""

_STEPS_PER_OCTAVE = 8
_UNCHANGED_OCTAVES = 0.25


class Table(BaseModel):
    """A measured quantity over a grid of sizes.

    Attributes:
        unit: The unit of the values, such as "GFLOP/s", "GB/s" or "us".
        axes: The sizes along every axis of the grid, increasing.
        values: The quantity at every combination of sizes, the last axis fastest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str
    axes: dict[str, tuple[float, ...]]
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _fits(self) -> Table:
        if not all(math.isfinite(v) and v > 0 for v in itertools.chain(self.values, *self.axes.values())):
            raise ValueError("a value is not a positive number")
        if any(a >= b for axis in self.axes.values() for a, b in itertools.pairwise(axis)):
            raise ValueError("an axis is not increasing")
        if len(self.values) != math.prod(len(a) for a in self.axes.values()):
            raise ValueError(f"{len(self.values)} values for a grid of {' x '.join(str(len(a)) for a in self.axes.values())}")
        return self

    def at(self, *sizes: float) -> float:
        """Interpolate the quantity at some sizes.

        The interpolation is multilinear in the logarithms of sizes and values, so it is exact for powers. Outside the grid the value of the nearest
        edge holds.

        Args:
            *sizes: One size for every axis, in the order of `axes`.

        Returns:
            The quantity, in `unit`.
        """
        logs = np.log(np.asarray(self.values)).reshape([len(a) for a in self.axes.values()])
        for axis, size in zip(self.axes.values(), sizes, strict=True):
            place = float(np.interp(math.log(max(size, 1e-9)), np.log(axis), range(len(axis))))
            low = min(int(place), max(0, len(axis) - 2))
            high = min(low + 1, len(axis) - 1)
            logs = logs[low] + (place - low) * (logs[high] - logs[low])
        return math.exp(float(logs))

    def rounded(self, before: Table | None) -> Table:
        """Round the values so that measuring again changes nothing.

        Args:
            before: The stored table, if there is one. Its values are kept where the new ones are within a quarter of an octave and the grids are equal.

        Returns:
            The table with stored values where they are kept, and with values on the grid of eighths of an octave elsewhere.
        """
        old = before.values if before is not None and before.axes == self.axes and before.unit == self.unit else (math.nan,) * len(self.values)
        kept = (o if abs(math.log2(v / o)) < _UNCHANGED_OCTAVES else _on_grid(v) for v, o in zip(self.values, old, strict=True))
        return self.model_copy(update={"values": tuple(kept)})


def _on_grid(value: float) -> float:
    return float(f"{2 ** (round(_STEPS_PER_OCTAVE * math.log2(value)) / _STEPS_PER_OCTAVE):.4g}")


def required_tables(dtypes: Sequence[str]) -> list[str]:
    """Return the names of the tables that every profile with these dtypes has; `microbenchmarks` says what each of them measures."""
    by_dtype = [*(f"linear.{p}" for p in PRODUCTS), "bmm", *(f"conv.{p}" for p in PRODUCTS), "norms", "take", "untake"]
    return [f"{n}.{d}" for n in by_dtype for d in dtypes] + [f"select.{m}" for m in ESTIMATORS] + ["read", "fresh", "kernel", "extern"]


class Machine(BaseModel):
    """The profile of a device.

    Attributes:
        format: The version of the file's format, `FORMAT`.
        device: "cpu" or "cuda".
        name: The name of the processor or accelerator, with the settings of the environment that change the cost of memory.
        threads: The number of threads of torch during the measurement.
        torch_version: The version of torch that was measured.
        quick: Whether the short measurement made it, which decisions trust less.
        tables: The measured tables by name (see `microbenchmarks`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    device: str
    name: str
    threads: int
    torch_version: str
    quick: bool
    tables: dict[str, Table]

    @model_validator(mode="after")
    def _complete(self) -> Machine:
        if self.format != FORMAT:
            raise ValueError(f"it has format {self.format}, this version reads {FORMAT}")
        missing = [n for n in required_tables(self.dtypes()) if n not in self.tables]
        if missing:
            raise ValueError(f"tables are missing: {', '.join(missing[:3])}")
        return self

    def dtypes(self) -> list[str]:
        """Return the dtypes that were measured, such as "bfloat16"."""
        return [n.rsplit(".", 1)[1] for n in self.tables if n.startswith("linear.output.")] or ["float32"]

    def table(self, name: str, dtype: torch.dtype | str = "float32") -> Table:
        """Return a table by name, for a dtype where it depends on one; the table of float32 stands in for a dtype that was not measured."""
        return self.tables.get(name) or self.tables.get(_of_dtype(name, dtype)) or self.tables[f"{name}.float32"]

    def has(self, name: str, dtype: torch.dtype | str) -> bool:
        """Whether a table was measured for a dtype; this project's own kernels are measured only where they run."""
        return _of_dtype(name, dtype) in self.tables

    def peak_gflops(self, dtype: torch.dtype | str) -> float:
        """Return the best rate of any product of a dtype (of float32, if the dtype was not measured), in GFLOP/s."""
        dtype = str(dtype).removeprefix("torch.")
        dtype = dtype if dtype in self.dtypes() else "float32"
        return max(max(t.values) for n, t in self.tables.items() if t.unit == "GFLOP/s" and n.endswith("." + dtype))

    def bandwidth_gb_s(self, size: float = 1e12) -> float:
        """Return the bandwidth of reading `size` bytes (by default far more than any cache holds), in GB/s."""
        return self.tables["read"].at(size)

    @property
    def digest(self) -> str:
        """A hash of everything that a decision may read. It is not cached, because pydantic copies what is cached into a changed copy of a model."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the profile to a file as JSON, atomically.

        Args:
            path: The file; missing folders are made.

        Raises:
            OSError: The file cannot be written.
        """
        write_atomically(path, self.model_dump_json(indent=1))

    def __rich__(self) -> RichTable:
        """Return the profile as a table for rich: the range of sizes and values of every measured table."""
        kind = "quick measurement" if self.quick else "calibrated"
        table = RichTable(title=f"{self.name}, {counted(self.threads, 'thread')}, torch {self.torch_version} ({kind})")
        for column, right in (("what", False), ("over", False), ("lowest", True), ("highest", True), ("unit", False)):
            table.add_column(column, justify="right" if right else "left")
        for name, t in self.tables.items():
            over = ", ".join(f"{axis} {sizes[0]:g}..{sizes[-1]:g}" for axis, sizes in t.axes.items())
            table.add_row(name, over, f"{min(t.values):.3g}", f"{max(t.values):.3g}", t.unit)
        return table


def _of_dtype(name: str, dtype: torch.dtype | str) -> str:
    return f"{name}.{str(dtype).removeprefix('torch.')}"
