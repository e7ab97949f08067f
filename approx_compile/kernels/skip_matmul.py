"""Products of matrices that read or write only chosen units of one axis, as custom ops: `torch.ops.approx_compile.skip_matmul` and related ones.

| op | result |
|---|---|
| skip_matmul | Y = A[:, idx] diag(scale) B[idx, :] + bias |
| skip_matmul_into | Y[:, idx] = (A B[:, idx]) diag(scale), or Y[idx, :] = diag(scale) (A[idx, :] B); zeros elsewhere |
| choose | the indices of the k largest scores |
| axis_norms_sq | squared norms of the units along one axis of a matrix |

`idx`: int64, sorted and distinct, in units: idx[i] stands for the entries idx[i] * unit .. + unit - 1 of an axis whose length is a multiple of `unit`.
`scale`: fp32, one per index, or None for 1. Operands have any strides; sums are fp32, and the result has the operands' dtype and is contiguous.

On a CPU an op runs its reference, `*_reference`, in readable torch. On a GPU it runs a kernel in CUDA C++ (folder `cuda`) for units of an odd multiple of 16,
or one in Triton (folder `triton`) where that takes the operands' shapes, dtype and strides, else the reference. The decision never depends on values, so
shapes and code never depend on data.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approx_compile.kernels.cuda import launch
from approx_compile.kernels.gather import Axis, norms_sq, take, untake


@functools.cache
def triton_module(name: str) -> Any:
    """Import a module of the folder `triton`.

    Args:
        name: Its name in the folder, such as "matmul_launch".

    Returns:
        The module, or None if Triton is not installed.
    """
    return importlib.import_module(f"approx_compile.kernels.triton.{name}") if importlib.util.find_spec("triton") else None


def _runs_in_cuda(a: Tensor, b: Tensor, unit: int) -> bool:
    """Whether the kernel is CUDA C++: for units of 16, 48, .., which Triton would read in smaller pieces."""
    return unit % 32 == 16 and launch.supports_matmul(a, b, unit) and launch.available_or_warn(a.device, f"a product in groups of {unit}")


# --- Y = A[:, idx] diag(scale) B[idx, :] + bias ---


def skip_matmul_reference(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None) -> Tensor:
    """Compute `skip_matmul` by gathering the kept columns of a and rows of b; the scaled entries of a are rounded to its dtype."""
    x, z = take(a, Axis(1), idx, scale, unit), take(b, Axis(0), idx, None, unit)
    return x @ z if bias is None else torch.addmm(bias, x, z)


@torch.library.custom_op("approx_compile::skip_matmul", mutates_args=(), device_types="cpu")
def skip_matmul(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None) -> Tensor:
    """Compute Y = A[:, idx] diag(scale) B[idx, :] + bias, the product with a sampled contraction axis.

    It computes an output, a gradient that is sampled along its own contraction axis, or, with a = X^T and unit 1, a weight gradient from chosen rows of the
    batch.

    Args:
        a: (M, K).
        b: (K, N), of the same dtype.
        idx: (k,) int64, sorted and distinct, of K // unit units.
        scale: (k,) fp32, or None for 1.
        unit: Contiguous entries that one index stands for.
        bias: (N,), of the operands' dtype, or None.

    Returns:
        (M, N), contiguous, in the operands' dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    _check(a, b, idx, scale, unit, a.shape[1], bias)
    return skip_matmul_reference(a, b, idx, scale, unit, bias)


@skip_matmul.register_kernel("cuda")
def _(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None) -> Tensor:
    _check(a, b, idx, scale, unit, a.shape[1], bias)
    if _runs_in_cuda(a, b, unit):
        return launch.skip_matmul(a, b, idx, scale, unit, bias)
    module = triton_module("matmul_launch")
    if module and len(idx) and module.can_skip(a, b, unit):
        return module.skip(a, b, idx, scale, unit, bias)  # type: ignore[no-any-return]
    return skip_matmul_reference(a, b, idx, scale, unit, bias)


@skip_matmul.register_fake
def _(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, bias: Tensor | None = None) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


