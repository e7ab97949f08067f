"""Where the backward pass is zero because an output dropped entries.

A coupled gradient of an activation is zero in the channels its site dropped. Through elementwise backward ops, BatchNorm's included, those zeros
reach the output gradient dY of the site that made the activation: its own gradient products then sum over, or compute, zeros only there.
Leaving them out changes nothing but the order of summation: chains such as conv-BatchNorm-ReLU-conv or linear-GELU-linear get it for free.
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
    """Nodes that are zero along a dim wherever all of `starts` are along theirs: {node: its dim}. A factor that is inf or NaN there is not considered."""
    zero = dict(starts)
    n = min(starts).next
    while n.op != "root":
        if n.op == "call_function" and n not in starts and any(i in zero for i in n.all_input_nodes):
            found = propagate_through(n, zero)
            if found is not None:
                zero[n] = found
        n = n.next
    return zero


def propagate_through(n: fx.Node, zero: dict[fx.Node, int]) -> int | None:
    """The dim along which `n` has its input's zeros, or None."""
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
    """The zero dim of an argument, counted in the broadcast result."""
    if not isinstance(arg, fx.Node) or arg not in zero:
        return None
    return int(zero[arg] + result.dim() - _torch.value(arg).dim())


def _all_of(args: Any, result: torch.Tensor, zero: dict[fx.Node, int]) -> int | None:
    dims = {_broadcast(a, result, zero) for a in args}
    return dims.pop() if len(dims) == 1 else None


def _viewed(old: Any, new: Any, dim: int) -> int | None:
    """Where a dim of the old shape lies in the new one, if it survives whole: same length, same number of entries behind it."""
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
    source = _torch.value(n.args[0])
    dims = n.args[1] if len(n.args) > 1 and n.args[1] else range(source.dim())
    gone = {int(d) % source.dim() for d in dims}  # type: ignore[union-attr,arg-type]
    if dim in gone:
        return None
    keepdim = len(n.args) > 2 and bool(n.args[2])
    return dim if keepdim else dim - sum(d < dim for d in gone)


def relu_backward(grad: fx.Node, activation: fx.Node) -> fx.Node | None:
    """The node where(activation <= 0, 0, grad) that alone reads a gradient, all through views: the activation is a ReLU's output, or pooled from one."""
    v = last_view(grad)
    if len(v.users) != 1:
        return None
    user = next(iter(v.users))
    if user.target is not aten.where.self or user.args[2] is not v:
        return None
    le, zero = user.args[0], user.args[1]
    is_zero = isinstance(zero, fx.Node) and zero.target in (aten.scalar_tensor.default, aten.full.default) and 0 in zero.args
    if not (is_zero and isinstance(le, fx.Node) and le.target is aten.le.Scalar and le.args[1] == 0):
        return None
    return user if source_behind(le.args[0]) is source_behind(activation) else None
