"""Decide which code may run a sampled product: Inductor on gathered operands, or a custom kernel (Triton, CUDA C++) that steps over what was not chosen.

This depends on the site (device, dtype, op and memory layout) and on how its axis is divided into groups. Predicted time decides which of the possible
lowerings is taken.
"""

from __future__ import annotations

import torch

from approx_compile import _torch
from approx_compile.kernels import availability
from approx_compile.kernels.availability import CUSTOM_KERNELS, DEFAULT_UNITS
from approx_compile.kernels.cuda import launch
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gradient_replacements import Replacement
from approx_compile.passes.fx_utils import CONV, MM, window_of
from approx_compile.passes.sites.site import Product, Site
from approx_compile.reasons import Reason
from approx_compile.reasons.kernels import (
    KERNEL_ALIGNMENT,
    KERNEL_BATCHED,
    KERNEL_BIAS,
    KERNEL_CONV,
    KERNEL_CONV_GRADIENT,
    KERNEL_CONV_ZEROS,
    KERNEL_DTYPE,
    KERNEL_GROUPS,
    KERNEL_PLAIN_CONV,
    MAX_KERNEL,
    MAX_KERNEL_CONV,
    MAX_KERNEL_ENTRIES,
    MAX_KERNEL_TILES,
    NO_TF32,
    NOT_CHANNELS_LAST,
    STRIDE_AND_DILATION,
)