# --- Y[:, idx] = (A B[:, idx]) diag(scale), or the same for rows ---


def skip_matmul_into_reference(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int) -> Tensor:
    """Compute `skip_matmul_into` as the smaller product, written to its place among zeros."""
    size = (a.shape[0], b.shape[1])
    if not len(idx):
        return a.new_zeros(size)
    y = take(a, Axis(0), idx, None, unit) @ b if dim == 0 else a @ take(b, Axis(1), idx, None, unit)
    return untake(y, Axis(dim), idx, scale, unit, size[dim])


@torch.library.custom_op("approx_compile::skip_matmul_into", mutates_args=(), device_types="cpu")
def skip_matmul_into(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int) -> Tensor:
    """Compute chosen columns or rows of A B and zeros elsewhere: the gradient of a sampled operand, which is zero where the operand was dropped.

    For dim 1, Y[:, idx] = (A B[:, idx]) diag(scale); for dim 0, Y[idx, :] = diag(scale) (A[idx, :] B).

    Args:
        a: (M, L).
        b: (L, N), of the same dtype.
        idx: (k,) int64, sorted and distinct, of the units of the result's dim `dim`.
        scale: (k,) fp32, or None for 1.
        unit: Contiguous entries that one index stands for.
        dim: The sampled dim of the result: 0 for rows, 1 for columns.

    Returns:
        (M, N), contiguous, in the operands' dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or `dim` is neither 0 nor 1.
    """
    _check_into(a, b, idx, scale, unit, dim)
    return skip_matmul_into_reference(a, b, idx, scale, unit, dim)


@skip_matmul_into.register_kernel("cuda")
def _(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int) -> Tensor:
    _check_into(a, b, idx, scale, unit, dim)
    if _runs_in_cuda(a, b, unit):
        return launch.skip_matmul_into(a, b, idx, scale, unit, dim)
    module = triton_module("matmul_launch")
    if module and len(idx) and module.can_skip_into(a, b, unit, dim):
        return module.skip_into(a, b, idx, scale, unit, dim)  # type: ignore[no-any-return]
    return skip_matmul_into_reference(a, b, idx, scale, unit, dim)


