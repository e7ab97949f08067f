"""The CUDA C++ sources built by g++ and run on the CPU (cuda_cpu/device.cuh): a `run` for the launchers of kernels/cuda/launch.py."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from approx_compile.kernels.cuda.nvrtc import FOLDER, Program

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent / "cuda_cpu"


@functools.cache
def library(program: Program) -> ctypes.CDLL:
    """Return the program's kernels as functions of the CPU. Raises AssertionError with the compiler's message."""
    source = (FOLDER / program.file).read_text()
    exports = "".join(f"EXPORT({k})\n" for k in kernels(program))
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        code.write_text(program.definitions + source + exports)
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", f"-I{HERE}"]
        done = subprocess.run([str(COMPILER), *flags, "-o", str(made), str(code)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(made))


def kernels(program: Program) -> list[str]:
    return re.findall(r'extern "C" __global__.*\n(\w+)\(', (FOLDER / program.file).read_text())


def runs(backwards: bool) -> Any:
    """Return a `run` whose threads take turns from the first to the last, or backwards; a missing barrier then changes the result."""

    def run(program: Program, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], device: torch.device) -> None:
        assert device.type == "cpu"
        values = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        getattr(library(program), f"run_{kernel}")(addresses, (ctypes.c_int * 3)(*grid), threads, int(backwards))

    return run
