"""Sampled products in readable torch: gather the kept entries of both operands, and scatter the gradient of a gathered operand back.

This code is traced into the graph, so it is also what Inductor lowers. An `Axis` says where the contraction axis lies in an operand. `sample` gathers both
operands of a product; `untake` is the gradient of the gather `take`. Gathers run in the order of memory, because Inductor does not vectorise a gather that
is also a transpose on CPUs, and keep the operand's memory format, channels-last included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.kernels.estimators import Estimator, inverse_index, select


@dataclass(frozen=True)
class Axis:
    """Where a contraction axis lies in an operand.

    Attributes:
        dim: The contracted dim, counted in the view that `split` gives.
        lead: The dim over which contractions are independent (the batch of a bmm, the groups of a convolution), counted in that view; None if there is none.
        split: (dim, groups): the operand is first viewed with this dim as (groups, rest), as grouped convolutions need. None: it is not viewed.
    """

    dim: int
    lead: int | None = None
    split: tuple[int, int] | None = None

    def view(self, x: Tensor) -> Tensor:
        """View an operand as `dim` and `lead` count its dims."""
        return x if self.split is None else x.unflatten(self.split[0], (self.split[1], -1))

    def unview(self, x: Tensor) -> Tensor:
        """Undo `view`."""
        return x if self.split is None else x.flatten(self.split[0], self.split[0] + 1)


def norms_sq(x: Tensor, axis: Axis, group: int = 1) -> Tensor:
    """Return the squared Euclidean norm of every unit along an axis: v_i = sum of x^2 over all other dims and over the unit's entries.

    Args:
        x: The operand.
        axis: Its contraction axis.
        group: Contiguous entries of a unit; entries at the end that fill no unit are left out.

    Returns:
        (units,), or (batch, units) if the axis has a lead; fp32 (fp64 for fp64).
    """
    x = axis.view(x)
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    keep = [axis.dim] if axis.lead is None else [axis.lead, axis.dim]
    v: Tensor = _sum_sq(x, [d for d in range(x.dim()) if d not in keep])
    if axis.lead is not None and axis.lead > axis.dim:
        v = v.transpose(0, 1)
    if group == 1:
        return v
    units = v.shape[-1] // group
    whole: Tensor = v.narrow(-1, 0, units * group).unflatten(-1, (units, group))  # type: ignore[no-untyped-call]
    return whole.sum(-1)


_OUTER = 32
"""Entries that the second step of a long sum adds up."""


def _sum_sq(x: Tensor, dims: list[int]) -> Tensor:
    """Return the sum of x^2 over `dims`. On CPUs a long sum over the outermost dim takes two steps, since one long column per thread misses the cache."""
    if dims and x.device.type == "cpu":
        outer = max(dims, key=lambda d: _torch.hint(x.stride(d)))
        size = x.shape[outer]
        inner = min(_torch.hint(x.stride(d)) for d in range(x.dim())) == _torch.hint(x.stride(outer))
        if isinstance(size, int) and not inner and size >= 8 * _OUTER and size % _OUTER == 0:
            x = x.unflatten(outer, (size // _OUTER, _OUTER))
            shifted = [d if d < outer else d + 1 for d in dims if d != outer]
            first = x.square().sum([outer + 1, *shifted], keepdim=True)
            return first.sum([outer, outer + 1, *shifted])
    return x.square().sum(dims) if dims else x.square()


def memory_order(x: Tensor) -> list[int]:
    """Return the dims from the slowest to the fastest in memory."""
    return sorted(range(x.dim()), key=lambda d: -_torch.hint(x.stride(d)))


def _pick(x: Tensor, axis: Axis, idx: Tensor, unit: int) -> Tensor:
    """Gather x[.., idx, ..] along axis.dim in units, for an x from `axis.view`; the result has the memory order of x."""
    order = memory_order(x)
    if any(not isinstance(s, int) for s in x.stride()):  # Inductor cannot sort the strides of a saved view that hold symbols
        order = sorted(order)
    straight = order == sorted(order)
    y = x if straight else x.permute(order)
    dim = order.index(axis.dim)
    y = y.unflatten(dim, (-1, unit)) if unit > 1 else y
    if axis.lead is None:
        y = torch.ops.aten._unsafe_index.Tensor(y, [None] * dim + [idx])  # the indices are known to be valid: no bounds checks in the loops
    else:
        lead = order.index(axis.lead)
        lead += lead > dim and unit > 1
        shape = [1] * y.dim()
        shape[lead], shape[dim] = idx.shape
        at = (idx if lead < dim else idx.transpose(0, 1)).reshape(shape)
        full = list(y.shape)
        full[dim] = idx.shape[-1]
        y = y.gather(dim, at.expand(full))
    y = y.flatten(dim, dim + 1) if unit > 1 else y
    return y if straight else y.permute([order.index(d) for d in range(x.dim())])


def _along(v: Tensor, x: Tensor, axis: Axis, unit: int) -> Tensor:
    """Shape a vector over units, (n,) or (batch, n), so that it multiplies an x from `axis.view` along its axis."""
    if unit > 1:
        v = v.unsqueeze(-1).expand(*v.shape, unit).flatten(-2)
    shape = [1] * x.dim()
    shape[axis.dim] = v.shape[-1]
    if axis.lead is not None:
        shape[axis.lead] = v.shape[0]
        v = v if axis.lead < axis.dim else v.transpose(0, 1)
    return v.reshape(shape)


def take(x: Tensor, axis: Axis, idx: Tensor, scale: Tensor | None, unit: int) -> Tensor:
    """Gather the kept entries of an operand and multiply them by their scale.

    Args:
        x: The operand, with K entries along `axis`.
        axis: Its contraction axis.
        idx: Indices of kept units, (n,), or (batch, n) if the axis has a lead.
        scale: Their scale, of idx's shape, or None for 1; multiplied in its own precision, then rounded to x's dtype.
        unit: Contiguous entries that one index stands for.

    Returns:
        x with n * unit entries along `axis`, in its dtype and memory order.
    """
    x = axis.view(x)
    y = _pick(x, axis, idx, unit)
    if scale is not None:
        y = (y * _along(scale, y, axis, unit)).to(x.dtype)
    return axis.unview(y)


def untake(y: Tensor, axis: Axis, idx: Tensor, scale: Tensor | None, unit: int, size: int) -> Tensor:
    """Compute the gradient of `take`: put the kept entries, times their scale, in their places, with zeros elsewhere.

    The indices are distinct, so this is a gather by the inverse index: one pointwise loop without a zero fill and without atomics.

    Args:
        y: Gradient of the gathered operand, with n * unit entries along `axis`.
        axis: The contraction axis.
        idx: Indices of kept units, (n,), or (batch, n) if the axis has a lead.
        scale: Their scale, of idx's shape, or None for 1.
        unit: Contiguous entries that one index stands for.
        size: Entries of the whole axis.

    Returns:
        y with `size` entries along `axis`.
    """
    y = axis.view(y)
    if scale is not None:
        y = (y * _along(scale, y, axis, unit)).to(y.dtype)
    at = inverse_index(idx, size // unit)
    full = _pick(y, axis, at.clamp_min(0), unit)
    full = torch.where(_along(at >= 0, full, axis, unit), full, 0)
    return axis.unview(full)


def untake_block(y: Tensor, idx: tuple[Tensor, Tensor], scale: tuple[Tensor | None, Tensor | None], shape: tuple[int, int]) -> Tensor:
    """Compute `untake` along both axes of a matrix: put the kept block in its place, with zeros elsewhere.

    The zeros are written in whole vectors and only the block by its indices, which takes a third of the time of a gather by two inverse indices.

    Args:
        y: The kept rows and columns, (n, m).
        idx: Indices of these rows and of these columns, (n,) and (m,), each distinct.
        scale: Their scales, or None for 1.
        shape: Rows and columns of the result.

    Returns:
        The matrix, of y's dtype.
    """
    for dim in (0, 1):
        factor = scale[dim]
        if factor is not None:
            y = (y * _along(factor, y, Axis(dim), 1)).to(y.dtype)
    return torch.ops.aten._unsafe_index_put(y.new_zeros(shape), [idx[0].unsqueeze(1), idx[1]], y)  # type: ignore[no-any-return]


def sample(
    estimator: Estimator, a: Tensor, b: Tensor, a_axis: Axis, b_axis: Axis, others: Sequence[tuple[Tensor, Axis]] = ()
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Select the kept units of a product and gather both operands: Y' = A[:, idx] (diag(scale) B[idx, :]).

    With `others`, the selection is the one for the product A [B, C, ..] with all those operands side by side: b_i^2 = |B[i, :]|^2 + |C[i, :]|^2 + .. gives
    the best k units of it, or the probabilities of least variance. Each product by itself remains unbiased if the estimator is.

    Args:
        estimator: The estimator.
        a: First operand.
        b: Second operand.
        a_axis: Contraction axis of a.
        b_axis: Contraction axis of b.
        others: Other operands that a is multiplied with under the same indices, each with its axis.

    Returns:
        The indices, their scale or None, a cut to the kept entries, and b cut to the kept entries and multiplied by the scale.
    """
    a_sq = norms_sq(a, a_axis, estimator.group)
    b_sq = norms_sq(b, b_axis, estimator.group)
    for other, axis in others:
        b_sq = b_sq + norms_sq(other, axis, estimator.group)
    idx, scale = select(estimator, a_sq, b_sq)
    return idx, scale, take(a, a_axis, idx, None, estimator.unit), take(b, b_axis, idx, scale, estimator.unit)


def sample_by_weight(estimator: Estimator, weight: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Select units by the norms of the weight alone (`topk_weights`), before the other operand is known.

    The selection is the one that `sample` makes for this method.

    Args:
        estimator: An estimator of the method `topk_weights`.
        weight: The weight.
        axis: Its contraction axis.

    Returns:
        The indices, and the weight cut to the kept entries.
    """
    sq = norms_sq(weight, axis, estimator.group)
    idx, _ = select(estimator, sq, sq)
    return idx, take(weight, axis, idx, None, estimator.unit)
