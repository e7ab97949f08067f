"""Batching rules of ops that take parts out of a tensor along a dim, write parts of it, join tensors, split or pad them.

A dim of the batch may hold several views of it, concatenated. A part that begins and ends between two of them is legal; a part of the samples is not.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.reasons.rows import BATCH_EXTENDED, BATCH_PADDED, BATCH_SPLIT, EVERY_NTH, EVERY_NTH_WRITTEN, ONE_SAMPLE, ONE_SAMPLE_WRITTEN, PART_OF_BATCH
from approx_compile.rows.batch_dim import BatchDimState, Blocked, SampleLayout, ValueLayout, argument_values
from approx_compile.rows.batching_rules.common import common_layout

aten = torch.ops.aten


def select(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to select: one index of a dim, which is removed."""
    layout = state.layout_of(n.args[0])
    dim = int(n.args[1]) % _torch.value(n.args[0]).dim()  # type: ignore[arg-type]
    if layout is not None and dim == layout.dim:
        raise Blocked(ONE_SAMPLE())
    return layout.at_dim(layout.dim - (dim < layout.dim)) if layout is not None else None


def slice_(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to slice."""
    layout = state.layout_of(n.args[0])
    dim = int(n.args[1]) if len(n.args) > 1 else 0  # type: ignore[arg-type]
    if layout is None or layout.uniform or dim % value.dim() != layout.dim:
        return layout
    if _step(n, 4) != 1:
        raise Blocked(EVERY_NTH())
    if _torch.known_equal(value.shape[layout.dim], _torch.value(n.args[0]).shape[layout.dim]):
        return layout
    _batches_in(_start(n, 2), layout, state)
    return SampleLayout(layout.dim, _batches_in(value.shape[layout.dim], layout, state), layout.inner)


def slice_scatter(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to slice_scatter with a target and a source: a copy of the target with a slice of it replaced by the source."""
    target, source = state.layout_of(n.args[0]), state.layout_of(n.args[1])
    dim = (int(n.args[2]) if len(n.args) > 2 else 0) % value.dim()  # type: ignore[arg-type]
    if source is None or source.uniform or dim != source.dim:
        return common_layout(target, source)
    if _step(n, 5) != 1:
        raise Blocked(EVERY_NTH_WRITTEN())
    if _torch.known_equal(value.shape[dim], _torch.value(n.args[1]).shape[dim]):
        return common_layout(target, source)
    _batches_in(_start(n, 3), source, state)
    return common_layout(target, SampleLayout(dim, _batches_in(value.shape[dim], source, state), source.inner))


def select_scatter(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to select_scatter with a target and a source: a copy of the target with one index of a dim replaced by the source."""
    source = state.layout_of(n.args[1])
    if source is not None:  # the source lacks the dim that is written to
        source = source.at_dim(source.dim + (int(n.args[2]) % _torch.value(n.args[0]).dim() <= source.dim))  # type: ignore[arg-type]
    layout = common_layout(state.layout_of(n.args[0]), source)
    dim = int(n.args[2]) if len(n.args) > 2 else 0  # type: ignore[arg-type]
    if layout is not None and dim % value.dim() == layout.dim:
        raise Blocked(ONE_SAMPLE_WRITTEN())
    return layout


def cat(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to cat. Along the batch's dim, views of the batch may be concatenated; the result holds the batch several times."""
    parts: Any = n.args[0]
    dim = (int(n.args[1]) if len(n.args) > 1 else 0) % value.dim()  # type: ignore[arg-type]
    layouts = [state.layout_of(a) for a in parts]
    layout = common_layout(*(SampleLayout(p.dim, sympy.S.One, p.inner) if p is not None and p.dim == dim and not p.uniform else p for p in layouts))
    if layout is None or layout.dim != dim or layout.uniform:
        return layout
    if any(p is None for p in layouts):
        raise Blocked(BATCH_EXTENDED())
    return SampleLayout(dim, sum(_batches_in(_torch.value(a).shape[dim], layout, state) for a in parts), layout.inner)


def split(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to split and unbind. Concatenated views of the batch may be split into single ones."""
    unbind = n.target is aten.unbind.int
    layout = state.layout_of(n.args[0])
    position = 1 if unbind else 2
    dim = int(n.args[position]) % _torch.value(n.args[0]).dim() if len(n.args) > position else 0  # type: ignore[arg-type]
    if layout is None or dim != layout.dim:
        return layout.at_dim(layout.dim - (unbind and dim < layout.dim)) if layout is not None else None
    if unbind or layout.uniform:
        raise Blocked(BATCH_SPLIT())
    return tuple(SampleLayout(dim, _batches_in(v.shape[dim], layout, state), layout.inner) for v in value)


def pad(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to constant_pad_nd, whose pads are listed from the last dim on."""
    layout = state.layout_of(n.args[0])
    if layout is not None and value.dim() - 1 - layout.dim < len(n.args[1]) // 2:  # type: ignore[arg-type]
        pads = n.args[1][2 * (value.dim() - 1 - layout.dim) :][:2]  # type: ignore[index]
        if any(p != 0 for p in pads):  # type: ignore[union-attr]
            raise Blocked(BATCH_PADDED())
    return layout


def _batches_in(length: Any, layout: SampleLayout, state: BatchDimState) -> Any:
    """How many whole batches a part of `length` entries holds, along a dim where several views of the batch may be concatenated."""
    count = sympy.cancel(state.batch.expr(length) / (state.batch.samples * layout.inner))
    if not count.is_Integer:
        raise Blocked(PART_OF_BATCH())
    return count


def _start(n: fx.Node, position: int) -> Any:
    start = n.args[position] if len(n.args) > position else n.kwargs.get("start")
    (number,) = argument_values([0 if start is None else start])
    return number


def _step(n: fx.Node, position: int) -> Any:
    return n.args[position] if len(n.args) > position else n.kwargs.get("step", 1)
