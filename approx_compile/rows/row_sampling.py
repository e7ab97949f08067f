"""Which rows of a batch go through the backward pass, how many are needed, and how they are gathered and put back: readable torch on the device, no
host synchronisation.

Row i has gradient norm g_i at the cut. A row kept with probability p_i and scaled by 1/p_i leaves the gradient's mean as it is and adds to its
variance about sum (1 - p_i) / p_i g_i^2, where the gradient's own second moment over the batch is sum g_i^2. For a given number of rows the best
p_i is min(1, c g_i): all rows that are not certain then weigh the same, 1 / c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, select

_BEYOND = 1e200
"""What an inf or NaN norm counts as: such rows are kept first."""


def choose(method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """Squared norms (B,) -> indices (k,) int64, sorted and distinct, and their weights (k,) or None (topk keeps rows as they are).

    `bernoulli` is here the fixed-size scheme of `systematic`. Rows whose norm is inf or NaN are kept first, with weight 1.
    `random`: what is drawn from in place of torch's own stream.
    """
    if method == "bernoulli":
        idx, p = systematic(inclusion(norms_sq, k), k, random)
        return idx, p.reciprocal().to(norms_sq.dtype)
    how = Estimator(method, norms_sq.shape[0], k)
    return select(how, norms_sq, torch.ones_like(norms_sq), random)


def _norms(norms_sq: Tensor) -> Tensor:
    return norms_sq.detach().to(torch.float64).sqrt().nan_to_num_(nan=_BEYOND, posinf=_BEYOND)


def inclusion(norms_sq: Tensor, k: int) -> Tensor:
    """p_i = min(1, c g_i), fp64 (B,), with c such that sum p = k. Where fewer than k rows have a gradient, those have p = 1 and the sum is less.

    If the n smallest rows are the uncertain ones, c = (k - (B - n)) / (g_1 + .. + g_n); the n at which that fits is the solution.
    """
    g = _norms(norms_sq)
    size = g.shape[0]
    ascending, _ = g.sort()
    budget = torch.arange(k - size + 1, k + 1, device=g.device)
    c = budget / ascending.cumsum(0)
    c = _first_fit(c, ascending)
    return torch.where(c.isfinite(), (c * g).clamp_(max=1), (g > 0).to(g.dtype))


def _first_fit(c: Tensor, ascending: Tensor) -> Tensor:
    """The smallest c[n - 1] under which just the n smallest norms are uncertain: c g_n <= 1 <= c g_(n + 1). inf where there is none."""
    above = torch.cat([ascending[1:], ascending.new_full((1,), torch.inf)])
    fits = (c * ascending <= 1 + 1e-12) & (c * above >= 1 - 1e-12)
    return torch.where(fits, c, torch.inf).amin()


def systematic(p: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """k distinct rows, row i among them with probability p_i (sum p = k): indices (k,), sorted, and their p.

    The rows are laid end to end in random order, row i with length p_i, and cut at u, u + 1, .., u + k - 1 with u uniform in [0, 1): every row is
    hit with probability p_i and none twice (Madow 1949; random order as in Hartley and Rao 1962). With sum p < k the rest of the k are rows without
    a gradient, whose p is given as 1.
    """
    size = p.shape[0]
    p = torch.where(p.sum() < k - 0.5, torch.where(p > 0, p, _spare(p, k)), p)
    order = torch.randperm(size, device=p.device, generator=random)
    ends = p[order].cumsum(0)
    first = torch.rand((), device=p.device, dtype=p.dtype, generator=random)
    cuts = (first + torch.arange(k, device=p.device)) * (ends[-1] / k)  # ends[-1] is k but for rounding
    idx = order[torch.searchsorted(ends, cuts, right=True).clamp_(max=size - 1)].sort().values
    return idx, p[idx]


def _spare(p: Tensor, k: int) -> Tensor:
    """1 for just so many rows without a gradient that the sum is k."""
    empty = p == 0
    return (empty & (empty.cumsum(0) <= k - p.sum())).to(p.dtype)


def needed(norms_sq: Tensor, tau: float) -> Tensor:
    """The smallest expected share of rows, a scalar in (0, 1], at which sum (1 - p) / p g^2 <= tau sum g^2 with p = min(1, c g).

    With the n smallest norms uncertain the left side is G1 / c - G2, where G1 = sum g and G2 = sum g^2 over those: c = G1 / (tau S + G2), for the n
    at which it fits. 1 where a norm is inf or NaN or all are 0: then nothing is to be saved.
    """
    g = _norms(norms_sq)
    ascending, _ = g.sort()
    square = ascending.square()
    total = square.sum()
    c = _first_fit(ascending.cumsum(0) / (tau * total + square.cumsum(0)), ascending)
    share = (c * g).clamp_(max=1).mean()
    return torch.where((total > 0) & (ascending[-1] < _BEYOND) & share.isfinite(), share, 1.0)


# --- rows of a tensor ---


@dataclass(frozen=True)
class Rows:
    """The batch lies in dim `dim`, whose size is outer * batch * inner, in that order. None: the tensor is constant along that dim, so any place will do."""

    dim: int
    outer: Any = sympy.S.One
    inner: Any = sympy.S.One
    index: bool = field(default=False, compare=False)
    """Whether the entries are the numbers of the samples that they belong to, as in `arange(batch)`."""

    @property
    def uniform(self) -> bool:
        return self.outer is None

    def moved(self, dim: int) -> Rows:
        return Rows(dim, self.outer, self.inner)


def _unfolded(value: Tensor, layout: Rows, size: int) -> tuple[Tensor, int]:
    """The tensor with its rows in a dim of their own, and that dim."""
    total = value.shape[layout.dim]
    inner = total // size if layout.uniform else int(layout.inner) if layout.inner.is_Integer else None
    if inner is None:  # sizes of other symbols: what the batch and the outer part leave
        outer = int(layout.outer) if layout.outer.is_Integer else None
        if outer is None:
            raise RuntimeError(f"rows between two axes of symbolic size: {layout}")
        inner = total // size // outer
    if inner == 1 and total == size:
        return value, layout.dim
    outer = total // (size * inner)
    return value.unflatten(layout.dim, (outer, size, inner)), layout.dim + 1


def row_norms_sq(value: Tensor, layout: Rows | None, size: int) -> Tensor:
    """Squared Euclidean norm of every row, (size,) in fp32 (fp64 for fp64)."""
    assert layout is not None
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if not value.numel():
        return torch.zeros(size, dtype=dtype, device=value.device)
    rows, dim = _unfolded(value, layout, size)
    rest = [d for d in range(rows.dim()) if d != dim]
    if not rest:
        return rows.to(dtype).square()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=rest, dtype=dtype)
    return norms.square()


def gathered(value: Tensor, layout: Rows, idx: Tensor, weight: Tensor | None, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The rows `idx` of a tensor, times their weights, with the strides that the compiled code expects. A stride of 0 there means that the tensor is
    expanded along that dim: it is gathered once and expanded again; all its rows are one where that dim is the batch's (they can't have weights then)."""
    if 0 in size:
        return torch.empty_strided(tuple(size), tuple(stride), dtype=value.dtype, device=value.device)
    expanded = 0 in stride
    small = _once(value, stride) if expanded else value
    once = [1 if t == 0 else n for n, t in zip(size, stride, strict=True)] if expanded else list(size)
    if stride[layout.dim] == 0 and size[layout.dim] > 1:
        assert weight is None, f"weights on rows that share their memory: {list(size)}, strides {list(stride)}"
        new = small
    else:
        rows, dim = _unfolded(small, layout, value.shape[layout.dim] * len(idx) // size[layout.dim])
        strides = rows.stride()
        order = sorted(range(rows.dim()), key=lambda d: -strides[d])  # in memory order: whole rows are copied
        at = order.index(dim)
        back = [order.index(d) for d in range(rows.dim())]
        new = rows.permute(order).index_select(at, idx)
        if weight is not None:
            shape = [1] * new.dim()
            shape[at] = len(idx)
            new = new.mul_(weight.view(shape)) if new.dtype == weight.dtype else (new * weight.view(shape)).to(new.dtype)
        new = new.permute(back).reshape(once)
    new = strided(new, stride)
    return new.expand(tuple(size)) if expanded else new


def scattered(value: Tensor, layout: Rows, idx: Tensor | None, batch: int, size: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """Rows put back in their places among `batch`, zeros elsewhere; with the strides that the compiled code expects, if any."""
    if idx is None:
        return value
    if 0 in size:
        return strided(torch.zeros(tuple(size), dtype=value.dtype, device=value.device), stride)
    rows, dim = _unfolded(value, layout, len(idx))
    full = torch.zeros([*rows.shape[:dim], batch, *rows.shape[dim + 1 :]], dtype=value.dtype, device=value.device)
    return strided(full.index_copy_(dim, idx, rows).reshape(list(size)), stride)


def strided(x: Tensor, stride: Sequence[int] | None) -> Tensor:
    """The same values with these strides; the tensor itself where it has them. Along a dim of stride 0 all values are one."""
    if stride is None or all(a == b for a, b, s in zip(x.stride(), stride, x.shape, strict=True) if s > 1):
        return x
    return _copied(x, stride)


def copied(x: Tensor) -> Tensor:
    """A copy with the same strides, for which code was compiled; an expanded dim stays one."""
    return _copied(x, x.stride())


def _copied(x: Tensor, stride: Sequence[int]) -> Tensor:
    small = _once(x, stride)
    return torch.empty_strided(small.shape, tuple(stride), dtype=x.dtype, device=x.device).copy_(small).expand(x.shape)


def _once(x: Tensor, stride: Sequence[int]) -> Tensor:
    """One entry of every dim that has stride 0."""
    for d, (n, t) in enumerate(zip(x.shape, stride, strict=True)):
        if t == 0 and n > 1:
            x = x.narrow(d, 0, 1)
    return x


def overlap(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether entries of a tensor may share their memory otherwise than by a stride of 0 (windows of a sequence do). May be true where none do."""
    reach = 0  # how far the dims with smaller strides go
    for t, n in sorted((t, n) for t, n in zip(stride, size, strict=True) if t and n > 1):
        if t <= reach:
            return True
        reach += t * (n - 1)
    return False
