"""Helpers for reading and editing nodes of a joint graph, which the passes and the analysis of rows share.

Here are the sets of ops that the passes distinguish, predicates on single nodes, walks along chains of views, and the update of a node's fake value.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from approx_compile import _torch

aten = torch.ops.aten
prims = torch.ops.prims

MM = {aten.mm.default, aten.addmm.default}
BMM = {aten.bmm.default, aten.baddbmm.default}
CONV = {aten.convolution.default}
PRODUCTS = MM | BMM | CONV
VIEWS = {aten.view.default, aten.alias.default, aten.detach.default, aten._unsafe_view.default, aten.reshape.default}
"""Ops that keep the order of a tensor's entries, whatever its shape; permutations do not."""
PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}
CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module whose graph is to be edited. The copy shares its constants: `copy.deepcopy` fails where one is a fake tensor."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    new.meta.update(gm.meta)
    return new


# --- predicates ---


def is_torch_op(n: fx.Node) -> bool:
    """Return whether a node calls an op of torch itself.

    Only the names of these ops say what they compute: anyone may call an op of a library of their own `backward`.
    """
    return getattr(n.target, "namespace", "") in ("aten", "prims")


ZERO_KEY = "approx_compile_zero"
"""Key in the meta of a placeholder of a backward graph: the forward pass has saved a tensor of zeros there."""


def is_zero(arg: Any) -> bool:
    """Return whether an argument of a node is the constant 0, or a tensor made of it, through views, copies and casts."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, int | float) and arg == 0
    if ZERO_KEY in arg.meta or arg.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
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


def has_fixed_sizes(n: fx.Node, batch_dim: int = 0) -> bool:
    """Return whether all sizes of a tensor are plain integers, not counting that of `batch_dim`."""
    return all(isinstance(s, int) for d, s in enumerate(_torch.value(n).shape) if d != batch_dim)


# --- arguments and outputs ---


def op_name(n: fx.Node) -> str:
    """Return the name of a node's op without overload, such as "mul" for `aten.mul.Tensor`; an op that is not torch's own keeps its namespace."""
    first, *rest = str(n.target).split(".")
    if is_torch_op(n):
        return rest[0]
    return f"{first}.{rest[0]}" if hasattr(n.target, "namespace") and rest else first


def window_of(arguments: Sequence[Any], dims: int) -> list[list[int]]:
    """Return stride, padding and dilation of a convolution with one number for every spatial dim.

    Args:
        arguments: The three arguments as the node has them; torch also takes a single number for all dims.
        dims: The number of spatial dims.
    """
    return [list(v) * dims if len(v) == 1 else list(v) for v in arguments]


def users_of_output(m: fx.Node, index: int) -> Iterator[fx.Node]:
    """Yield the `getitem` nodes that take output `index` of a node with several outputs."""
    for u in m.users:
        if u.target is operator.getitem and u.args[1] == index:
            yield u


# --- chains of views ---


def source_behind(n: Any, through: Collection[Any] = VIEWS) -> Any:
    """Return what a chain of views was made from.

    Args:
        n: A node, or any other argument of a node, which is returned as it is.
        through: The ops to walk through; each reads its tensor as the first argument.
    """
    while isinstance(n, fx.Node) and n.target in through:
        n = n.args[0]
    return n


def last_view(n: fx.Node, forward_only: bool = False) -> fx.Node:
    """Return the end of the chain of views that starts at `n`, as long as every node of the chain has the next one as its only user.

    Args:
        n: The node to start from.
        forward_only: Count users in the forward pass only.
    """
    while True:
        users = [u for u in n.users if not (forward_only and _torch.is_backward(u))]
        if len(users) != 1 or users[0].target not in VIEWS:
            return n
        n = users[0]


def users_behind_views(n: fx.Node) -> Iterator[fx.Node]:
    """Yield the users of a node, the views among them included, and the users of these views."""
    for u in n.users:
        yield u
        if u.target in VIEWS:
            yield from users_behind_views(u)


# --- edits ---


def update_fake_value(node: fx.Node) -> None:
    """Recompute a node's fake value after its target or its arguments changed."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[misc]
    with _torch.fake_mode_of(node):
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
