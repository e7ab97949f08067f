"""Allocate the large new buffers of compiled code on CPUs on huge pages.

A training step writes mostly new memory: activations and gradients live for one step, and the C library returns the largest blocks, and what is left
free at the end of its heap, to the system. The system then hands the memory out again in pages of 4 KiB. Each page costs a fault and has to be cleared,
which gives a few GB/s; in pages of 2 MiB (Linux's transparent huge pages) this is several times as fast. Where the system leaves the choice to programs
("madvise", as most distributions do), a program has to ask for huge pages, and Inductor's code does not. (torch's own allocator does so for a whole
process with THP_MEM_ALLOC_ENABLE=1.) No value changes, and no block gets larger. Results that ATen allocates itself, such as those of convolutions, are
not affected.

`HugePages` adds one line to the Python code that Inductor generates for a graph with large buffers; the code then allocates through `empty_strided_cpu`
of this module.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.config import ApproxConfig

LEAST_BYTES = 8 * 2**20
"""Buffers of at least this size ask for huge pages. It is four huge pages, of which a buffer contains three whole ones wherever it begins. Smaller buffers
mostly lie in memory that the process has already, and each request takes 3 us."""

_LINE = f"from {__name__} import empty_strided_cpu"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_plain = _torch.empty_strided_cpu


class HugePages(_torch.CustomSchedulerPass):
    """A scheduler pass of Inductor that adds the import of `empty_strided_cpu` to the generated code; it changes no node of the graph."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Add the import if the graph has a buffer of at least `LEAST_BYTES`; Inductor calls this before it fuses the nodes, which are returned as given."""
        if max(_torch.cpu_buffer_bytes(), default=0) >= LEAST_BYTES:
            _torch.append_to_header(_LINE)
        return nodes

    def uuid(self) -> str:
        """Return what Inductor's cache key needs of this pass: a hash of the line and of the least size."""
        return hashlib.sha256(f"{_LINE} {LEAST_BYTES}".encode()).hexdigest()


def patches(config: ApproxConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Inductor that switch `HugePages` on.

    Args:
        config: The user's settings, of which `huge_pages` counts.
        given: The options of Inductor that the user gives.

    Returns:
        The option; empty if it is switched off, if the system offers no huge pages, or if the user has a scheduler pass, which is kept.
    """
    user_pass = _torch.user_scheduler_pass() is not None or "_pre_fusion_custom_pass" in given
    return {"_pre_fusion_custom_pass": HugePages()} if config.huge_pages and offered() and not user_pass else {}


@functools.cache
def offered() -> bool:
    """Whether this system gives huge pages to programs that ask for them: Linux with the setting "madvise"."""
    return hasattr(mmap, "MADV_HUGEPAGE") and setting() == "madvise"


def setting() -> str | None:
    """Return which programs get huge pages: "always" (all), "madvise" (those that ask), "never" (none), or None where there is no such setting."""
    try:
        chosen = re.search(r"\[(\w+)\]", _SETTING.read_text()) if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return chosen[1] if chosen is not None else None


def _advised(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor as `_plain` does; if it is large, advise the system to back its whole pages with huge pages."""
    new = _plain(size, stride, dtype)
    if new.nbytes >= LEAST_BYTES:
        first = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (new.data_ptr() + new.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(first, end - first, mmap.MADV_HUGEPAGE)  # only advice: if the system refuses it, the pages are small
    return new


@functools.cache
def _madvise() -> Any:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


empty_strided_cpu = _advised if offered() else _plain
"""Allocate as Inductor's own function of this name does, on huge pages where they help."""
