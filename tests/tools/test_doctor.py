"""doctor: what it finds, what it calls a problem, and its exit code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from approx_compile import _torch
from approx_compile._torch import known_faults
from approx_compile.tools import doctor
from approx_compile.tools.cli import app


def found(**replaced: Any) -> dict[str, doctor.Check]:
    return {c.name: c for c in doctor.examine(compile_model=False).checks}


def test_versions_devices_caches_and_faults() -> None:
    checks = found()
    assert torch.__version__ in checks["versions"].found
    assert checks["CPU"].found.endswith(f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}")
    assert checks["Inductor's cache"].found.endswith(_torch.cache_folder().name)
    fault = next(f for f in known_faults.FAULTS if f.in_version("2.13.0"))
    if fault.in_version(torch.__version__):
        assert fault.name in checks["known fault of torch"].found and "2.14" in checks["known fault of torch"].advice
    assert "days old" in checks["machine profile (cpu)"].found  # the tests' own profile
    assert "report: installed" in checks["extras"].found


@pytest.mark.parametrize(
    ("name", "value", "check", "advice"),
    [
        ("CXX", "/nowhere/c++", "C++ compiler", "install one"),
        ("APPROX_COMPILE_MACHINE", "/nowhere/profile.json", "machine profile (cpu)", "unset APPROX_COMPILE_MACHINE"),
    ],
)
def test_problems_have_advice(name: str, value: str, check: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    if name == "CXX":
        monkeypatch.setattr(_torch, "cpp_compiler", lambda: value)
    problem = found()[check]
    assert problem.state == "problem" and advice in problem.advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setattr(_torch, "cache_folder", lambda: tmp_path / "inductor")
    assert found()["Inductor's cache"].advice.startswith("set TORCHINDUCTOR_CACHE_DIR")


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "cpp_compiler", lambda: None)
    assert found()["C++ compiler"].found.startswith("none found")
    monkeypatch.setattr("approx_compile.tools.cli.examine", lambda: doctor.examine(compile_model=False))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1 and "1 problem: C++ compiler." in done.stdout and "apt install build-essential" in done.stdout


def test_what_a_check_raises_is_a_problem() -> None:
    def fails() -> doctor.Check:
        raise RuntimeError("\nno such thing\nmore")

    check = doctor._attempt("it", fails)
    assert (check.state, check.found) == ("problem", "RuntimeError: no such thing")


@pytest.mark.parametrize(("version", "state"), [("2.13.1+cpu", "ok"), ("2.14.0a0+git1", "note")])
def test_a_version_of_torch_that_was_not_tested(version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    check = found()["versions"]
    assert check.state == state and version in check.found and ("tested with torch 2.13" in check.advice) == (state == "note")


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPROX_COMPILE_DISABLE", "1")
    assert found()["APPROX_COMPILE_DISABLE"].state == "note"


@pytest.mark.slow
def test_all_is_well_here() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert "with eager's gradients" in checks["Inductor"]["found"]
    small = checks["small model"]["found"]
    assert "Backward: adaptive rows, 256 of 256 now" in small and "times fewer FLOPs" in small
    expected, best, worst = map(float, re.search(r"predicted to take ([0-9.]+) of the time \(([0-9.]+) to ([0-9.]+) if", small).groups())
    assert 0.25 < best < expected < worst < 1