ALIGNMENT = 16
"""Rows of the operands and results of custom kernels have a multiple of this many entries."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def offered_lowerings(site: Site, wanted: str) -> tuple[str, ...]:
    """Return the lowerings to choose from for a site.

    Args:
        site: The site.
        wanted: The lowering that is asked for; "auto" stands for all that might run the site.
    """
    if wanted != "auto":
        return (wanted,)
    return ("inductor", *(n for n in CUSTOM_KERNELS if _unfit(site, n) is None))


def kernel_groups(site: Site, lowering: str) -> tuple[int, ...]:
    """Return the group sizes that a custom kernel can skip along the axis of a site's output, the best first; none if the kernel does not fit the site.

    Args:
        site: The site.
        lowering: The lowering that has the kernel.
    """
    size = site.products[0].size
    if lowering not in CUSTOM_KERNELS or not isinstance(size, int) or _unfit(site, lowering) is not None:
        return ()
    return tuple(u for u in DEFAULT_UNITS[lowering] if size % u == 0 and size >= 4 * u)


def kernel_refusal(site: Site, product: Product, estimator: Estimator, lowering: str) -> Reason | None:
    """Return why a custom kernel cannot run a product that is sampled along its own axis, or None if it can.

    Args:
        site: The site of the product.
        product: The product.
        estimator: How it is sampled.
        lowering: The lowering that has the kernel.
    """
    reason = _unfit(site, lowering)
    if reason is not None:
        return reason
    if site.node.target in CONV and product.name != "output":
        return KERNEL_CONV_GRADIENT()
    if product.name == "grad_weight" and estimator.group == 1 and lowering == "triton":
        return None  # its axis is the rows, and the kernel skips single rows
    return _unit_refusal(estimator, lowering, site.node.target in CONV)


def has_guessed_rates(site: Site, group: int | str) -> bool:
    """Return whether the measured rates of Triton's kernel, which are those of other groups, say little of its time with this group size.

    Args:
        site: The site.
        group: The group size, or "auto".
    """
    conv = site.node.target in CONV
    return isinstance(group, int) and availability.supports_unit("triton", conv, group) and not availability.runs_at_measured_rate("triton", conv, group)


def _unit_refusal(estimator: Estimator, lowering: str, conv: bool) -> Reason | None:
    """Why a kernel cannot skip the units of an estimator."""
    if not estimator.tail and availability.supports_unit(lowering, conv, estimator.unit):
        return None
    known = ", ".join(map(str, availability.CONV_UNITS)) if conv else "a multiple of 32" if lowering == "triton" else "an odd multiple of 16"
    return KERNEL_GROUPS(lowering=lowering, known=known, group=estimator.group, tail=" with a tail" if estimator.tail else "")


def zero_skipping_refusal(site: Site, dropped: Estimator, lowering: str) -> Reason | None:
    """Return why no custom kernel can skip, in a site's gradients, the output channels that another site dropped, or None if one can.

    Args:
        site: The site whose gradients are computed.
        dropped: The estimator of the other site.
        lowering: The lowering that has the kernel.
    """
    if (reason := _unfit(site, lowering)) is not None:
        return reason
    if site.node.target in CONV:
        return KERNEL_CONV_ZEROS()
    return _unit_refusal(dropped, lowering, conv=False)


def is_aligned(kept: int) -> bool:
    """Return whether a custom kernel can read an operand that was gathered to this many entries per row."""
    return kept % ALIGNMENT == 0


def _unfit(site: Site, lowering: str) -> Reason | None:
    """Why the kernels of a lowering cannot run the products of a site, whatever their groups."""
    value = _torch.value(site.products[0].operands[0])
    if (reason := availability.unavailable_reason(lowering, value.device)) is not None:
        return reason
    if site.dtype not in (_DTYPES if lowering == "triton" else _DTYPES[1:]):
        return KERNEL_DTYPE(lowering=lowering, dtype=str(site.dtype).removeprefix("torch."))
    node = site.node
    if site.dtype == torch.float32 and value.device.type == "cuda" and not availability.allows_tf32(node.target in CONV):
        return NO_TF32(lowering=lowering)
    if node.target in CONV:
        return _unfit_conv(site, lowering, value)
    if node.target not in MM:
        return KERNEL_BATCHED()
    sizes = tuple(s for n in (*site.products[0].operands, node) for s in _torch.value(n).shape[-1:])
    if any(not isinstance(s, int) or s % ALIGNMENT for s in sizes):
        return KERNEL_ALIGNMENT(lowering=lowering, alignment=ALIGNMENT)
    if node.kwargs or (len(node.args) == 3 and tuple(_torch.value(node.args[0]).shape) != sizes[-1:]):
        return KERNEL_BIAS()
    return None


def _unfit_conv(site: Site, lowering: str, x: torch.Tensor) -> Reason | None:
    transposed, groups = bool(site.node.args[6]), site.node.args[8]
    if lowering != "triton":
        return KERNEL_CONV(lowering=lowering)
    if x.dim() != 4 or transposed or groups != 1:
        return KERNEL_PLAIN_CONV()
    if not x.is_contiguous(memory_format=torch.channels_last):
        return NOT_CHANNELS_LAST()
    stride, _, dilation = window_of(site.node.args[3:6], 2)
    if any(s > 1 and d > 1 for s, d in zip(stride, dilation, strict=True)):
        return STRIDE_AND_DILATION()
    return None


def max_kernel_refusal(site: Site, lowering: str, replacement: Replacement) -> Reason | None:
    """Return why no custom kernel computes the weight gradient that `max` asks for, or None if one does.

    Args:
        site: The convolution.
        lowering: The lowering that has the kernel.
        replacement: What is asked for.
    """
    x = _torch.value(site.products[0].operands[0])
    if lowering != "cuda" or site.node.target not in CONV:
        return MAX_KERNEL(lowering=lowering, but=" but that of convolutions" if lowering == "cuda" else "")
    if (reason := availability.unavailable_reason(lowering, x.device)) is not None:
        return reason
    if x.dim() != 4 or site.node.args[6]:
        return MAX_KERNEL_CONV()
    if x.dtype not in _DTYPES:
        return KERNEL_DTYPE(lowering=lowering, dtype=str(x.dtype).removeprefix("torch."))
    if replacement.tile is not None:
        return MAX_KERNEL_TILES()
    if replacement.j > launch.MAX_ENTRIES or _torch.numel(site.node) == 0:
        return MAX_KERNEL_ENTRIES(most=launch.MAX_ENTRIES)
    return None
