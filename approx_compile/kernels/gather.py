"""Sampled products in readable torch, which is also what Inductor lowers.

An operand's contraction axis is an `Axis`; `sample` gathers both operands of a product, `untake` puts the gradient of a gathered operand
back. Gathers run in memory order (a gather that is also a transpose is not vectorised on CPUs) and keep the layout, channels-last included.
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

    `split` = (dim, groups): first view that dim as (groups, rest), as grouped convolutions need; `dim` and `lead` then count in the view.
    `lead`: the dim over which contractions are independent (the batch of a bmm, the groups of a convolution), None when there is one.
    """

    dim: int
    lead: int | None = None
    split: tuple[int, int] | None = None

    def view(self, x: Tensor) -> Tensor:
        return x if self.split is None else x.unflatten(self.split[0], (self.split[1], -1))

    def unview(self, x: Tensor) -> Tensor:
        return x if self.split is None else x.flatten(self.split[0], self.split[0] + 1)


def norms_sq(x: Tensor, axis: Axis, group: int = 1) -> Tensor:
    """Squared Euclidean norms along `axis`: (units,), or (batch, units) with a lead; fp32 (fp64 for fp64). A tail is left out.

    v_i = sum over every other dim (and the group) of x^2.
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


def _sum_sq(x: Tensor, dims: list[int]) -> Tensor:
    """sum of x^2 over `dims`. A long outermost sum is done in two steps: one long column per thread would miss the cache on CPUs."""
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


def _memory_order(x: Tensor) -> list[int]:
    """Dims from the slowest to the fastest in memory."""
    return sorted(range(x.dim()), key=lambda d: -_torch.hint(x.stride(d)))


def _pick(x: Tensor, axis: Axis, idx: Tensor, unit: int) -> Tensor:
    """x[.., idx, ..] along axis.dim in units, for a viewed x; the same memory order as x."""
    order = _memory_order(x)
    if any(not isinstance(s, int) for s in x.stride()):  # Inductor can't put the strides of a saved view in order, where they hold symbols
        order = sorted(order)
    straight = order == sorted(order)
    y = x if straight else x.permute(order)
    dim = order.index(axis.dim)
    y = y.unflatten(dim, (-1, unit)) if unit > 1 else y
    if axis.lead is None:
        y = torch.ops.aten._unsafe_index.Tensor(y, [None] * dim + [idx])  # the indices are ours: no bounds check in every loop
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
    """A vector over units, (n,) or (batch, n), shaped to multiply a viewed x along its axis."""
    if unit > 1:
        v = v.unsqueeze(-1).expand(*v.shape, unit).flatten(-2)
    shape = [1] * x.dim()
    shape[axis.dim] = v.shape[-1]
    if axis.lead is not None:
        shape[axis.lead] = v.shape[0]
        v = v if axis.lead < axis.dim else v.transpose(0, 1)
    return v.reshape(shape)


def take(x: Tensor, axis: Axis, idx: Tensor, scale: Tensor | None, unit: int) -> Tensor:
    """The kept entries of an operand, times their scale (multiplied in the scale's precision): K -> n * unit along `axis`."""
    x = axis.view(x)
    y = _pick(x, axis, idx, unit)
    if scale is not None:
        y = (y * _along(scale, y, axis, unit)).to(x.dtype)
    return axis.unview(y)


def untake(y: Tensor, axis: Axis, idx: Tensor, scale: Tensor | None, unit: int, size: int) -> Tensor:
    """The gradient of `take`: the kept entries at their places, zeros elsewhere; n * unit -> size along `axis`.

    The indices are distinct, so a gather by the inverse index does it: one pointwise loop, no zero-fill, no atomics.
    """
    y = axis.view(y)
    if scale is not None:
        y = (y * _along(scale, y, axis, unit)).to(y.dtype)
    at = inverse_index(idx, size // unit)
    full = _pick(y, axis, at.clamp_min(0), unit)
    full = torch.where(_along(at >= 0, full, axis, unit), full, 0)
    return axis.unview(full)


def sample(
    how: Estimator, a: Tensor, b: Tensor, a_axis: Axis, b_axis: Axis, others: Sequence[tuple[Tensor, Axis]] = ()
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Indices, scale, and both operands of a product cut to the kept entries; the scale is on `b`.

    Y' = A[:, idx] (diag(scale) B[idx, :]). `others`: what else A is multiplied with under the same indices, each with its axis. The norms b_i are then those
    of [B, C, ..] side by side, b_i^2 = |B[i, :]|^2 + |C[i, :]|^2 + .., so the choice is the one for that product as a whole: for A [B, C, ..] the best k, or
    the probabilities of least variance; each product by itself stays unbiased under an unbiased estimator.
    """
    a_sq = norms_sq(a, a_axis, how.group)
    b_sq = norms_sq(b, b_axis, how.group)
    for other, axis in others:
        b_sq = b_sq + norms_sq(other, axis, how.group)
    idx, scale = select(how, a_sq, b_sq)
    return idx, scale, take(a, a_axis, idx, None, how.unit), take(b, b_axis, idx, scale, how.unit)


def sample_by_weight(how: Estimator, weight: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Indices of `topk_weights`, which need no activation, and the weight cut to the kept entries: what `sample` chooses, without its other operand."""
    sq = norms_sq(weight, axis, how.group)
    idx, _ = select(how, sq, sq)
    return idx, take(weight, axis, idx, None, how.unit)
