"""Compile Triton kernels ahead of time, without a GPU, and read their registers, spills and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel: registers per thread, bytes of the stack, stores and loads of spilled registers, shared memory in bytes, and the
    instructions it has, without their modifiers (`HGMMA`, `LDGSTS`, ...), and the bits that its asynchronous copies move at a time (`LDGSTS`: 32, 64, 128)."""

    registers: int
    stack: int
    spills: int
    shared: int
    opcodes: frozenset[str]
    copy_bits: frozenset[int]


_compiled: dict[Any, Code] = {}


def compile_for(
    fn: Any, arch: int, signature: Mapping[str, str], constexprs: Mapping[str, Any], aligned: tuple[str, ...] = (), warps: int = 4, stages: int = 3
) -> Code:
    """A `@triton.jit` kernel for sm_80 or sm_90 (`arch`), once per process.

    `signature`: the type of every argument by name ("*fp16", "i32", "fp32", "constexpr"), `constexprs`: the values of the last kind (also for
    an argument that is None or folded), `aligned`: arguments that are multiples of 16 (pointers, strides), as the launcher finds at run time.
    """
    key = (fn, arch, tuple(signature.items()), tuple(sorted(constexprs.items())), aligned, warps, stages)
    if key not in _compiled:
        names = list(signature)
        source = ASTSource(
            fn,
            {n: "constexpr" if n in constexprs else t for n, t in signature.items()},
            {(names.index(n),): v for n, v in constexprs.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constexprs},
        )
        options = {"num_warps": warps, "num_stages": stages}
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        _compiled[key] = _read(made.asm["cubin"], made.metadata.shared)
    return _compiled[key]


@contextmanager
def instead_of_running(kernel: Any, arch: int) -> Iterator[list[Code]]:
    """Inside, a launch of the kernel compiles it for sm_80 or sm_90, specialized for the launch's arguments as on a GPU, and adds to what is yielded."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    made: list[Code] = []

    def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, *bind(*args, **kwargs))
        code = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)
        made.append(_read(code.asm["cubin"], code.metadata.shared))

    kernel.run = run
    try:
        yield made
    finally:
        del kernel.run


def _read(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, sass = (subprocess.run([str(TOOL), what, f.name], capture_output=True, text=True, check=True).stdout for what in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump prints no registers: {usage}"
    found_ops = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", sass)
    assert found_ops, "cuobjdump prints no instructions"
    opcodes = [name for name, _ in found_ops]
    copies = {next((bits for bits in (64, 128) if str(bits) in how.split(".")), 32) for name, how in found_ops if name == "LDGSTS"}
    return Code(int(found[1]), int(found[2]), sum(o in ("STL", "LDL") for o in opcodes), shared, frozenset(opcodes), frozenset(copies))
