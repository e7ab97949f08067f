"""The machine's profile: what is read from it, and how it is stored, shared and repaired. The measured values are not tested, only that there are some."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import rich
import torch

from approx_compile import ConfigError, machine
from approx_compile.machine import Machine, Table, benchmark_grids, microbenchmarks, profile, store, timer
from approx_compile.utils import MACHINE


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have no profile, neither in memory nor on disk."""
    monkeypatch.delenv(MACHINE.name)
    monkeypatch.setattr(store, "loaded", {})
    monkeypatch.setattr(store.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return machine.path_of("cpu")


def power(*exponents: float) -> Table:
    axes = {str(i): (1.0, 8.0, 64.0) for i in range(len(exponents))}
    points = [[a] for a in axes["0"]] if len(axes) == 1 else [[a, b] for a in axes["0"] for b in axes["1"]]
    return Table(unit="us", axes=axes, values=tuple(math.prod(x**e for x, e in zip(p, exponents, strict=True)) for p in points))


def test_powers_are_interpolated_exactly_and_edges_hold() -> None:
    line, plane = power(1.5), power(1, -0.5)
    for x in (1, 1.7, 8, 20, 64):
        assert math.isclose(line.at(x), x**1.5)
        assert math.isclose(plane.at(x, 3), x * 3**-0.5)
    assert math.isclose(line.at(0.01), 1) and math.isclose(line.at(1e9), 64**1.5)
    assert math.isclose(Table(unit="us", axes={}, values=(3.0,)).at(), 3)


@pytest.mark.parametrize(
    ("axes", "values", "says"),
    [({"n": (1, 2)}, (1,), "1 values"), ({"n": (2, 1)}, (1, 1), "increasing"), ({"n": (1, 2)}, (1, 0), "positive"), ({"n": (1, 2)}, (1, math.nan), "positive")],
)
def test_damaged_tables_are_refused(axes: dict[str, tuple[float, ...]], values: tuple[float, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Table(unit="us", axes=axes, values=values)


def test_rounding_is_fine_and_measuring_again_changes_nothing() -> None:
    values = tuple(1.7**i for i in range(1, 20))
    first = Table(unit="us", axes={"n": tuple(range(1, 20))}, values=values).rounded(None)
    assert all(abs(math.log2(a / b)) <= 1 / 16 + 1e-4 for a, b in zip(first.values, values, strict=True))
    again = Table(unit="us", axes=first.axes, values=tuple(v * (1.1 if i % 2 else 0.9) for i, v in enumerate(values)))
    assert again.rounded(first) == first != again.rounded(None)
    doubled = Table(unit="us", axes=first.axes, values=tuple(2 * v for v in values))
    assert doubled.rounded(first) == doubled.rounded(None)


@pytest.mark.serial
def test_measured_stored_and_read_again(empty: Path) -> None:
    said: list[str] = []
    state = torch.random.get_rng_state()
    found = machine.current("cpu", said.append)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.quick and set(found.tables) == set(profile.required_tables(["float32", "bfloat16"])) and len(said) == 1
    assert machine.load(empty) == found and machine.load(empty).digest == found.digest
    assert found.peak_gflops("float32") >= found.table("linear.output").at(512, 1024, 1024) > found.table("linear.output").at(1, 32, 32)
    assert found.bandwidth_gb_s() > 0 and found.table("bmm", torch.float64) == found.tables["bmm.float32"]
    store.loaded.clear()
    assert machine.current("cpu", said.append) == found and len(said) == 1
    rich.print(found)

    empty.write_text(empty.read_text()[:500])
    store.loaded.clear()
    assert machine.current("cpu", said.append).quick and "measured anew" in said[1]
    assert machine.load(empty)

    old = json.loads(empty.read_text()) | {"torch_version": "1.0"}
    empty.write_text(json.dumps(old))
    store.loaded.clear()
    machine.current("cpu", said.append)
    assert "another version" in said[3] and machine.load(empty).torch_version == torch.__version__


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_no_obstacle(empty: Path) -> None:
    empty.parent.parent.mkdir(parents=True)
    empty.parent.write_text("a file where the folder should be")
    said: list[str] = []
    assert machine.current("cpu", said.append).quick and "this process only" in said[-1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_that_start_at_once_measure_once(tmp_path: Path) -> None:
    code = "from approx_compile import machine; said = []; print(machine.current('cpu', said.append).digest, len(said))"
    env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [c.communicate(timeout=300)[0].split() for c in children]
    assert out[0][0] == out[1][0] and sorted(o[1] for o in out) == ["0", "1"]


def test_what_new_memory_costs_belongs_to_the_machine(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncached = machine.device_name.__wrapped__
    monkeypatch.setattr(store, "device_name", uncached)
    for variable in ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(variable, raising=False)
    plain, path = uncached("cpu"), machine.path_of("cpu")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert uncached("cpu") == f"{plain}, THP_MEM_ALLOC_ENABLE=1" and machine.path_of("cpu") != path
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1" * 300)
    long = machine.path_of("cpu")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1" * 299 + "2")
    assert len(long.name) < 255 and machine.path_of("cpu") != long


def test_the_profile_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = machine.current()
    other = stored.model_copy(update={"name": "another"})
    with machine.use(other):
        assert machine.current("cuda") is other
    assert machine.current() == stored
    other.save(tmp_path / "other.json")
    monkeypatch.setenv(MACHINE.name, str(tmp_path / "other.json"))
    assert machine.current() == other and other.digest != stored.digest
    for text in ("{}", "{", json.dumps(json.loads(other.model_dump_json()) | {"tables": {}})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json"):
            machine.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="No such file"):
        machine.load(tmp_path / "none.json")


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="'tpu'; valid are cpu"):
        machine.calibrate("tpu")


@pytest.mark.slow
def test_what_is_compiled_is_measured_too() -> None:
    """The generated kernels of the full measurement, at one size."""
    grid = benchmark_grids.Grid(linear={}, bmm={}, conv={}, sizes=(2**16,), runs=(16.0,), allocated=(), select={})
    for kind in ("norms", "take", "untake"):
        name, unit, axes, rates = microbenchmarks.measure_moves(kind, "cpu", torch.float32, grid, False, timer.BenchmarkTimer("cpu", 1e-3))
        assert (name, unit) == (f"{kind}.float32", "GB/s") and len(rates) == 1 and rates[0] > 0
        assert axes["bytes"] == grid.sizes


def test_machines_name_what_they_lack() -> None:
    whole = machine.current()
    with pytest.raises(ValueError, match=r"tables are missing: bmm\.float32"):
        Machine.model_validate(whole.model_dump() | {"tables": {n: t for n, t in whole.tables.items() if n != "bmm.float32"}})
