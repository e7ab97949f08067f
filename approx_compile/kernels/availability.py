"""Tell whether custom kernels (Triton, CUDA C++) can run on this machine, and why they cannot.

This depends on the installation, the device and torch's settings. Whether a kernel takes certain operands is told by the launchers (`can_skip`,
`supports_matmul`, `unsupported_reason`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools

import torch

from approx_compile.kernels.cuda import launch
from approx_compile.reasons import Reason
from approx_compile.reasons.kernels import NO_TRITON, NOT_NVIDIA, NOT_ON_CUDA, TRITON_CAPABILITY

CUSTOM_KERNELS = ("triton", "cuda")
"""Lowerings to custom kernels, as opposed to code that Inductor generates."""

DEFAULT_UNITS = {"triton": (64, 32), "cuda": (16,)}
"""Units (contiguous entries that a kernel steps over together) that are tried where the user gives none. The first one is the fastest, and the one whose
rates are measured."""

CONV_UNITS = (16, 32, 64, 128)
"""Units that the kernels of convolutions are written for. Those of matrices take every multiple of 32 (Triton) or odd multiple of 16 (CUDA)."""

_TRITON_CAPABILITIES = (8, 9)
"""Major compute capabilities for which tile configurations of the Triton kernels were chosen and their machine code inspected."""


@functools.cache
def unavailable_reason(lowering: str, device: torch.device) -> Reason | None:
    """Say why no custom kernel of a lowering can run on a device.

    Args:
        lowering: One of `CUSTOM_KERNELS`.
        device: The device of the site's tensors.

    Returns:
        The reason, or None if the kernels can run.
    """
    if device.type != "cuda":
        return NOT_ON_CUDA(lowering=lowering, device=device.type)
    if torch.version.hip is not None:
        return NOT_NVIDIA(lowering=lowering)
    if lowering == "cuda":
        return launch.unavailable_reason(device)
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON()
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in _TRITON_CAPABILITIES else TRITON_CAPABILITY(major=major, minor=minor)


def supports_unit(lowering: str, conv: bool, unit: int) -> bool:
    """Tell whether a lowering has kernels that step over units of `unit` contiguous entries.

    Args:
        lowering: One of `CUSTOM_KERNELS`.
        conv: Whether the site is a convolution, else a product of matrices.
        unit: Entries of the sampled axis that one index stands for.
    """
    if conv:
        return lowering == "triton" and unit in CONV_UNITS
    return unit > 0 and unit % 32 == (0 if lowering == "triton" else 16)


def runs_at_measured_rate(lowering: str, conv: bool, unit: int) -> bool:
    """Tell whether the rates measured at `DEFAULT_UNITS[lowering][0]` also hold for this unit.

    CUDA's loop reads two pieces of 16 entries at a time, Triton's pieces of 32 or 64, whatever unit they are part of. Only the kernels of convolutions
    take shorter steps, in units of 16.

    Args:
        lowering: One of `CUSTOM_KERNELS`.
        conv: Whether the site is a convolution, else a product of matrices.
        unit: Entries of the sampled axis that one index stands for.
    """
    return supports_unit(lowering, conv, unit) and not (conv and unit < 32)


def allows_tf32(conv: bool) -> bool:
    """Tell whether torch's settings allow TF32 on GPUs for products of fp32 matrices or, with `conv`, for fp32 convolutions."""
    kind = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return bool(kind.fp32_precision == "tf32")


def environment_key() -> tuple[str, ...]:
    """Describe what decisions about lowerings read of the installation and of torch's settings; a part of the key of compiled code."""
    return (*_installed(), f"TF32 for matrices: {allows_tf32(conv=False)}, for convolutions: {allows_tf32(conv=True)}")


@functools.cache
def _installed() -> tuple[str, ...]:
    parts = []
    for package in ("triton", "cuda-core", "cuda-bindings"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{package} {importlib.metadata.version(package)}")
    for device, lowering in itertools.product(range(torch.cuda.device_count()), CUSTOM_KERNELS):
        if (why := unavailable_reason(lowering, torch.device("cuda", device))) is not None:
            parts.append(f"{device}: {why}")
    return tuple(parts)
