"""Data structures of the batch-dim analysis: where each value of a graph holds the samples of the batch, what role it has, and why an op is blocked.

The geometry helpers below translate between a dim of a strided tensor and the stride, in its memory, from one sample to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.reasons import Reason


class Blocked(Exception):
    """Raised for an op that may not run on a subset of the rows, with the reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


CONSTANT, FORWARD, LOSS_GRAD, ROW_GRAD, REDUCED_GRAD = "const", "forward", "head", "rows", "total"
"""The kinds of a node. CONSTANT: computed from parameters alone. FORWARD: computed from rows of the forward pass. LOSS_GRAD: linear in output gradients
that have no rows (the loss is inside the graph). ROW_GRAD: linear in the output gradient, row by row. REDUCED_GRAD: a sum over such rows."""

DECOUPLED = "approx_compile_decoupled"
"""Key in the meta of a node that combines rows with a sum over the batch and is allowed to (see `batch_norm`)."""


@dataclass(frozen=True)
class BatchSize:
    """What the number of samples is in the sizes of a graph.

    Attributes:
        symbol: The symbol that the graph's sizes are made of.
        group: How many entries of an axis of size `symbol` belong to one sample. It is more than 1 where the batch comes with all views of the samples, or all
            frames of the clips, along one axis, which the model takes apart: `symbol` = `group` * samples.
        same: Other symbols of the graph that count as the same size.
    """

    symbol: sympy.Symbol
    group: int = 1
    same: tuple[sympy.Symbol, ...] = ()

    @property
    def samples(self) -> sympy.Symbol:
        """The symbol of the number of samples: `symbol` itself where every entry is a sample of its own."""
        return self.symbol if self.group == 1 else sympy.Symbol(f"{self.symbol}_samples", integer=True, positive=True)

    def expr(self, size: Any) -> Any:
        """Return a size as an expression that has `samples` for the batch. Quotients such as `symbol` // `group` are simplified."""
        e = _torch.size_expr(size)
        return e if self.group == 1 and not self.same else e.xreplace(dict.fromkeys((self.symbol, *self.same), self.group * self.samples))

    def numel(self, sizes: Sequence[Any]) -> Any:
        """Return the product of sizes as such an expression."""
        return sympy.Mul(*map(self.expr, sizes))

    def is_in(self, size: Any) -> bool:
        """Return whether a size depends on the number of samples."""
        return not isinstance(size, int) and self.samples in self.expr(size).free_symbols

    def dims_in_view(self, sizes: Sequence[Any], before: Any, after: Any) -> list[int]:
        """Return the dims of a view that may hold the samples: those whose sizes depend on their number.

        Args:
            sizes: The sizes of the view.
            before: The number of entries of the axes to the left of the samples, in the order of the entries.
            after: The number of entries to the right of them.
        """
        return [d for d, s in enumerate(sizes) if self.is_in(s)]


@dataclass(frozen=True)
class SampleLayout:
    """Where a tensor holds the samples of the batch: in dim `dim`, whose size is outer * batch * inner, in that order.

    With `outer` None the tensor is constant along that dim (it is uniform), so that any position of the samples within the dim is correct.
    """

    dim: int
    outer: Any = sympy.S.One
    inner: Any = sympy.S.One
    index: bool = field(default=False, compare=False)
    """Whether the entries are the indices of the samples they belong to, as in `arange(batch)`."""

    @property
    def uniform(self) -> bool:
        """Whether the tensor is constant along `dim`."""
        return self.outer is None

    def at_dim(self, dim: int) -> SampleLayout:
        """Return the same layout in another dim, without the mark `index`."""
        return SampleLayout(dim, self.outer, self.inner)


ValueLayout = SampleLayout | None | tuple[SampleLayout | None, ...]
"""The layout of a node's value; a tuple for an op with several results. None: no samples in it."""


@dataclass
class BatchDimState:
    """What the analysis knows of every node of a graph."""

    batch: BatchSize
    layout: dict[fx.Node, ValueLayout] = field(default_factory=dict)
    kind: dict[fx.Node, str] = field(default_factory=dict)
    """One of CONSTANT, FORWARD, LOSS_GRAD, ROW_GRAD, REDUCED_GRAD."""
    blocked: dict[fx.Node, Reason] = field(default_factory=dict)
    """Nodes that may not run on a subset of the rows, with the reason."""
    nonlinear: dict[fx.Node, Reason] = field(default_factory=dict)
    """Nodes that are not known to be linear in the gradients they read, with the reason: those gradients must be exact."""
    unlocated: set[fx.Node] = field(default_factory=set)
    """Nodes that hold the batch somewhere in a merged dim, at a position that is not known."""
    whole_batch_only: set[fx.Node] = field(default_factory=set)
    """Nodes that only a run on the whole batch can compute, although other nodes may use rows of them: the indices of the samples."""
    indexed_by_sample: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Nodes that read or write each sample's own entries by its index, x[arange(batch), i]: which of their indices is the sample's, and the dim of that
    index tensor that holds the batch."""
    batch_size_factors: set[fx.Node] = field(default_factory=set)
    """Nodes that use the batch's size as a factor, which must stay the size of the whole batch."""

    def layout_of(self, n: Any) -> SampleLayout | None:
        """Return the layout of a node that has one result; None if it holds no samples, or for an argument that is no node."""
        layout = self.layout.get(n)
        return layout if isinstance(layout, SampleLayout) else None


