"""Batching rules of ops that rearrange the entries of one tensor: views, reshapes, permutations, expansions and as_strided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.reasons.rows import COMPLEX_ALONG_BATCH, MEMORY_READ, MEMORY_WRITTEN, VIEW_DYNAMIC, VIEW_MIXES, VIEW_SPLITS, VIEW_UNIFORM
from approx_compile.rows.batch_dim import (
    BatchDimState,
    BatchSize,
    Blocked,
    SampleLayout,
    StridedGeometry,
    ValueLayout,
    covers_same_memory,
    geometry_of,
    is_whole_number,
    layout_from_stride,
    sample_stride,
    strided_geometry,
)
from approx_compile.rows.batching_rules.common import broadcast_layout

aten = torch.ops.aten


def view(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to views and reshapes. The batch may be merged with other axes into one dim; `outer` and `inner` then follow from the sizes before and after."""
    layout = state.layout_of(n.args[0])
    if layout is None:
        return None
    return layout_of_view(layout, _torch.value(n.args[0]).shape, value.shape, state.batch)


def layout_of_view(layout: SampleLayout, old: Sequence[Any], new: Sequence[Any], batch: BatchSize) -> SampleLayout:
    """Return the layout of a view with sizes `new` of a tensor with sizes `old` and a layout.

    Raises:
        Blocked: The view splits the samples, or mixes them with other axes.
    """
    numel = batch.numel
    left, right = (1, 1) if layout.uniform else (layout.outer, layout.inner)
    before, after = numel(old[: layout.dim]) * left, numel(old[layout.dim + 1 :]) * right
    dims = batch.dims_in_view(new, before, after)
    if len(dims) != 1:
        raise Blocked(VIEW_SPLITS())
    (dim,) = dims
    if layout.uniform:
        return _view_of_uniform(layout, old, new, dim, batch)
    outer, inner = sympy.cancel(before / numel(new[:dim])), sympy.cancel(after / numel(new[dim + 1 :]))
    if not (is_whole_number(outer) and is_whole_number(inner)):
        raise Blocked(VIEW_MIXES())
    if not (outer.is_Integer or inner.is_Integer):
        raise Blocked(VIEW_DYNAMIC())
    return SampleLayout(dim, outer, inner)


def _view_of_uniform(layout: SampleLayout, old: Sequence[Any], new: Sequence[Any], dim: int, batch: BatchSize) -> SampleLayout:
    """The layout of a view of a tensor that is constant along `layout.dim`.

    The new dim is constant, too, if no other old dim is merged into it. Along another dim the tensor may differ, and the position of the samples in the
    merged dim would then be unknown.
    """
    splits = (batch.numel(new[:dim]) / batch.numel(old[: layout.dim]), batch.numel(new[dim + 1 :]) / batch.numel(old[layout.dim + 1 :]))
    if not all(is_whole_number(sympy.cancel(e)) for e in splits):
        raise Blocked(VIEW_UNIFORM())
    return layout.at_dim(dim)


def permute(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to permute, transpose and t."""
    layout = state.layout_of(n.args[0])
    if layout is None:
        return None
    dims = list(range(value.dim()))
    if n.target is aten.permute.default:
        dims = [int(d) % len(dims) for d in n.args[1]]  # type: ignore[union-attr,arg-type]
    else:
        i: Any = n.args[1] if n.target is aten.transpose.int else 0
        j: Any = n.args[2] if n.target is aten.transpose.int else len(dims) - 1
        if dims:
            dims[i], dims[j] = dims[j], dims[i]
    return layout.at_dim(dims.index(layout.dim))


def expand(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to expand of a tensor that holds samples. (An expansion that makes the batch axis is handled by the analysis itself.)"""
    return broadcast_layout(n.args[0], value.dim(), state)


def unsqueeze(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to unsqueeze: a dim of size 1 is inserted."""
    layout = state.layout_of(n.args[0])
    at = int(n.args[1]) % value.dim()  # type: ignore[arg-type]
    return layout.at_dim(layout.dim + (at <= layout.dim)) if layout is not None else None


def squeeze(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to squeeze: given dims, or all of size 1, are removed."""
    layout = state.layout_of(n.args[0])
    rank = _torch.value(n.args[0]).dim()
    dim = n.args[1] if len(n.args) > 1 else [d for d in range(rank) if _torch.value(n.args[0]).shape[d] == 1]
    removed = {int(d) % rank for d in (dim if isinstance(dim, list | tuple) else [dim])}  # type: ignore[arg-type]
    return layout.at_dim(layout.dim - sum(d < layout.dim for d in removed)) if layout is not None else None


def as_strided(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to as_strided that reads every entry of its tensor once, with other axes."""
    layout, base, new = state.layout_of(n.args[0]), geometry_of(_torch.value(n.args[0])), strided_geometry(n, 1)
    if layout is None or layout.uniform or not covers_same_memory(base, new):
        raise Blocked(MEMORY_READ())
    return _layout_from_stride(new, sample_stride(base, layout, state.batch), state)


def as_strided_scatter(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to as_strided_scatter that writes every entry of its tensor once, from a source with other axes."""
    layout, base, new = state.layout_of(n.args[1]), geometry_of(_torch.value(n.args[0])), strided_geometry(n, 2)
    if layout is None or layout.uniform or not covers_same_memory(base, new):
        raise Blocked(MEMORY_WRITTEN())
    return _layout_from_stride(base, sample_stride(new, layout, state.batch), state)


def _layout_from_stride(geometry: StridedGeometry, step: Any, state: BatchDimState) -> SampleLayout:
    layout = layout_from_stride(geometry, step, state.batch)
    if layout is None:
        raise Blocked(VIEW_MIXES())
    return layout


def view_as_complex(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to view_as_real and view_as_complex: the last dim, which holds real and imaginary part, is added or removed."""
    layout = state.layout_of(n.args[0])
    if layout is not None and layout.dim >= min(value.dim(), _torch.value(n.args[0]).dim()):
        raise Blocked(COMPLEX_ALONG_BATCH())
    return layout
