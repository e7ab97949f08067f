"""Guards on a symbolic size that torch adds though its code would be right without them: they would stop rows, whose number must be free.

Two functions of torch compare sizes with a number to choose between ways to compute that give the same result, and each adds a guard:

- The convolution of fake tensors chooses its backend, to learn in which memory format the result is. On CPUs it asks whether the batch has at least 16
  samples, even where the answer changes nothing.
- Inductor's C++ code generator sums more than 4,096 numbers in parts, which is more accurate and slower.

Here the first is answered without a guard where the format is the same for every size of the batch, and the second by the size at hand. A graph with both
guards is for one size only: 16 samples of 16 x 16 pixels are at least 16 samples and at most 4,096 pixels.

The functions of torch are replaced by functions that do this while Dynamo compiles for this package, and else what torch's own do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from approx_compile._torch.dynamo import dynamo_frame, unwrapped_backend
from approx_compile._torch.symbolic_shapes import size_expr

BOTH_SIDES = (2, 16)
"""A size of the batch below each threshold that the choice of a convolution's backend on CPUs has for two samples and more, and one above all."""


def compiles_for_package() -> bool:
    """Return whether Dynamo is compiling a frame whose backend is this package's."""
    output = getattr(dynamo_frame(), "output", None)
    backend = unwrapped_backend(getattr(output, "compiler_fn", None))
    return str(getattr(backend, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


@functools.cache
def free_convolutions() -> None:
    """Replace the choice of a convolution's backend by one that adds no guard on the batch's size where the memory format of the result is the same for all.

    The choice serves to find that format, so any backend with this format is right.
    """
    select: Callable[..., Any] | None = getattr(torch._C, "_select_conv_backend", None)
    if select is None or not hasattr(torch._C, "_conv_determine_backend_memory_format"):
        return

    @functools.wraps(select)
    def select_for_any_size(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _has_free_batch(input) and compiles_for_package():
            batches = [_with_batch(input, n) for n in BOTH_SIDES]
            chosen = [select(x, weight, *args, **kwargs) for x in batches]
            if len({_format(x, weight, backend) for x, backend in zip(batches, chosen, strict=True)}) == 1:
                return chosen[-1]
        return select(input, weight, *args, **kwargs)

    torch._C._select_conv_backend = select_for_any_size


def _has_free_batch(x: Tensor) -> bool:
    """Return whether the only size of a tensor on a CPU that depends on some symbol is that of dim 0, 2 or more, in which the strides do not depend on it."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    device = getattr(x, "fake_device", x.device)
    if device.type != "cpu" or x.is_mkldnn or isinstance(x.shape[0], int):
        return False
    symbols = size_expr(x.shape[0]).free_symbols
    others = (size_expr(s).free_symbols for s in (*x.shape[1:], *x.stride()))
    return all(symbols.isdisjoint(s) for s in others) and statically_known_true(x.shape[0] >= min(BOTH_SIDES))


def _with_batch(x: Tensor, n: int) -> Tensor:
    """A fake tensor like another one, with another size of dim 0."""
    return x.new_empty_strided((n, *x.shape[1:]), x.stride()).requires_grad_(x.requires_grad)


def _format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """The memory format of a convolution's result."""
    if weight.dim() == 3:  # torch computes it in two dims
        x, weight = x.contiguous().unsqueeze(2), weight.unsqueeze(2)
    found: torch.memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    return found


@functools.cache
def free_sums() -> None:
    """Replace the decision of Inductor's C++ code generator to sum in parts by one that is made for the size at hand, without a guard.

    A larger batch is then summed as the batch at hand was, as torch itself does it for symbols without a known value.
    """
    from torch._inductor.codegen.cpp import CppKernel
    from torch._inductor.virtualized import V

    decide: Callable[..., bool] | None = getattr(CppKernel, "need_use_acc_helper", None)
    if decide is None:
        return

    @functools.wraps(decide)
    def decide_for_size_at_hand(self: Any, *args: Any, **kwargs: Any) -> bool:
        if not compiles_for_package():
            return decide(self, *args, **kwargs)
        sizes: Any = V.graph.sizevars
        sizes.guard_or_false = functools.partial(_holds_at_hand, sizes)
        try:
            return decide(self, *args, **kwargs)
        finally:
            del sizes.guard_or_false

    CppKernel.need_use_acc_helper = decide_for_size_at_hand  # type: ignore[method-assign]


def _holds_at_hand(sizes: Any, condition: Any) -> bool:
    """Evaluate a comparison of two sizes for the values that their symbols have at hand."""
    if not isinstance(condition, sympy.core.relational.Relational):
        return bool(condition)
    return bool(condition.func(*map(sizes.optimization_hint, condition.args)))
