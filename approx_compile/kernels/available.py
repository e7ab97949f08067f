"""Which lowerings to kernels of our own there are on this machine: what they need, and what of it is missing."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util

import torch

from approx_compile.kernels.cuda import launch

OWN = ("triton", "cuda")
"""Lowerings to kernels of ours."""

UNITS = {"triton": (64, 32), "cuda": (16,)}
"""Contiguous entries that a kernel steps over together, the best first."""

_TRITON_FOR = (8, 9)
"""Major compute capabilities for which configurations of the Triton kernels were chosen and looked at."""


@functools.cache
def missing(lowering: str, device: torch.device) -> str | None:
    """Why no kernel of a lowering runs on a device here, if so."""
    if device.type != "cuda":
        return f"{lowering} needs a CUDA device, the site is on {device.type}"
    if torch.version.hip is not None:
        return f"{lowering} has kernels for NVIDIA's devices only"
    if lowering == "cuda":
        return launch.unavailable(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'approx-compile[triton]'"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in _TRITON_FOR else f"there are Triton kernels for compute capability 8.x and 9.x, the device has {major}.{minor}"


@functools.cache
def versions() -> tuple[str, ...]:
    """What of the lowerings' packages is installed: part of the cache key, for decisions read it."""
    found = []
    for package in ("triton", "cuda-core", "cuda-bindings"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return tuple(found)
