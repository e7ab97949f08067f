"""What this machine can do, measured: the numbers behind every prediction of time.

A `Machine` is a set of tables, each over a grid of sizes, for one device, number of threads, precision of float32 and version of torch. It is measured
once (a quick one, under 3 s, when it is first needed; the whole, under 60 s on a CPU, by `calibrate`), rounded, and stored in the user's cache folder.

Rounding and memory make it fit for a cache key: values lie on a grid of eighths of an octave (an error of at most 4.4%), and a new measurement
within a quarter of an octave (19%) of the stored value leaves that value as it is. So calibrating again on the same machine changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import platformdirs
import pydantic
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, model_validator
from rich.table import Table as RichTable

from approx_compile import _torch
from approx_compile.config import ConfigError
from approx_compile.machine import float32_precision, huge_pages, microbenchmarks
from approx_compile.utils import write_atomically

FILE = "APPROX_COMPILE_MACHINE"
"""Environment variable: the profile to use, whatever this machine is."""

DEVICES = ("cpu", "cuda")

_ALLOCATOR = re.compile(r"THP_MEM_ALLOC_ENABLE|LD_PRELOAD|GLIBC_TUNABLES|MALLOC_\w+|TCMALLOC_\w+")
"""Environment variables that change what new memory costs: huge pages in torch's allocator on CPUs, another malloc, its settings."""

FORMAT = 3
"""Of the file and of what is measured: a file of another format is measured anew."""

_LONGEST_NAME = 200
_STEPS = 8
_SAME = 0.25
_WAIT_S = 180.0

Notice = Callable[[str], None]


class Table(BaseModel):
    """A quantity over a grid of sizes: `axes` are the sizes, increasing, and `values` the quantity at every combination, the last axis fastest."""

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
        """Multilinear in the logarithms of sizes and values, so exact for powers; constant outside the grid."""
        found = np.log(np.asarray(self.values)).reshape([len(a) for a in self.axes.values()])
        for axis, size in zip(self.axes.values(), sizes, strict=True):
            place = float(np.interp(math.log(max(size, 1e-9)), np.log(axis), range(len(axis))))
            low = min(int(place), max(0, len(axis) - 2))
            high = min(low + 1, len(axis) - 1)
            found = found[low] + (place - low) * (found[high] - found[low])
        return math.exp(float(found))

    def rounded(self, before: Table | None) -> Table:
        """On the grid; where `before` holds nearly the same values, its values."""
        old = before.values if before is not None and before.axes == self.axes and before.unit == self.unit else (math.nan,) * len(self.values)
        kept = (o if abs(math.log2(v / o)) < _SAME else _on_grid(v) for v, o in zip(self.values, old, strict=True))
        return self.model_copy(update={"values": tuple(kept)})


def _on_grid(value: float) -> float:
    return float(f"{2 ** (round(_STEPS * math.log2(value)) / _STEPS):.4g}")


class Machine(BaseModel):
    """The profile of a device. `tables` by name (see `gauges`); `quick`: from the short measurement, which decisions trust less."""

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
        missing = [n for n in microbenchmarks.names(self.dtypes()) if n not in self.tables]
        if missing:
            raise ValueError(f"tables are missing: {', '.join(missing[:3])}")
        return self

    def dtypes(self) -> list[str]:
        return [n.rsplit(".", 1)[1] for n in self.tables if n.startswith("linear.output.")] or ["float32"]

    def table(self, name: str, dtype: torch.dtype | str = "float32") -> Table:
        """The table `name` for a dtype, float32's for one that was not measured."""
        own = f"{name}.{str(dtype).removeprefix('torch.')}"
        return self.tables.get(name) or self.tables.get(own) or self.tables[f"{name}.float32"]

    def has(self, name: str, dtype: torch.dtype | str) -> bool:
        """Whether a table was measured for a dtype (kernels of ours are, where they run)."""
        return f"{name}.{str(dtype).removeprefix('torch.')}" in self.tables

    def peak_gflops(self, dtype: torch.dtype | str) -> float:
        """The best rate of any product measured."""
        own = str(dtype).removeprefix("torch.")
        own = own if own in self.dtypes() else "float32"
        return max(max(t.values) for n, t in self.tables.items() if t.unit == "GFLOP/s" and n.endswith("." + own))

    def bandwidth_gb_s(self, size: float = 1e12) -> float:
        """Of reading `size` bytes (by default far more than any cache holds)."""
        return self.tables["read"].at(size)

    @property  # not cached: a changed copy of a model copies what is cached, too
    def digest(self) -> str:
        """A hash of everything a decision may read."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=1))

    def __rich__(self) -> RichTable:
        kind = "quick measurement" if self.quick else "calibrated"
        table = RichTable(title=f"{self.name}, {self.threads} threads, torch {self.torch_version} ({kind})")
        for column, right in (("what", False), ("over", False), ("lowest", True), ("highest", True), ("unit", False)):
            table.add_column(column, justify="right" if right else "left")
        for name, t in self.tables.items():
            over = ", ".join(f"{axis} {sizes[0]:g}..{sizes[-1]:g}" for axis, sizes in t.axes.items())
            table.add_row(name, over, f"{min(t.values):.3g}", f"{max(t.values):.3g}", t.unit)
        return table


def load(path: str | os.PathLike[str]) -> Machine:
    """A stored profile. Raises ConfigError for a file that can't be read or is none."""
    try:
        return Machine.model_validate_json(Path(path).read_text())
    except OSError as e:
        raise ConfigError(f"machine profile {path}: {e.strerror or e}; `approx_compile.machine.calibrate()` makes one") from None
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"machine profile {path}: {where}: {first['msg']}; calibrate again or name another file") from None


