"""Batching rules of ops that read or write entries by index tensors: gather, scatter, index, index_put and the gradient of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import op_name
from approx_compile.reasons.rows import INDICES_APART, OPERAND_WITHOUT_SAMPLES, ROWS_ALL_OVER, ROWS_OVERWRITE, SAMPLES_BY_INDEX, SAMPLES_WRITTEN
from approx_compile.rows.batch_dim import BatchDimState, Blocked, SampleLayout, ValueLayout
from approx_compile.rows.batching_rules.common import along_dim, broadcast_layout, common_layout


def gather_scatter(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to gather and scatter. Away from their dim, entry i of an operand belongs to entry i of the others, so that all must hold samples."""
    tensors = [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    if any(state.layout_of(a) is None for a in tensors):
        raise Blocked(OPERAND_WITHOUT_SAMPLES(op=op_name(n)))
    return along_dim(1)(n, value, state)


class _Indices(NamedTuple):
    """The index tensors of x[.., i, j, ..]: `tensors` with the dim that each indexes; `first`: the first such dim; `width`: the rank of all, broadcast
    together; `adjacent`: whether they index adjacent dims, in whose place the indices' own dims then are. Else these come first in the result.
    """

    tensors: Sequence[tuple[int, fx.Node]]
    first: int
    width: int
    adjacent: bool

    @staticmethod
    def of(indices: Any) -> _Indices:
        tensors = [(d, i) for d, i in enumerate(indices) if i is not None]
        first = tensors[0][0]
        adjacent = [d for d, _ in tensors] == list(range(first, first + len(tensors)))
        return _Indices(tensors, first, max(_torch.value(i).dim() for _, i in tensors), adjacent)

    def hold_samples(self, state: BatchDimState) -> bool:
        return any(state.layout_of(i) is not None for _, i in self.tensors)

    def layout(self, state: BatchDimState) -> SampleLayout | None:
        """The layout of the indices broadcast together."""
        return common_layout(*(broadcast_layout(i, self.width, state) for _, i in self.tensors))

    def in_result(self, layout: SampleLayout) -> SampleLayout:
        """A layout of the indices, with the dim counted in the result of the indexing."""
        return layout.at_dim(layout.dim + (self.first if self.adjacent else 0))


def index_position(n: fx.Node) -> int:
    """Return which argument of an op x[.., i, j, ..] are the indices. Ops with a mask have it before them."""
    return 2 if "_masked_" in op_name(n) else 1


def masked_index(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to x[.., i, j, ..] where a mask is set, and one number elsewhere, as in the gradient of reflection padding."""
    return common_layout(index(n, value, state), broadcast_layout(n.args[1], value.dim(), state))  # type: ignore[arg-type]


def index(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to x[.., i, j, ..] with tensors as indices."""
    layout, indices = state.layout_of(n.args[0]), _Indices.of(n.args[index_position(n)])
    if layout is not None and (by_sample := _indexed_by_sample(n, layout, indices, state)) is not None:
        return indices.in_result(by_sample)
    if not indices.adjacent:
        raise Blocked(INDICES_APART())
    if layout is None:  # a table that every sample looks up by its own entries
        looked_up = indices.layout(state)
        return indices.in_result(looked_up) if looked_up is not None else None
    count = len(indices.tensors)
    if indices.hold_samples(state) or indices.first <= layout.dim < indices.first + count:
        raise Blocked(SAMPLES_BY_INDEX())
    return layout if layout.dim < indices.first else layout.at_dim(layout.dim - count + indices.width)


def index_put(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to x[.., i, j, ..] = values, and += values: writes within each sample of x, or the gradient of a looked-up table, a sum over samples."""
    if op_name(n) == "_unsafe_masked_index_put_accumulate":
        x, mask, index_args, values = n.args
        accumulate: Any = True
        common_layout(state.layout_of(mask), *(state.layout_of(i) for i in index_args if i is not None))  # type: ignore[union-attr]
    else:
        x, index_args, values = n.args[:3]
        accumulate = n.args[3] if len(n.args) > 3 else False
    layout, indices = state.layout_of(x), _Indices.of(index_args)
    rank = indices.width + _torch.value(x).dim() - len(indices.tensors)
    written = broadcast_layout(values, rank, state)
    if layout is not None and (by_sample := _indexed_by_sample(n, layout, indices, state)) is not None:
        common_layout(indices.in_result(by_sample), written)
        return layout
    if layout is not None:
        dims = [d for d, _ in indices.tensors]
        if indices.hold_samples(state) or layout.dim in dims:
            raise Blocked(SAMPLES_WRITTEN())
        before = sum(d < layout.dim for d in dims)  # in the values, the indices' own dims stand in place of these, or first of all
        moved = layout.dim - before + (indices.width if before or not indices.adjacent else 0)
        both = common_layout(layout.at_dim(moved), written)
        return both.at_dim(layout.dim) if both is not None else None
    if not accumulate or not indices.adjacent or indices.first:
        raise Blocked(ROWS_OVERWRITE())
    if common_layout(indices.layout(state), written) is None or (written is not None and written.dim >= indices.width):
        raise Blocked(ROWS_ALL_OVER())
    return None


def _indexed_by_sample(n: fx.Node, layout: SampleLayout, indices: _Indices, state: BatchDimState) -> SampleLayout | None:
    """The layout of the indices in x[arange(batch), i], which reads or writes each sample's own entries; None for any other indexing.

    The node is noted in `state.indexed_by_sample`: on a subset of the rows the samples must be numbered anew.
    """
    if layout != SampleLayout(layout.dim):
        return None
    of_samples = [i for d, i in indices.tensors if d == layout.dim and (p := state.layout_of(i)) is not None and p.index]
    if len(of_samples) != 1:
        return None
    (sample_index,) = of_samples
    place = state.layout_of(sample_index)
    assert place is not None
    shape = _torch.value(sample_index).shape
    others = [_torch.value(i).shape for _, i in indices.tensors if i is not sample_index]

    def other_index_has(d: int) -> bool:  # d counts from the last dim
        return any(len(o) >= d and _torch.known_equal(o[-d], shape[-d]) for o in others)

    if any(not _torch.known_equal(shape[-d], 1) and len(shape) - d != place.dim and not other_index_has(d) for d in range(1, len(shape) + 1)):
        return None  # the sample's index is expanded along a dim that no other index has: numbered anew, it would lose that dim
    state.indexed_by_sample[n] = layout.dim, place.dim
    return indices.layout(state)


def embedding_backward(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to the gradient of an embedding's table: a sum over the samples."""
    common_layout(state.layout_of(n.args[0]), state.layout_of(n.args[1]))
    return None
