"""The most memory that a process held since it was last asked to start anew: on CUDA by tensors, on a CPU its resident size."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Start to measure memory anew (where the system allows it; elsewhere the peak is that of the process so far)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """CUDA: the most that tensors held. Else: the process's largest resident size, libraries and data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        if match := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(match[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