_used: list[Machine] = []
_known: dict[tuple[str, str, int, str], Machine] = {}


@contextlib.contextmanager
def use(machine: Machine) -> Iterator[None]:
    """Decide by this profile inside the block, in all threads of the process."""
    _used.append(machine)
    try:
        yield
    finally:
        _used.remove(machine)


def current(device: str = "cpu", say: Notice = lambda text: None) -> Machine:
    """The profile to decide by: the one in `use`, the file in the environment variable, what is stored, or else a quick measurement, then stored.

    `say` is told why something is measured. Within a process a device's profile changes only by `calibrate`.
    """
    if _used:
        return _used[-1]
    if file := os.environ.get(FILE):
        return _from_file(file, Path(file).stat().st_mtime_ns if Path(file).exists() else 0)
    key = _key(device)
    if key not in _known:
        _known[key] = _stored_or_measured(device, say)
    return _known[key]


def stored(device: str = "cpu") -> Machine | None:
    """The profile to decide by where none is worth measuring: `current`, but None where there is none yet."""
    if _used or os.environ.get(FILE):
        return current(device)
    if device not in DEVICES:
        return None
    key = _key(device)
    if key not in _known and (found := _stored(path_of(device), lambda text: None, key)) is not None:
        _known[key] = found
    return _known.get(key)


@functools.cache
def _from_file(file: str, modified: int) -> Machine:
    return load(file)


def path_of(device: str = "cpu") -> Path:
    """Where the profile of a device, the present number of threads and precision of float32, and this torch is stored."""
    kind, name, threads, label = _key(device)
    words = f"{kind}-{name}-{threads}-threads-torch-{torch.__version__}{label}"
    plain = re.sub(r"[^\w.+-]+", "_", words)
    if len(plain) > _LONGEST_NAME:
        plain = plain[:_LONGEST_NAME] + hashlib.sha256(words.encode()).hexdigest()[:8]
    return platformdirs.user_cache_path("approx_compile") / "machine" / f"{plain}.json"


def calibrate(device: str | None = None, *, quick: bool = False, progress: bool = False) -> Machine:
    """Measure this machine, store the profile and decide by it from now on; on a CPU under 60 s, or under 3 s if `quick`. On a GPU the kernels
    of ours, too, are compiled and tuned, which takes longer; how long has not been measured. The profile holds for the number of threads and the precision
    of float32 (`torch.set_float32_matmul_precision`, `fp32_precision`) that are set now.

    `device`: "cpu" or "cuda", by default cuda where there is one. `progress`: a bar on the terminal. The result prints as a table (rich).
    Raises ConfigError for a device that is not there, and OSError where the profile can't be stored.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device: got {device!r}; valid are cpu" + (", cuda" if torch.cuda.is_available() else " (this torch sees no GPU)"))
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        found = _measured(device, quick, progress, _stored(path, lambda text: None, _key(device)))
        found.save(path)
    _known[_key(device)] = found
    return found


def _key(device: str) -> tuple[str, str, int, str]:
    return device, device_name(device), torch.get_num_threads(), float32_precision.label(device)


@functools.cache
def device_name(device: str) -> str:
    """The accelerator's name ("cuda"), or the processor's ("cpu") and what is set of its memory: "AMD EPYC, THP_MEM_ALLOC_ENABLE=1"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    never = ["transparent_hugepage=never"] if huge_pages.setting() == "never" else []
    return ", ".join([name, *never, *(f"{k}={v}" for k, v in sorted(os.environ.items()) if v and _ALLOCATOR.fullmatch(k))])


def _stored(path: Path, say: Notice, key: tuple[str, str, int, str]) -> Machine | None:
    if not path.exists():
        return None
    try:
        found = load(path)
    except ConfigError as e:
        say(f"{e} (measured anew)")
        return None
    if (found.format, found.torch_version, (found.device, found.name, found.threads)) == (FORMAT, torch.__version__, key[:3]):
        return found
    say(f"machine profile {path} was made for another version or machine and is measured anew")
    return None


def _stored_or_measured(device: str, say: Notice) -> Machine:
    path, key = path_of(device), _key(device)
    found = _stored(path, say, key)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_WAIT_S):  # of several processes one measures
            found = _stored(path, lambda text: None, key)
            if found is None:
                say(f"measuring {key[1]} ({key[2]} threads) once, a few seconds; `approx_compile.machine.calibrate()` does it more precisely")
                found = _measured(device, True, False, None)
                found.save(path)
    except (OSError, Timeout) as e:
        say(f"the machine's profile could not be stored and holds for this process only: {e}")
        found = found or _measured(device, True, False, None)
    return found


def _measured(device: str, quick: bool, progress: bool, before: Machine | None) -> Machine:
    key = _key(device)
    with _torch.no_modes():
        found = {n: Table(unit=unit, axes=axes, values=values) for n, unit, axes, values in microbenchmarks.measure(device, quick, progress)}
    same = before.tables if before is not None and before.quick == quick else {}
    tables = {n: t.rounded(same.get(n)) for n, t in found.items()}
    return Machine(format=FORMAT, device=device, name=key[1], threads=key[2], torch_version=torch.__version__, quick=quick, tables=tables)
