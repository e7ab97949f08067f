"""`make gpu`, rehearsed where there is no GPU: the same script at tiny sizes, on the kernels' references."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
RESULTS = SCRIPT.parent / "results"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_every_kernel_is_compared_with_fp64() -> None:
    done = run("check", "--device", "cpu", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "49 of 49 within their limits" in done.stdout


def test_a_kernel_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", gpu)
    spec.loader.exec_module(gpu)
    a, b = torch.randn(4, 8), torch.randn(8, 4)

    def off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b * (1.0 if a.dtype == torch.float64 else 1.01)

    error, limit = gpu.error_of(off, a, b, at=torch.float32)
    assert error > limit
    error, limit = gpu.error_of(torch.mm, a, b, at=torch.float32)
    assert error <= limit


def test_tables_and_plots_need_a_gpu_or_a_rehearsal() -> None:
    before = sorted(p.name for p in RESULTS.iterdir())
    done = run("tables", "--part", "full", "--device", "cpu", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inductor" in done.stdout and "skip" in done.stdout
    assert sorted(p.name for p in RESULTS.iterdir()) == before  # a rehearsal stores nothing
    refused = run("tables", "--part", "full", "--device", "cpu")
    assert refused.returncode == 2 and "--small" in refused.stderr
    wrong = run("tables", "--part", "fulll", "--device", "cpu", "--small")
    assert wrong.returncode == 2 and "fulll" in wrong.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    refused = run("check")
    assert refused.returncode == 2 and "sees no GPU" in refused.stderr
