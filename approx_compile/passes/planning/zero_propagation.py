"""Find where the backward pass is zero because a site dropped entries of its activation.

A coupled gradient of an activation is zero in the channels that its site dropped. Elementwise backward ops, those of BatchNorm included, carry these zeros
on to the output gradient dY of the site that made the activation. The gradient products of that site then only add, or compute, zeros in these channels.
Leaving them out changes nothing but the order of summation, in chains such as conv-BatchNorm-ReLU-conv or linear-GELU-linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import VIEWS, is_zero, last_view, source_behind

aten = torch.ops.aten
prims = torch.ops.prims

UNARY = {aten.neg.default, aten.clone.default, aten._to_copy.default, prims.convert_element_type.default, aten.abs.default, aten.contiguous.default}
SUMS = {aten.sum.dim_IntList, aten.mean.dim}


def propagate_zeros(starts: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Find the nodes that are zero wherever all of the start nodes are, each along one of its dims.

    A factor that is inf or NaN in these entries is not considered.

    Args:
        starts: Nodes with the dim along which they have zeros, in the same entries.

    Returns:
        The nodes, including the start nodes, each with the dim along which it has these zeros.
    """
    zero = dict(starts)
    n = min(starts).next
    while n.op != "root":
        if n.op == "call_function" and n not in starts and any(i in zero for i in n.all_input_nodes):
            dim = propagate_through(n, zero)
            if dim is not None:
                zero[n] = dim
        n = n.next
    return zero


def propagate_through(n: fx.Node, zero: dict[fx.Node, int]) -> int | None:
    """Return the dim along which a node has the zeros of its inputs, or None if it does not have them.

    Args:
        n: The node.
        zero: The nodes before it that have the zeros, with their dims.
    """
    value = n.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    first = n.args[0] if n.args else None
    if n.target in UNARY or n.target is aten.alias.default or n.target is aten.detach.default:
        return zero.get(first)  # type: ignore[arg-type]
    if n.target is aten.permute.default and first in zero:
        order: list[int] = [int(d) % value.dim() for d in n.args[1]]  # type: ignore[arg-type,union-attr]
        return order.index(zero[first])  # type: ignore[index]
    if n.target in VIEWS and first in zero:
        return _viewed(_torch.value(first).shape, value.shape, zero[first])  # type: ignore[index]
    if n.target in (aten.unsqueeze.default, aten.expand.default, aten.squeeze.dims) and first in zero:
        return _viewed(_torch.value(first).shape, value.shape, zero[first])  # type: ignore[index]
    if n.target in (aten.mul.Tensor, aten.mul.Scalar):
        return next((d for a in n.args if (d := _broadcast(a, value, zero)) is not None), None)
    if n.target in (aten.div.Tensor, aten.div.Scalar):
        return _broadcast(first, value, zero)
    if n.target in (aten.add.Tensor, aten.sub.Tensor):
        return _all_of(n.args[:2], value, zero)
    if n.target is aten.where.self:
        return _all_of([a for a in n.args[1:] if not is_zero(a)], value, zero)
    if n.target in SUMS and first in zero:
        return _summed(n, zero[first])  # type: ignore[index]
    return None


def _broadcast(arg: Any, result: torch.Tensor, zero: dict[fx.Node, int]) -> int | None:
    """The dim of an argument's zeros, counted in the result that it is broadcast to."""
    if not isinstance(arg, fx.Node) or arg not in zero:
        return None
    return int(zero[arg] + result.dim() - _torch.value(arg).dim())


def _all_of(args: Any, result: torch.Tensor, zero: dict[fx.Node, int]) -> int | None:
    """The dim of the zeros if all arguments have them along the same dim."""
    dims = {_broadcast(a, result, zero) for a in args}
    return dims.pop() if len(dims) == 1 else None


def _viewed(old: Any, new: Any, dim: int) -> int | None:
    """The dim of the new shape that corresponds to a dim of the old one: it has the same length and as many entries behind it."""
    behind = math.prod(old[dim + 1 :])
    for j in range(len(new)):
        if _same(new[j], old[dim]) and _same(math.prod(new[j + 1 :]), behind) and _same(math.prod(new), math.prod(old)):
            return j
    if len(new) >= len(old) and all(_same(a, b) or _same(a, 1) for a, b in zip(reversed(old), reversed(new), strict=False)):
        j = dim + len(new) - len(old)  # an expand that leaves this dim alone
        return j if _same(new[j], old[dim]) else None
    return None


_same = _torch.known_equal


def _summed(n: fx.Node, dim: int) -> int | None:
    """The dim after a sum or mean, if that does not reduce it."""
    source = _torch.value(n.args[0])
    dims = n.args[1] if len(n.args) > 1 and n.args[1] else range(source.dim())
    gone = {int(d) % source.dim() for d in dims}  # type: ignore[union-attr,arg-type]
    if dim in gone:
        return None
    keepdim = len(n.args) > 2 and bool(n.args[2])
    return dim if keepdim else dim - sum(d < dim for d in gone)


def find_relu_backward(grad: fx.Node, activation: fx.Node) -> fx.Node | None:
    """Find the backward node of a ReLU, where(activation <= 0, 0, grad), if it is the only reader of a gradient.

    Args:
        grad: The gradient; it may be read through views.
        activation: The output of the ReLU, or what was pooled from it; the node may compare a view of it.

    Returns:
        The node, or None.
    """
    v = last_view(grad)
    if len(v.users) != 1:
        return None
    user = next(iter(v.users))
    if user.target is not aten.where.self or user.args[2] is not v:
        return None
    le, filler = user.args[0], user.args[1]
    fills_zeros = isinstance(filler, fx.Node) and filler.target in (aten.scalar_tensor.default, aten.full.default) and 0 in filler.args
    if not (fills_zeros and isinstance(le, fx.Node) and le.target is aten.le.Scalar and le.args[1] == 0):
        return None
    return user if source_behind(le.args[0]) is source_behind(activation) else None
