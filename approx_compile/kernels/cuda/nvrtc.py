"""Compile the CUDA C++ sources of this folder with NVRTC, through cuda.core, when a kernel is first needed.

No CUDA toolkit, no headers and no build step are needed. Machine code (a cubin) is kept on disk by source, architecture and version of NVRTC, in cuda.core's
own cache, which writes atomically. Every entry begins with a hash of itself, so that a damaged one is detected and compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

import platformdirs

log = logging.getLogger("approx_compile")
FOLDER = Path(__file__).parent
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Program:
    """A source of this folder with its macros set: one variant of its kernels.

    Attributes:
        file: Name of the source in `FOLDER`.
        macros: Names and values of the macros, which the head of the source lists.
    """

    file: str
    macros: tuple[tuple[str, int], ...]

    @property
    def definitions(self) -> str:
        """The macros as lines of C."""
        return "".join(f"#define {name} {value}\n" for name, value in self.macros)

    @property
    def text(self) -> str:
        """The whole text that NVRTC compiles: macros, device.cuh and the source in one piece, without files to include."""
        body = (FOLDER / self.file).read_text().replace('#include "device.cuh"\n', (FOLDER / "device.cuh").read_text().replace("#pragma once\n", ""))
        return self.definitions + body


@functools.cache
def compiler_error() -> str | None:
    """Say why this installation cannot compile CUDA C++; None if it can."""
    try:
        importlib.import_module("cuda.core.utils")
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        status = nvrtc.nvrtcVersion()[0]
    except (ImportError, OSError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None if status == nvrtc.nvrtcResult.NVRTC_SUCCESS else f"NVRTC answers {status}"


def cubin(program: Program, arch: int, folder: Path | None = None) -> bytes:
    """Return the machine code of a program, from the cache or compiled and put there.

    If the folder cannot be written, the next process compiles again; that is no error.

    Args:
        program: The source and its macros.
        arch: Architecture of the device as a number: 80 for sm_80, 90 for sm_90.
        folder: Folder of the cache; by default one in the user's cache folder.

    Returns:
        The cubin.

    Raises:
        ImportError: cuda.core is not installed.
        Exception: The source does not compile; cuda.core's exception, with NVRTC's log.
    """
    from cuda.core import ProgramOptions
    from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

    options = ProgramOptions(name=program.file, arch=f"sm_{arch}", std="c++17")
    key = make_program_cache_key(code=program.text, code_type="c++", options=options, target_type="cubin")
    try:
        with FileStreamProgramCache(folder or platformdirs.user_cache_path("approx_compile") / "cuda") as cache:
            code = _verified(cache.get(key))
            if code is None:
                code = _compiled(program, options)
                cache[key] = hashlib.sha256(code).digest() + code
    except OSError as e:
        log.debug("machine code of %s is not kept: %s", program.file, e)
        code = _compiled(program, options)
    return code


def _verified(entry: bytes | None) -> bytes | None:
    """Strip the hash from a cache entry; None if the hash does not match."""
    whole = entry is not None and hashlib.sha256(entry[_DIGEST:]).digest() == entry[:_DIGEST]
    return entry[_DIGEST:] if entry is not None and whole else None


def _compiled(program: Program, options: object) -> bytes:
    from cuda.core import Program as Source

    log.debug("compiling %s with %s", program.file, dict(program.macros))
    return bytes(Source(program.text, "c++", options).compile("cubin").code)
