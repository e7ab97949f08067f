"""Gather rows of a batch out of a tensor and scatter them back, with the strides that compiled code expects.

Readable torch code that runs on the tensor's device and never makes the host wait. A `SampleLayout` says where a tensor holds its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from approx_compile.rows.batch_dim import SampleLayout


def _unfolded(value: Tensor, layout: SampleLayout, size: int) -> tuple[Tensor, int]:
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


def row_norms_sq(value: Tensor, layout: SampleLayout | None, size: int) -> Tensor:
    """Return the squared Euclidean norm of every row, (size,) in fp32 (fp64 for fp64)."""
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


def take_rows(value: Tensor, layout: SampleLayout, idx: Tensor, weight: Tensor | None, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the rows `idx` of a tensor, multiplied by their weights, with the strides that the compiled code expects.

    A stride of 0 means that the tensor is expanded along that dim: it is gathered once and expanded again. If that dim is the batch's, all its rows share
    memory and can have no weights.
    """
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
    new = with_strides(new, stride)
    return new.expand(tuple(size)) if expanded else new


def put_rows(value: Tensor, layout: SampleLayout, idx: Tensor | None, batch: int, size: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """Return rows put back at their indices `idx` among `batch` rows, with zeros elsewhere, and with the given strides if any."""
    if idx is None:
        return with_strides(value, stride)
    if 0 in size:
        return with_strides(torch.zeros(tuple(size), dtype=value.dtype, device=value.device), stride)
    rows, dim = _unfolded(value, layout, len(idx))
    full = torch.zeros([*rows.shape[:dim], batch, *rows.shape[dim + 1 :]], dtype=value.dtype, device=value.device)
    return with_strides(full.index_copy_(dim, idx, rows).reshape(list(size)), stride)


def with_strides(x: Tensor, stride: Sequence[int] | None) -> Tensor:
    """Return the same values with these strides; the tensor itself if it has them already. Along a dim of stride 0 all values must be equal."""
    if stride is None or all(a == b for a, b, s in zip(x.stride(), stride, x.shape, strict=True) if s > 1):
        return x
    return _copied(x, stride)


def copy_keeping_strides(x: Tensor) -> Tensor:
    """Return a copy with the same strides, as compiled code expects them; an expanded dim stays expanded."""
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


def may_overlap(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether entries may share memory in another way than by a stride of 0, as windows of a sequence do. May be true where none do."""
    reach = 0  # how far the dims with smaller strides go
    for t, n in sorted((t, n) for t, n in zip(stride, size, strict=True) if t and n > 1):
        if t <= reach:
            return True
        reach += t * (n - 1)
    return False
