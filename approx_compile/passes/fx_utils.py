"""What several passes ask of a node of the joint graph: which op it is, and whether it is the constant 0."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

MM = {aten.mm.default, aten.addmm.default}
BMM = {aten.bmm.default, aten.baddbmm.default}
CONV = {aten.convolution.default}
PRODUCTS = MM | BMM | CONV
VIEWS = {aten.view.default, aten.alias.default, aten.detach.default, aten._unsafe_view.default, aten.reshape.default}
CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}


def is_torchs_own(n: fx.Node) -> bool:
    """Whether an op is torch's, so that its name says what it computes; anyone may call an op of theirs `backward`."""
    return getattr(n.target, "namespace", "") in ("aten", "prims")


def is_zero(arg: Any) -> bool:
    """Whether an argument is the constant 0."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, int | float) and arg == 0
    if arg.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if arg.target in (aten.clone.default, aten._to_copy.default, aten.permute.default, aten.unsqueeze.default):
        return is_zero(arg.args[0])
    if arg.target is aten.scalar_tensor.default:
        return bool(arg.args[0] == 0)
    if arg.target in (aten.expand.default, prims.convert_element_type.default, *VIEWS):
        return is_zero(arg.args[0])
    if arg.target is aten.new_full.default:
        return bool(arg.args[2] == 0)
    return arg.target in (aten.full.default, aten.full_like.default) and bool(arg.args[1] == 0)


def op_name(n: fx.Node) -> str:
    return str(n.target).removeprefix("aten.").removeprefix("prims.").split(".")[0]


def window_of(arguments: Sequence[Any], dims: int) -> list[list[int]]:
    """Stride, padding and dilation of a convolution, each by spatial dim: torch takes one number for all of them, too."""
    return [list(v) * dims if len(v) == 1 else list(v) for v in arguments]


PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}


def users_of_output(m: fx.Node, index: int) -> Iterator[fx.Node]:
    """The getitem nodes that take one output of a node with several."""
    for u in m.users:
        if u.target is operator.getitem and u.args[1] == index:
            yield u
