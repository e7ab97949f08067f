"""Large new buffers of compiled code on CPUs lie on huge pages.

What a training step writes is mostly new memory: activations and gradients live for one step, and the C library returns the largest blocks, and what is
left free at the end of its heap, to the system. The system hands it out anew in pages of 4 KiB, each of them a fault and a page to clear, at a few GB/s;
in pages of 2 MiB (Linux's transparent huge pages) that is several times as fast. Where the system leaves it to programs ("madvise", as most
distributions do), a program has to ask, and Inductor's code does not (torch's own allocator does for all of a process, with THP_MEM_ALLOC_ENABLE=1). No
value changes, and no block gets larger. Results that ATen allocates itself, such as a convolution's, take no part.

`HugePages` puts one line into the Python code that Inductor writes for a graph with large buffers: it allocates through `empty_strided_cpu` here.
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
"""Four huge pages, of which a buffer holds three wherever it begins. Less is mostly memory that the process has already, and the advice takes 3 us."""

_LINE = f"from {__name__} import empty_strided_cpu"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_plain = _torch.empty_strided_cpu


class HugePages(_torch.CustomSchedulerPass):
    """Inductor calls it with a graph's nodes before it fuses them; it changes none of them, but the head of the code to be written."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if max(_torch.cpu_buffer_bytes(), default=0) >= LEAST_BYTES:
            _torch.append_to_header(_LINE)
        return nodes

    def uuid(self) -> str:
        return hashlib.sha256(f"{_LINE} {LEAST_BYTES}".encode()).hexdigest()


def patches(config: ApproxConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's option that brings them; none where the user has a pass in that place, which is kept."""
    theirs = _torch.user_scheduler_pass() is not None or "_pre_fusion_custom_pass" in given
    return {"_pre_fusion_custom_pass": HugePages()} if config.huge_pages and offered() and not theirs else {}


@functools.cache
def offered() -> bool:
    """Whether this system has huge pages for programs that ask: Linux, where it is set so."""
    return hasattr(mmap, "MADV_HUGEPAGE") and setting() == "madvise"


def setting() -> str | None:
    """Who gets huge pages: "always" (all), "madvise" (who asks), "never" (nobody); None where there is no such setting."""
    try:
        chosen = re.search(r"\[(\w+)\]", _SETTING.read_text()) if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return chosen[1] if chosen is not None else None


def _advised(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`_plain`'s new tensor; the whole pages of a large one are advised to be huge."""
    new = _plain(size, stride, dtype)
    if new.nbytes >= LEAST_BYTES:
        first = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (new.data_ptr() + new.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(first, end - first, mmap.MADV_HUGEPAGE)  # advice: where it is refused the pages are small
    return new


@functools.cache
def _madvise() -> Any:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


empty_strided_cpu = _advised if offered() else _plain
"""Allocates as Inductor's own function of this name does, on huge pages where they help."""