@skip_matmul_into.register_fake
def _(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


@register_flop_formula([torch.ops.approx_compile.skip_matmul, torch.ops.approx_compile.skip_matmul_into])
def _flops(a: list[int], b: list[int], idx: list[int], scale: Any, unit: int, last: Any = None, out_shape: Any = None, **_: Any) -> int:
    """Count 2 FLOPs per multiplication. `last` is the last argument of either op: the dim of skip_matmul_into (an int), or the bias of skip_matmul."""
    m, k, n, kept = a[0], a[1], b[1], idx[0] * unit
    return 2 * kept * (m * n if not isinstance(last, int) else k * n if last == 0 else m * k)


def _check_into(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, dim: int) -> None:
    if dim not in (0, 1):
        raise ValueError(f"dim is {dim}; 0 chooses rows of the result, 1 columns")
    _check(a, b, idx, scale, unit, (a.shape[0], b.shape[1])[dim])


def _check(a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None, unit: int, size: int, bias: Tensor | None = None) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(f"operands {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}; expected matrices (M, K) and (K, N) of one dtype")
    if bias is not None and (bias.shape != b.shape[1:] or bias.dtype != a.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype}; expected ({b.shape[1]},) {a.dtype}, one for every column: expand it")
    check_index(idx, scale, unit, size, a.device)
    if b.device != a.device or (bias is not None and bias.device != a.device):
        raise ValueError(f"operands on {a.device}, {b.device}" + (f" and {bias.device}" if bias is not None else "") + "; expected one device")


def check_index(idx: Tensor, scale: Tensor | None, unit: int, size: int, device: torch.device) -> None:
    """Check an index and its scale, since a kernel would read outside the axis for a wrong one.

    Args:
        idx: Indices of units.
        scale: Their scale, or None.
        unit: Contiguous entries that one index stands for.
        size: Entries of the axis.
        device: Device of the operands.

    Raises:
        ValueError: `unit` does not divide `size`; or `idx` or `scale` has the wrong dtype, number of dims, length or device. Values are not checked.
    """
    if unit < 1 or size % unit:
        raise ValueError(f"unit {unit} for an axis of {size} entries; expected a divisor of {size}: pad the axis, or take unit 1 and indices of entries")
    if idx.dim() != 1 or idx.dtype != torch.int64 or len(idx) > size // unit:
        raise ValueError(f"indices {tuple(idx.shape)} {idx.dtype}; expected at most {size // unit}, torch.int64, in one dim, sorted and distinct")
    if scale is not None and (scale.shape != idx.shape or scale.dtype != torch.float32):
        raise ValueError(f"scale {tuple(scale.shape)} {scale.dtype}; expected {tuple(idx.shape)} torch.float32, one for every index")
    if any(t is not None and t.device != device for t in (idx, scale)):
        where = f" and {scale.device}" if scale is not None else ""
        raise ValueError(f"indices and scale on {idx.device}{where}; expected {device}, where the operands are")


# --- which units, and their norms ---


def choose_reference(score: Tensor, k: int) -> Tensor:
    """Compute `choose` by a stable sort, which puts the first of equal scores first."""
    return score.sort(descending=True, stable=True).indices[:k].sort().values


@torch.library.custom_op("approx_compile::choose", mutates_args=(), device_types="cpu")
def choose(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores. NaN ranks above inf; of equal scores the one with the lower index is taken first.

    Args:
        score: (units,).
        k: Number of indices.

    Returns:
        (k,) int64, ascending.

    Raises:
        ValueError: `k` is negative or above the number of units, or `score` has not one dim.
    """
    _check_k(score, k)
    return choose_reference(score, k)


@choose.register_kernel("cuda")
def _(score: Tensor, k: int) -> Tensor:
    _check_k(score, k)
    module = triton_module("topk")
    if module and score.dtype == torch.float32 and k > 0 and score.shape[0] <= module.MAX_UNITS:
        return module.largest_indices(score, k)  # type: ignore[no-any-return]
    return choose_reference(score, k)


@choose.register_fake
def _(score: Tensor, k: int) -> Tensor:
    return score.new_empty((k,), dtype=torch.int64)


def _check_k(score: Tensor, k: int) -> None:
    if score.dim() != 1 or not 0 <= k <= score.shape[0]:
        raise ValueError(f"{k} of scores {tuple(score.shape)}; expected one dim, and 0 to as many as there are")


@torch.library.custom_op("approx_compile::axis_norms_sq", mutates_args=(), device_types="cpu")
def axis_norms_sq(x: Tensor, dim: int, group: int) -> Tensor:
    """Return squared norms of the units along a dim: v_u = sum of x^2 over the other dim and over unit u's entries along `dim`.

    Args:
        x: (R, C).
        dim: 0 or 1.
        group: Contiguous entries of a unit; entries at the end that fill no unit are left out.

    Returns:
        (R // group,) for dim 0, (C // group,) for dim 1; fp32 (fp64 for fp64).

    Raises:
        ValueError: `x` is no matrix, `dim` neither 0 nor 1, or `group` not positive.
    """
    _check_norms(x, dim, group)
    return norms_sq(x, Axis(dim), group)


@axis_norms_sq.register_kernel("cuda")
def _(x: Tensor, dim: int, group: int) -> Tensor:
    _check_norms(x, dim, group)
    module = triton_module("topk")
    if not module or x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not x.numel():
        return norms_sq(x, Axis(dim), group)
    return module.norms_sq(x, dim, group)  # type: ignore[no-any-return]


@axis_norms_sq.register_fake
def _(x: Tensor, dim: int, group: int) -> Tensor:
    return x.new_empty((x.shape[dim] // group,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _check_norms(x: Tensor, dim: int, group: int) -> None:
    if x.dim() != 2 or dim not in (0, 1) or group < 1:
        raise ValueError(f"shape {tuple(x.shape)}, dim {dim}, group {group}; expected a matrix, dim 0 or 1, and a positive group")
