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
from approx_compile.kernels.rows import Rows


class Blocked(Exception):
    """An op that may not run on some of the rows, and why."""


CONST, FORWARD, HEAD, ROWS, TOTAL = "const", "forward", "head", "rows", "total"
"""What a node is: made of parameters alone; made of the forward pass's rows; linear in output gradients that have no rows (a loss); linear in the
output's gradients row by row; a sum of such rows."""

COUPLED = "a sum over the batch goes back to its rows, as in BatchNorm"
DECOUPLED = "approx_compile_decoupled"
"""Key in the meta of a node that combines rows with a sum over the batch and may."""

Layout = Rows | None | tuple["Rows | None", ...]


@dataclass
class Followed:
    """What is known of every node: `layout` (None: holds no rows), `kind`, and for some `blocked`, the reason."""

    batch: sympy.Symbol
    layout: dict[fx.Node, Layout] = field(default_factory=dict)
    kind: dict[fx.Node, str] = field(default_factory=dict)
    blocked: dict[fx.Node, str] = field(default_factory=dict)
    lost: set[fx.Node] = field(default_factory=set)
    """Nodes with the batch somewhere in a merged dim, where exactly is unknown."""
    numbers: set[fx.Node] = field(default_factory=set)
    """Nodes that use the batch's size as a number, which must stay that of the whole batch."""

    def rows(self, n: Any) -> Rows | None:
        found = self.layout.get(n)
        return found if isinstance(found, Rows) else None


def numel_of(sizes: Sequence[Any]) -> Any:
    total = sympy.S.One
    for s in sizes:
        total *= _torch.size_expr(s)
    return total


def holds(value: Any, batch: sympy.Symbol) -> bool:
    if isinstance(value, tuple | list):
        return any(holds(v, batch) for v in value)
    return isinstance(value, torch.Tensor) and any(_torch.has_symbol(s, batch) for s in value.shape)


def op_name(n: fx.Node) -> str:
    return str(n.target).removeprefix("aten.").removeprefix("prims.").split(".")[0]
