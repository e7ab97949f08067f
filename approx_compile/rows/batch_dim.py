"""What is known of every tensor of a graph while the batch is followed through it: where its samples lie, what it is made of, and why an op may not run
on some of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch


class Blocked(Exception):
    """An op that may not run on some of the rows, and why."""


CONST, FORWARD, HEAD, ROWS, TOTAL = "const", "forward", "head", "rows", "total"
"""What a node is: made of parameters alone; made of the forward pass's rows; linear in output gradients that have no rows (a loss); linear in the
output's gradients row by row; a sum of such rows."""

COUPLED = "a sum over the batch goes back to its rows, as in BatchNorm"
DECOUPLED = "approx_compile_decoupled"
"""Key in the meta of a node that combines rows with a sum over the batch and may."""


@dataclass(frozen=True)
class SampleLayout:
    """Where a tensor holds the samples of the batch: in dim `dim`, whose size is outer * batch * inner, in that order.

    With `outer` None the tensor is constant along that dim (it is uniform), so that any position of the samples within the dim is correct.
    """

    dim: int
    outer: Any = sympy.S.One
    inner: Any = sympy.S.One
    index: bool = field(default=False, compare=False)
    """Whether the entries are the numbers of the samples they belong to, as in `arange(batch)`."""

    @property
    def uniform(self) -> bool:
        """Whether the tensor is constant along `dim`."""
        return self.outer is None

    def at_dim(self, dim: int) -> SampleLayout:
        """Return the same layout in another dim, without the mark `index`."""
        return SampleLayout(dim, self.outer, self.inner)


Layout = SampleLayout | None | tuple["SampleLayout | None", ...]


@dataclass
class Followed:
    """What is known of every node: `layout` (None: holds no rows), `kind`, and for some `blocked`, the reason."""

    batch: sympy.Symbol
    layout: dict[fx.Node, Layout] = field(default_factory=dict)
    kind: dict[fx.Node, str] = field(default_factory=dict)
    blocked: dict[fx.Node, str] = field(default_factory=dict)
    nonlinear: dict[fx.Node, str] = field(default_factory=dict)
    """Nodes of which it is not known that they are linear in the gradients they read, and why: those gradients must be exact."""
    lost: set[fx.Node] = field(default_factory=set)
    """Nodes with the batch somewhere in a merged dim, where exactly is unknown."""
    whole: set[fx.Node] = field(default_factory=set)
    """Nodes that only the whole batch can give, which others may have rows of: the numbers of the samples."""
    counted: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Nodes that take or write every sample's own entries by its number, x[arange(batch), i]: which of their indices is that number, and the dim of that
    index that has the batch."""
    numbers: set[fx.Node] = field(default_factory=set)
    """Nodes that use the batch's size as a number, which must stay that of the whole batch."""

    def rows(self, n: Any) -> SampleLayout | None:
        found = self.layout.get(n)
        return found if isinstance(found, SampleLayout) else None


def numel_of(sizes: Sequence[Any]) -> Any:
    total = sympy.S.One
    for s in sizes:
        total *= _torch.size_expr(s)
    return total


def holds(value: Any, batch: sympy.Symbol) -> bool:
    if isinstance(value, tuple | list):
        return any(holds(v, batch) for v in value)
    return isinstance(value, torch.Tensor) and any(_torch.has_symbol(s, batch) for s in value.shape)


Geometry = tuple[Sequence[Any], Sequence[Any], Any]
"""Size, stride and storage offset."""


def geometry_of(value: torch.Tensor) -> Geometry:
    return value.shape, value.stride(), value.storage_offset()


def strided_geometry(n: fx.Node, position: int) -> Geometry:
    """What an as_strided is given from argument `position` on; without an offset, its tensor's."""
    size, stride, *rest = n.args[position:]
    (offset,) = numbers_of([rest[0] if rest else n.kwargs.get("storage_offset")])
    return numbers_of(size), numbers_of(stride), _torch.value(n.args[0]).storage_offset() if offset is None else offset


def same_memory(a: Geometry, b: Geometry) -> bool:
    """Whether two tensors of one memory have the same entries, each once, and all that lie between the first and the last."""
    (size, _, offset), (size_b, _, offset_b) = a, b
    return bool(dense(a) and dense(b) and _torch.known_equal(offset, offset_b) and sympy.expand(numel_of(size) - numel_of(size_b)) == 0)


def dense(geometry: Geometry) -> bool:
    """Whether a tensor has its entries side by side in memory, each once, in whatever order of its axes."""
    size, stride, _ = geometry
    left = [(n, step) for n, step in zip(size, stride, strict=True) if not _torch.known_equal(n, 1)]
    step: Any = 1
    while left:
        found = next((pair for pair in left if _torch.known_equal(pair[1], step)), None)
        if found is None:
            return False
        left.remove(found)
        step = step * found[0]
    return True


def place_in_memory(geometry: Geometry, place: SampleLayout) -> Any:
    """The steps in memory from one sample to the next."""
    return _torch.size_expr(geometry[1][place.dim]) * place.inner


def place_at(geometry: Geometry, step: Any, batch: sympy.Symbol) -> SampleLayout | None:
    """Where a tensor has the samples that lie `step` apart in its memory."""
    for d, (size, stride) in enumerate(zip(geometry[0], geometry[1], strict=True)):
        if _torch.has_symbol(size, batch):
            inner = sympy.cancel(step / _torch.size_expr(stride))
            outer = sympy.cancel(_torch.size_expr(size) / (batch * inner))
            return SampleLayout(d, outer, inner) if whole_number(inner) and whole_number(outer) else None
    return None


def whole_number(e: Any) -> bool:
    """Whether an expression is a whole number for any sizes that its symbols stand for."""
    return bool(e.is_integer is not False and (e.is_Integer or e.is_polynomial()))


def numbers_of(args: Any) -> list[Any]:
    """Sizes given to an op, each a number or a symbolic one in place of its node."""
    return [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
