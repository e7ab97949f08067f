"""Which code may run a sampled product: Inductor's on gathered operands, or a kernel of ours (Triton, CUDA C++) that steps over what was not chosen.

Decided by what the site is: its device, dtype, op and layout, and how its axis was cut into groups. Which of the possible ones is taken is a matter
of predicted time, as everything else is.
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

LINE = 16
"""Entries that lines of operands and results are whole multiples of."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def offered(site: Site, wanted: str) -> tuple[str, ...]:
    """The lowerings to choose from for a site; "auto" means all that might run it."""
    if wanted != "auto":
        return (wanted,)
    return ("inductor", *(n for n in CUSTOM_KERNELS if _unfit(site, n) is None))


def units(site: Site, lowering: str) -> tuple[int, ...]:
    """Groups in which a kernel of ours can skip along the axis of a site's output, the best first; none where no kernel fits."""
    size = site.products[0].size
    if lowering not in CUSTOM_KERNELS or not isinstance(size, int) or _unfit(site, lowering) is not None:
        return ()
    return tuple(u for u in DEFAULT_UNITS[lowering] if size % u == 0 and size >= 4 * u)


def refused(site: Site, product: Product, how: Estimator, lowering: str) -> str | None:
    """Why a kernel of ours can't run a product sampled this way on its own axis, if so."""
    why = _unfit(site, lowering)
    if why is not None:
        return why
    if site.node.target in CONV and product.name != "output":
        return "convolutions' gradients on their own axis have no kernel"
    if product.name == "grad_weight" and how.group == 1 and lowering == "triton":
        return None  # rows, whole ones
    return _other_unit(how, lowering, site.node.target in CONV)


def guessed(site: Site, group: int | str) -> bool:
    """Whether rates of Triton's kernel in other groups say little of its time in these."""
    conv = site.node.target in CONV
    return isinstance(group, int) and availability.supports_unit("triton", conv, group) and not availability.runs_at_measured_rate("triton", conv, group)


def _other_unit(how: Estimator, lowering: str, conv: bool) -> str | None:
    if not how.tail and availability.supports_unit(lowering, conv, how.unit):
        return None
    known = ", ".join(map(str, availability.CONV_UNITS)) if conv else "a multiple of 32" if lowering == "triton" else "an odd multiple of 16"
    return f"{lowering} skips whole groups of {known}, not {how.group}" + (" with a tail" if how.tail else "")


def no_zeros_kernel(site: Site, dropped: Estimator, lowering: str) -> str | None:
    """Why no kernel of ours leaves out the output channels that another site `dropped`, if so, of a site's gradients."""
    if (why := _unfit(site, lowering)) is not None:
        return why
    if site.node.target in CONV:
        return "of a convolution's gradients a kernel leaves out input channels, not these"
    return _other_unit(dropped, lowering, conv=False)


def lines(kept: int) -> bool:
    """Whether what is gathered along one axis is an operand that a kernel of ours reads."""
    return kept % LINE == 0


def _unfit(site: Site, lowering: str) -> str | None:
    value = _torch.value(site.products[0].operands[0])
    if (why := availability.unavailable_reason(lowering, value.device)) is not None:
        return why
    if site.dtype not in (_DTYPES if lowering == "triton" else _DTYPES[1:]):
        return f"{lowering} has no kernel for {str(site.dtype).removeprefix('torch.')}"
    node = site.node
    if site.dtype == torch.float32 and value.device.type == "cuda" and not availability.allows_tf32(node.target in CONV):
        return f"{lowering} multiplies float32 as TF32, which torch's fp32_precision does not allow"
    if node.target in CONV:
        return _unfit_conv(site, lowering, value)
    if node.target not in MM:
        return "batched products have no kernel of ours"
    sizes = tuple(s for n in (*site.products[0].operands, node) for s in _torch.value(n).shape[-1:])
    if any(not isinstance(s, int) or s % LINE for s in sizes):
        return f"{lowering} reads lines of whole multiples of {LINE} entries, of inputs and of outputs"
    if node.kwargs or (len(node.args) == 3 and tuple(_torch.value(node.args[0]).shape) != sizes[-1:]):
        return "the addmm adds no plain bias, one for every output"
    return None


def _unfit_conv(site: Site, lowering: str, x: torch.Tensor) -> str | None:
    transposed, groups = bool(site.node.args[6]), site.node.args[8]
    if lowering != "triton":
        return f"{lowering} has no kernel for convolutions"
    if x.dim() != 4 or transposed or groups != 1:
        return "of convolutions, plain 2-D ones without groups have a kernel"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "its input is not channels-last"
    stride, _, dilation = window_of(site.node.args[3:6], 2)
    if any(s > 1 and d > 1 for s, d in zip(stride, dilation, strict=True)):
        return "stride and dilation are both above 1, for which the gradient has no kernel"
    return None


def no_max_kernel(site: Site, lowering: str, how: Replacement) -> str | None:
    """Why no kernel of ours adds up the patches of `max` for a site's weight, if so; where one does it takes no other choice."""
    x = _torch.value(site.products[0].operands[0])
    if lowering != "cuda" or site.node.target not in CONV:
        return f"{lowering} has no kernel for max" + (" but that of convolutions" if lowering == "cuda" else "")
    if (why := availability.unavailable_reason(lowering, x.device)) is not None:
        return why
    if x.dim() != 4 or site.node.args[6]:
        return "of convolutions, plain 2-D ones have a kernel for max"
    if x.dtype not in _DTYPES:
        return f"{lowering} has no kernel for {str(x.dtype).removeprefix('torch.')}"
    if how.tile is not None:
        return "the kernel for max takes no tiles"
    if how.j > launch.MAX_ENTRIES or _torch.numel(site.node) == 0:
        return f"the kernel for max keeps 1 to {launch.MAX_ENTRIES} entries"
    return None
