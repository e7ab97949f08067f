"""Which lowerings to kernels of our own there are on this machine: what they need, and what of it is missing."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools

import torch

from approx_compile.kernels.cuda import launch

CUSTOM_KERNELS = ("triton", "cuda")
"""Lowerings to kernels of ours."""

DEFAULT_UNITS = {"triton": (64, 32), "cuda": (16,)}
"""Contiguous entries that a kernel steps over together: those tried where nobody says, the best, whose rates are measured, first."""

CONV_UNITS = (16, 32, 64, 128)
"""Those that the kernels of convolutions are written for; of matrices there are kernels for every multiple of 32 (Triton) and odd multiple of 16 (CUDA)."""

_TRITON_FOR = (8, 9)
"""Major compute capabilities for which configurations of the Triton kernels were chosen and looked at."""


@functools.cache
def unavailable_reason(lowering: str, device: torch.device) -> str | None:
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


def supports_unit(lowering: str, conv: bool, unit: int) -> bool:
    """Whether a kernel steps over units of so many contiguous entries."""
    if conv:
        return lowering == "triton" and unit in CONV_UNITS
    return unit > 0 and unit % 32 == (0 if lowering == "triton" else 16)


def runs_at_measured_rate(lowering: str, conv: bool, unit: int) -> bool:
    """Whether the rates measured at UNITS[lowering][0] hold for these units: CUDA's loop takes two pieces of 16 entries at a time whatever they are part of,
    Triton's 32 or 64; only convolutions in units of 16 have shorter steps."""
    return supports_unit(lowering, conv, unit) and not (conv and unit < 32)


def allows_tf32(conv: bool) -> bool:
    """Whether torch's settings let products of fp32 matrices, or convolutions, be multiplied as TF32 on a GPU."""
    kind = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return bool(kind.fp32_precision == "tf32")


def environment_key() -> tuple[str, ...]:
    """What decisions about lowerings read of this installation and of torch's settings: part of the cache key."""
    return (*_installed(), f"TF32 for matrices: {allows_tf32(conv=False)}, for convolutions: {allows_tf32(conv=True)}")


@functools.cache
def _installed() -> tuple[str, ...]:
    found = []
    for package in ("triton", "cuda-core", "cuda-bindings"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    for device, lowering in itertools.product(range(torch.cuda.device_count()), CUSTOM_KERNELS):
        if (why := unavailable_reason(lowering, torch.device("cuda", device))) is not None:
            found.append(f"{device}: {why}")
    return tuple(found)
