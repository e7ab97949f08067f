"""The rows that a level of the backward pass keeps, how selections of several levels combine, and the mark by which one graph tells the next of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from approx_compile.rows.stages import ALL_ROWS

_ROWS_MARK = "_approx_compile_rows"


@dataclass
class RowSelection:
    """The rows that one level keeps.

    Attributes:
        idx: Their indices (k,) among the rows of the previous level, sorted.
        weight: The factors (k,) that their gradients are multiplied by; None for 1.
        k: The number of rows.
    """

    idx: Tensor
    weight: Tensor | None
    k: int
    before: Tensor | None = None
    """The weights that the gradients of these rows already carry, if an earlier graph of the same backward pass selected them."""


def mark_selection(gradient: Tensor, idx: Tensor, weight: Tensor | None) -> None:
    """Record on a gradient which of its rows are not zero, for the next graph that reads it.

    The mark holds the tensor's version: adding another gradient in place changes the version and makes the mark invalid.
    """
    setattr(gradient, _ROWS_MARK, (idx, weight, gradient._version))


def selection_of(gradient: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The rows and weights that `mark_selection` recorded on a gradient; None if there are none or the gradient has been written to since."""
    mark = getattr(gradient, _ROWS_MARK, None)
    return mark[:2] if mark is not None and mark[2] == gradient._version else None


def _weights(kept: Sequence[RowSelection | None], level: int) -> Tensor | None:
    """The total weight of the rows of a level, including what they carried before this graph; None for 1."""
    _, weight = _path(kept, ALL_ROWS, level)
    first = next((k for k in kept[:level] if k is not None), None)
    if first is None or first.before is None:
        return weight
    idx, _ = _path(kept, kept.index(first) + 1, level)
    before = first.before if idx is None else first.before[idx]
    return before if weight is None else before * weight


def _path(kept: Sequence[RowSelection | None], start: int, end: int) -> tuple[Tensor | None, Tensor | None]:
    """The indices of the rows of level `end` among those of level `start` (0: all rows), and the product of the weights of the levels in between.

    None as indices means all rows, None as weights means 1.
    """
    idx: Tensor | None = None
    weight: Tensor | None = None
    for step in kept[start:end]:
        if step is None:
            continue
        idx = step.idx if idx is None else idx[step.idx]
        carried = weight[step.idx] if weight is not None else None
        weight = step.weight if carried is None else carried if step.weight is None else carried * step.weight
    return idx, weight
