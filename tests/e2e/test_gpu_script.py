"""`make gpu` is rehearsed where there is no GPU: the same script at tiny sizes, on the kernels' reference implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from approx_compile.kernels.cuda import launch
from benchmarks.kernels import gpu

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def run_script(*args: str) -> Result:
    return CliRunner().invoke(gpu.app, args)


@pytest.mark.slow
def test_every_kernel_is_compared_with_fp64() -> None:
    done = run_script("check", "--device", "cpu", "--small")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "49 of 49 within their limits" in done.stdout


@pytest.mark.parametrize("device", [("A100", 80, 108, 166912), ("H200", 90, 132, 232448)])
def test_what_is_compared_is_what_a_kernel_takes(device: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """If no kernel took the operands, the reference would be compared with itself."""
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    from approx_compile.kernels.triton import autotune, matmul_launch

    monkeypatch.setattr(autotune, "device_limits", lambda x: autotune.DeviceLimits(*device))
    served: list[bool] = []

    def skip_matmul(a: torch.Tensor, b: torch.Tensor, idx: torch.Tensor, scale: Any, unit: int, bias: Any = None) -> torch.Tensor:
        served.append(launch.supports_matmul(a, b, unit) if unit == 16 else matmul_launch.can_skip(a, b, unit))
        return a

    def skip_matmul_into(a: torch.Tensor, b: torch.Tensor, idx: torch.Tensor, scale: Any, unit: int, dim: int) -> torch.Tensor:
        served.append(launch.supports_matmul(a, b, unit) if unit == 16 else matmul_launch.can_skip_into(a, b, unit, dim))
        return a

    monkeypatch.setattr(gpu.skip_matmul, "skip_matmul", skip_matmul)
    monkeypatch.setattr(gpu.skip_matmul, "skip_matmul_into", skip_matmul_into)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for _, _, call, tensors in gpu.matmul_cases(gpu.Bench("cpu", False)):
            call(*tensors)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(served) == 54 and all(served)


def test_a_kernel_that_is_off_is_found() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 4)

    def off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b * (1.0 if a.dtype == torch.float64 else 1.01)

    error, limit = gpu.error_of(off, a, b, at=torch.float32)
    assert error > limit
    error, limit = gpu.error_of(torch.mm, a, b, at=torch.float32)
    assert error <= limit


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_rehearsal_of_the_tables_stores_nothing() -> None:
    before = sorted(p.name for p in RESULTS.iterdir())
    done = run_script("tables", "--part", "full", "--device", "cpu", "--small")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "inductor" in done.stdout and "skip" in done.stdout
    assert sorted(p.name for p in RESULTS.iterdir()) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tables_and_plots_need_a_gpu_or_a_rehearsal() -> None:
    refused = run_script("tables", "--part", "full", "--device", "cpu")
    assert refused.exit_code == 2 and "--small" in refused.stderr
    wrong = run_script("tables", "--part", "fulll", "--device", "cpu", "--small")
    assert wrong.exit_code == 2 and "fulll" in wrong.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    refused = run_script("check")
    assert refused.exit_code == 2 and "sees no GPU" in refused.stderr
