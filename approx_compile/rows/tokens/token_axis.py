"""Where a tensor holds the tokens of a batch.

The token axis is the axis over which a linear layer's weight gradient sums: all leading axes of its input, merged. Elsewhere in the graph its `factors`
(samples, positions) may lie in dims of their own, in any order: (B, T, D), (T, B, D), (B, heads, T, D). Each factor has a `SampleLayout`, and the batching
rules are applied for each factor by itself. An op keeps tokens apart if the rules allow it for every factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from approx_compile import _torch
from approx_compile.reasons.rows import VIEW_MIXES
from approx_compile.rows.batch_dim import BatchSize, Blocked, SampleLayout, is_whole_number
from approx_compile.rows.batching_rules.views import layout_of_view

TokenLayout = tuple[SampleLayout, ...]
"""The layout of every factor of the token axis, in the order of the factors."""


@dataclass(frozen=True)
class Factor(BatchSize):
    """One factor of the token axis, in the place that the size of the batch has for the batching rules. Its size may be a number."""

    def dims_in_view(self, sizes: Sequence[Any], before: Any, after: Any) -> list[int]:
        """Return the dims of a view that may hold the factor, by the number of entries to its left and right: there is at most one."""
        found = []
        for d in range(len(sizes)):
            left, right = sympy.cancel(before / self.numel(sizes[:d])), sympy.cancel(after / self.numel(sizes[d + 1 :]))
            if is_whole_number(left) and is_whole_number(right):
                found.append(d)
        return found


class Refined(Exception):
    """Raised where a view splits a factor: the analysis starts again with these factors of the axis."""

    def __init__(self, factors: tuple[Any, ...]) -> None:
        super().__init__(factors)
        self.factors = factors


def merged_layout(factors: Sequence[Any], dim: int) -> TokenLayout:
    """Return the layout of a tensor that has all tokens in one dim and nothing else there."""
    return tuple(SampleLayout(dim, sympy.Mul(*factors[:i]), sympy.Mul(*factors[i + 1 :])) for i in range(len(factors)))


def fits(layout: TokenLayout, factors: Sequence[Any], sizes: Sequence[Any]) -> bool:
    """Return whether a tensor of these sizes can have a layout."""
    return all(p.dim < len(sizes) and sympy.expand(p.outer * f * p.inner - _torch.size_expr(sizes[p.dim])) == 0 for p, f in zip(layout, factors, strict=True))


def view_layout(layout: TokenLayout, factors: tuple[Any, ...], old: Sequence[Any], new: Sequence[Any]) -> TokenLayout:
    """Return the layout of a view.

    Args:
        layout: The layout of what is viewed.
        factors: The sizes of the factors.
        old: The sizes of what is viewed.
        new: The sizes of the view.

    Raises:
        Refined: The view splits a factor.
        Blocked: The view mixes tokens with other axes.
    """
    return tuple(_view_of_factor(i, p, factors, old, new) for i, p in enumerate(layout))


def _view_of_factor(i: int, layout: SampleLayout, factors: tuple[Any, ...], old: Sequence[Any], new: Sequence[Any]) -> SampleLayout:
    try:
        return layout_of_view(layout, old, new, Factor(factors[i]))
    except Blocked:
        parts = split_factor(i, layout, factors, old, new)
        if parts is None:
            raise
        raise Refined((*factors[:i], *parts, *factors[i + 1 :])) from None


def split_factor(i: int, layout: SampleLayout, factors: tuple[Any, ...], old: Sequence[Any], new: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the parts that a view splits factor `i` into; None if it does not."""
    after = sympy.Mul(*map(_torch.size_expr, old[layout.dim + 1 :])) * layout.inner
    cuts = [sympy.S.One]
    for d in reversed(range(len(new))):
        cut = sympy.cancel(sympy.Mul(*map(_torch.size_expr, new[d:])) / after)
        rest = sympy.cancel(factors[i] / cut)
        if cut not in cuts and rest != 1 and is_whole_number(cut) and is_whole_number(rest) and is_whole_number(sympy.cancel(cut / cuts[-1])):
            cuts.append(cut)
    if len(cuts) == 1:
        return None
    cuts.append(factors[i])
    return tuple(sympy.cancel(b / a) for a, b in itertools.pairwise(cuts))[::-1]


@dataclass(frozen=True)
class Unfolding:
    """A tensor with every factor of the token axis in a dim of its own.

    Attributes:
        sizes: The sizes, as expressions.
        dims: The dim of every factor, in the order of the factors.
    """

    sizes: tuple[Any, ...]
    dims: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether the factors are adjacent and in the order of the axis, so that one dim can hold them all."""
        return self.dims == tuple(range(self.dims[0], self.dims[0] + len(self.dims)))

    @property
    def ranks(self) -> list[int]:
        """The factors in the order of their dims."""
        return sorted(range(len(self.dims)), key=lambda i: self.dims[i])

    @property
    def others(self) -> list[Any]:
        """The sizes of all dims that hold no factor."""
        return [s for d, s in enumerate(self.sizes) if d not in self.dims]

    @property
    def others_before(self) -> int:
        """How many of these dims the first factor comes after."""
        return sum(d not in self.dims for d in range(self.dims[0]))

    @property
    def merged(self) -> tuple[Any, ...]:
        """The sizes with all factors in one dim; they must be `in_order`."""
        first, last = self.dims[0], self.dims[-1]
        return (*self.sizes[:first], sympy.Mul(*self.sizes[first : last + 1]), *self.sizes[last + 1 :])


def unfold(layout: TokenLayout, factors: Sequence[Any], sizes: Sequence[Any]) -> Unfolding:
    """Return the sizes of a tensor that is viewed so that each factor has a dim of its own, without dims of size 1 between factors.

    Raises:
        Blocked: Two factors overlap.
    """
    new: list[Any] = []
    dims: dict[int, int] = {}
    for d, size in enumerate(map(_torch.size_expr, sizes)):
        here = sorted((i for i, p in enumerate(layout) if p.dim == d), key=lambda i: -_order(layout[i].inner))
        left = size
        for i in here:
            outer = sympy.cancel(left / (factors[i] * layout[i].inner))
            if not is_whole_number(outer):
                raise Blocked(VIEW_MIXES())
            if outer != 1:
                new.append(outer)
            dims[i] = len(new)
            new.append(factors[i])
            left = layout[i].inner
        if not here or left != 1:
            new.append(left)
    return Unfolding(tuple(new), tuple(dims[i] for i in range(len(factors))))


def _order(inner: Any) -> float:
    """A number by which expressions of sizes in one dim are ordered: each is a multiple of the next, so that any sizes of 2 or more do."""
    return float(sympy.sympify(inner).subs(dict.fromkeys(sympy.sympify(inner).free_symbols, 7)))


def sizes_on_tokens(layout: TokenLayout, factors: Sequence[Any], sizes: Sequence[Any], count: Any) -> list[Any]:
    """Return the sizes of a tensor with `count` tokens in place of all: they take the place of the first factor, and the other factors have size 1."""
    new = [_torch.size_expr(s) for s in sizes]
    for i, (p, f) in enumerate(zip(layout, factors, strict=True)):
        new[p.dim] = sympy.cancel(new[p.dim] / f) * (count if i == 0 else 1)
    return new