def holds_batch(value: Any, batch: BatchSize) -> bool:
    """Return whether a tensor, or any tensor of a tuple or list, has the batch's size in its shape."""
    if isinstance(value, tuple | list):
        return any(holds_batch(v, batch) for v in value)
    return isinstance(value, torch.Tensor) and any(map(batch.is_in, value.shape))


def argument_values(args: Any) -> list[Any]:
    """Return the numeric arguments of an op, with the symbolic value in place of each node."""
    return [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]


# --- strided geometry ---

StridedGeometry = tuple[Sequence[Any], Sequence[Any], Any]
"""Size, stride and storage offset."""


def geometry_of(value: torch.Tensor) -> StridedGeometry:
    """Return a tensor's size, stride and storage offset."""
    return value.shape, value.stride(), value.storage_offset()


def strided_geometry(n: fx.Node, position: int) -> StridedGeometry:
    """Return the geometry that an as_strided op is given from argument `position` on; if no offset is given, that of its tensor."""
    size, stride, *rest = n.args[position:]
    (offset,) = argument_values([rest[0] if rest else n.kwargs.get("storage_offset")])
    return argument_values(size), argument_values(stride), _torch.value(n.args[0]).storage_offset() if offset is None else offset


def covers_same_memory(a: StridedGeometry, b: StridedGeometry) -> bool:
    """Return whether two tensors over one memory both cover the same contiguous range of it, each entry once."""
    (size, _, offset), (size_b, _, offset_b) = a, b
    entries, entries_b = (sympy.Mul(*map(_torch.size_expr, s)) for s in (size, size_b))
    return bool(is_dense(a) and is_dense(b) and _torch.known_equal(offset, offset_b) and sympy.expand(entries - entries_b) == 0)


def is_dense(geometry: StridedGeometry) -> bool:
    """Return whether a tensor covers a contiguous range of memory, each entry once, with its axes in any order.

    Sizes are compared by `known_equal` alone: `==`, which `list.remove` applies too, adds a guard that fixes the size of the batch.
    """
    size, stride, _ = geometry
    left = [(n, step) for n, step in zip(size, stride, strict=True) if not _torch.known_equal(n, 1)]
    step: Any = 1
    while left:
        place = next((i for i, (_, s) in enumerate(left) if _torch.known_equal(s, step)), None)
        if place is None:
            return False
        step = step * left.pop(place)[0]
    return True


def is_dense_at_hand_only(value: torch.Tensor) -> bool:
    """Return whether a tensor's strides fill its memory for the sizes at hand alone: Inductor has made numbers of strides that depend on the batch's size."""
    size, stride = [_torch.hint(s) for s in value.shape], [_torch.hint(s) for s in value.stride()]
    return is_dense((size, stride, 0)) and not is_dense(geometry_of(value))


def sample_stride(geometry: StridedGeometry, layout: SampleLayout, batch: BatchSize) -> Any:
    """Return the distance in memory, in entries, from one sample to the next."""
    return batch.expr(geometry[1][layout.dim]) * layout.inner


def layout_from_stride(geometry: StridedGeometry, step: Any, batch: BatchSize) -> SampleLayout | None:
    """Return the layout of a tensor whose samples lie `step` entries apart in memory; None if no dim holds them whole."""
    for d, (size, stride) in enumerate(zip(geometry[0], geometry[1], strict=True)):
        if batch.is_in(size):
            inner = sympy.cancel(step / batch.expr(stride))
            outer = sympy.cancel(batch.expr(size) / (batch.samples * inner))
            return SampleLayout(d, outer, inner) if is_whole_number(inner) and is_whole_number(outer) else None
    return None


def is_whole_number(e: Any) -> bool:
    """Return whether an expression is a whole number for all sizes that its symbols may stand for."""
    return bool(e.is_Integer or (e.is_integer and e.is_polynomial()))
