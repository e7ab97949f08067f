"""The CUDA C++ sources as machine code, without a GPU: registers, spills, instructions and parameters of every variant; the cache of cubins; what
happens without a compiler. Their arithmetic is in test_cuda_arithmetic.py."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from approx_compile.kernels.cuda import launch, nvrtc
from approx_compile.kernels.cuda.launch import TILES, LaunchOptions, matmul_program, max_conv_program
from approx_compile.kernels.cuda.nvrtc import FOLDER, Program
from approx_compile.kernels.gradient_replacements import ConvGeometry
from approx_compile.kernels.max_conv import max_conv_weight

ARCHS = (80, 90)
PARAMETERS_AT = {80: 352, 90: 528}
"""Bytes of the constant bank before a kernel's parameters."""
needs_nvrtc = pytest.mark.skipif(nvrtc.compiler_error() is not None, reason=f"no CUDA C++ compiler: {nvrtc.compiler_error()}")


def max_conv_variants() -> list[Program]:
    wide = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
    shapes = [(1, False, True), (8, True, True), (4, False, False)]
    return [max_conv_program(dtype, j, fast, wide[dtype] if many else 1) for dtype in wide for j, fast, many in shapes]


def matmul_variants(every: bool = False) -> list[Program]:
    """Yield every tile in every mode and both dtypes, with the layouts in turn so that each occurs with every tile and every mode."""
    modes = [(None, False), (None, True), (0, False), (1, False)]
    layouts = list(itertools.product((False, True), repeat=2))
    return [
        matmul_program((torch.float16, torch.bfloat16)[(t + m // 2) % 2], 16, into, scaled, a, b, ragged, tile)
        for (t, tile), (m, (into, scaled)) in itertools.product(enumerate(TILES), enumerate(modes))
        for (i, (a, b)), ragged in itertools.product(enumerate(layouts), (False, True))
        if every or (i == (t + m) % 4 and ragged == bool((t + m) % 2))
    ] + [
        matmul_program(torch.bfloat16, unit, into, scaled, True, False, unit == 80, TILES[0])
        for unit, (into, scaled) in zip((48, 48, 80, 80), modes, strict=True)
    ]


def usage(cubin: bytes, tmp_path: Path) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
    """Return registers, bytes of stack and bytes of parameters (with what lies before them) by kernel, and the instructions of all kernels."""
    tool = pytest.importorskip("gpu_code", reason="cuobjdump comes with triton").TOOL
    path = tmp_path / "code.cubin"
    path.write_bytes(cubin)
    resources, sass = (subprocess.run([str(tool), what, str(path)], capture_output=True, text=True, check=True).stdout for what in ("-res-usage", "-sass"))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?CONSTANT\[0\]:(\d+)", resources)
    opcodes = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass))
    assert found and opcodes, resources
    return {name: (int(r), int(s), int(c)) for name, r, s, c in found}, opcodes


def name_of(program: Program) -> str:
    return "-".join(str(v) for _, v in program.macros)


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("programs", [max_conv_variants(), matmul_variants()], ids=["max_conv", "skip_matmul"])
def test_machine_code(programs: list[Program], arch: int, tmp_path: Path) -> None:
    for program in programs:
        kernels, opcodes = usage(nvrtc.cubin(program, arch, tmp_path), tmp_path)
        assert all(stack == 0 for _, stack, _ in kernels.values()) and not opcodes & {"STL", "LDL"}, (name_of(program), kernels)
        macros = dict(program.macros)
        if "TILE_M" in macros:
            ((registers, _, _),) = kernels.values()
            threads = 32 * macros["WARPS_M"] * macros["WARPS_N"]
            assert {"HMMA", "LDGSTS", "LDSM"} <= opcodes and registers * threads * macros["BLOCKS"] <= 65536, name_of(program)
        else:
            assert set(kernels) == {"largest", "accumulate", "finish"}


def recorded() -> list[tuple[Program, str, list[Any]]]:
    """Return what the launchers pass to the device: one launch of every kernel."""
    calls: list[tuple[Program, str, list[Any]]] = []

    def run(program: Program, kernel: str, grid: Any, threads: int, arguments: Any, device: torch.device) -> None:
        calls.append((program, kernel, list(arguments)))

    x, dy = torch.randn(64, 8, 4, 4), torch.randn(64, 2, 4, 4)
    launch.max_conv_weight(x, dy, 1, 1.0, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1), run)
    a = torch.randn(32, 32).half()
    launch.skip_matmul(a, a, torch.tensor([1]), torch.ones(1), 16, a[0], LaunchOptions(run))
    launch.skip_matmul_into(a, a, torch.tensor([1]), None, 16, 1, LaunchOptions(run))
    return calls


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_arguments_fill_the_parameters(arch: int, tmp_path: Path) -> None:
    """cuda.core accepts every argument, and the arguments' sizes are those of the compiled kernel's parameters."""
    seen = set()
    for program, kernel, arguments in recorded():
        types = [ctypes.c_void_p if isinstance(a, int) else type(a) for a in arguments]
        fields = {"_fields_": [(f"p{i}", t) for i, t in enumerate(types)]}
        last = getattr(type("Parameters", (ctypes.Structure,), fields), f"p{len(types) - 1}")
        kernels, _ = usage(nvrtc.cubin(program, arch, tmp_path), tmp_path)
        assert kernels[kernel][2] - PARAMETERS_AT[arch] == last.offset + last.size
        from cuda.core._kernel_arg_handler import ParamHolder  # what `launch` makes of them; asks for no driver

        ParamHolder(arguments)
        seen.add(kernel)
    assert seen == {"largest", "accumulate", "finish", "skip_matmul"}


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("program", [*max_conv_variants()[::4], *matmul_variants()[2:10:7]], ids=name_of)
def test_nvcc(program: Program, tmp_path: Path) -> None:
    macros = [f"-D{name}={value}" for name, value in program.macros]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    done = subprocess.run(
        ["nvcc", "-fatbin", "-std=c++17", "-Werror=all-warnings", *codes, *macros, "-o", str(tmp_path / "out"), str(FOLDER / program.file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# The cache

SMALL = max_conv_program(torch.float32, 1, False, 1)


def entries(folder: Path) -> list[Path]:
    return [p for p in (folder / "entries").rglob("*") if p.is_file()]


@pytest.mark.slow
@needs_nvrtc
def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = nvrtc.cubin(SMALL, 80, tmp_path)
    (kept,) = entries(tmp_path)
    written = kept.stat().st_ino, kept.stat().st_mtime_ns
    assert code[:4] == b"\x7fELF" and nvrtc.cubin(SMALL, 80, tmp_path) == code
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == written  # found, not compiled: an entry is written to a new file

    kept.write_bytes(kept.read_bytes()[:-100])
    assert nvrtc.cubin(SMALL, 80, tmp_path) == code and len(kept.read_bytes()) > len(code)  # damaged: compiled again, and whole again
    kept.write_bytes(b"")
    assert nvrtc.cubin(SMALL, 80, tmp_path) == code

    nvrtc.cubin(SMALL, 90, tmp_path)
    assert len(entries(tmp_path)) == 2
    changed = shutil.copytree(FOLDER, tmp_path / "sources")
    with (changed / "device.cuh").open("a") as f:
        f.write("// changed\n")
    monkeypatch.setattr(nvrtc, "FOLDER", changed)
    nvrtc.cubin(SMALL, 80, tmp_path)
    assert len(entries(tmp_path)) == 3


@needs_nvrtc
def test_without_a_folder_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert nvrtc.cubin(SMALL, 80, tmp_path / "file")[:4] == b"\x7fELF"


CHILD = """
import hashlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import nvrtc  # the module alone, without torch
print(hashlib.sha256(nvrtc.cubin(nvrtc.Program("max_conv.cu", MACROS), 80, pathlib.Path(sys.argv[2]))).hexdigest())
"""


@needs_nvrtc
def test_two_processes_at_once(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD.replace("MACROS", repr(SMALL.macros)), str(FOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [c.communicate()[0].strip() for c in children]
    assert said == [hashlib.sha256(nvrtc.cubin(SMALL, 80, tmp_path)).hexdigest()] * 2 and len(entries(tmp_path)) == 1


@needs_nvrtc
def test_a_source_that_does_not_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="J"):
        nvrtc.cubin(Program("max_conv.cu", (("ELEMENT", 0),)), 80, tmp_path)


# Without a compiler, and without a GPU

BARE = """
import sys, warnings
sys.modules["cuda.core"] = None
sys.modules["triton"] = None
import torch
import approx_compile
from approx_compile.kernels.cuda import launch, nvrtc
from approx_compile.kernels.max_conv import max_conv_weight
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not launch.available_or_warn(torch.device("cuda"), "this") and not launch.available_or_warn(torch.device("cuda"), "this")
print(*(f"{w.category.__name__}: {w.message}" for w in said), sep="\\n")
max_conv_weight(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4), 1, 1.0, [3, 3], [1, 1], [1, 1], [1, 1], 1)
"""


@pytest.mark.slow
def test_without_cuda_core() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("ApproxWarning: approx: this is lowered by Inductor") and "cuda.core" in line and "pip install 'approx-compile[cuda]'" in line


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_op_on_cpu(form: torch.memory_format) -> None:
    for kernel, groups, j, dtype in (
        ([3, 3], 1, 1, torch.float32),
        ([1, 1], 2, 4, torch.float32),
        ([3, 2], 2, 1, torch.bfloat16),
        ([3, 3], 1, 1, torch.float64),
    ):
        x = torch.randn(3, 8, 7, 7).to(dtype).contiguous(memory_format=form)
        dy = torch.randn(3, 6, 8 - kernel[0] + 2, 8 - kernel[1] + 2).to(dtype).contiguous(memory_format=form)
        torch.library.opcheck(max_conv_weight, (x, dy, j, 0.5, kernel, [1, 1], [1, 1], [1, 1], groups))
    x, dy = torch.randn(3, 8, 9), torch.randn(3, 6, 7)
    torch.library.opcheck(max_conv_weight, (x, dy, 1, 1.0, [3], [1], [0], [1], 1))
