"""CUDA C++ of this folder, compiled by NVRTC through cuda.core when it is first needed; no toolkit, no headers, no build step.

Machine code is kept on disk by source, architecture and NVRTC's version (cuda.core's own cache, which writes atomically), each entry behind a hash of
itself: a damaged one is compiled again.
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
    """A source of this folder with its macros set: one variant of its kernels."""

    file: str
    macros: tuple[tuple[str, int], ...]

    @property
    def definitions(self) -> str:
        return "".join(f"#define {name} {value}\n" for name, value in self.macros)

    @property
    def text(self) -> str:
        """As NVRTC gets it: one piece, without files to include."""
        body = (FOLDER / self.file).read_text().replace('#include "device.cuh"\n', (FOLDER / "device.cuh").read_text().replace("#pragma once\n", ""))
        return self.definitions + body


@functools.cache
def missing() -> str | None:
    """What keeps this installation from compiling CUDA C++; None if nothing does."""
    try:
        importlib.import_module("cuda.core.utils")
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        status = nvrtc.nvrtcVersion()[0]
    except (ImportError, OSError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None if status == nvrtc.nvrtcResult.NVRTC_SUCCESS else f"NVRTC answers {status}"


def cubin(program: Program, arch: int, folder: Path | None = None) -> bytes:
    """Machine code for sm_`arch` (80, 90, ...), from the cache in `folder` (the user's by default) or compiled and put there.

    Raises what cuda.core raises for a source that does not compile (with NVRTC's log), and ImportError without it. A folder that can't be
    written costs compiling again in the next process.
    """
    from cuda.core import ProgramOptions
    from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

    options = ProgramOptions(name=program.file, arch=f"sm_{arch}", std="c++17")
    key = make_program_cache_key(code=program.text, code_type="c++", options=options, target_type="cubin")
    try:
        with FileStreamProgramCache(folder or platformdirs.user_cache_path("approx_compile") / "cuda") as cache:
            found = _checked(cache.get(key))
            if found is None:
                found = _compiled(program, options)
                cache[key] = hashlib.sha256(found).digest() + found
    except OSError as e:
        log.debug("machine code of %s is not kept: %s", program.file, e)
        found = _compiled(program, options)
    return found


def _checked(entry: bytes | None) -> bytes | None:
    whole = entry is not None and hashlib.sha256(entry[_DIGEST:]).digest() == entry[:_DIGEST]
    return entry[_DIGEST:] if entry is not None and whole else None


def _compiled(program: Program, options: object) -> bytes:
    from cuda.core import Program as Source

    log.debug("compiling %s with %s", program.file, dict(program.macros))
    return bytes(Source(program.text, "c++", options).compile("cubin").code)
