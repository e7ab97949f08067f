"""Move a ReLU's backward pass in front of the backward pass of the max pooling behind it.

    where(r <= 0, 0, unpool(g)) = unpool(where(pool(r) <= 0, 0, g)),    r a ReLU's output, g the gradient of pool(r)

A window's gradient goes to its largest entry, which is the pooled value, so both sides have the same mask. The right side reads its mask from the pooled
tensor, which the layer above saves in any case. The mask of r, which is several times as large, need not be computed and saved: Inductor's C++ code stores
a mask of bools about 20 times slower than floats.

This exact rewrite runs before sites are found. No value changes.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import CASTS, VIEWS, is_zero, last_view
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, inline, match_layout

aten = torch.ops.aten
_RESHAPES = {*VIEWS, aten.clone.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
_RESHAPES_AND_CASTS = _RESHAPES | CASTS
_UNPOOLINGS = {aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default}


class _Match(NamedTuple):
    """The nodes of one place where the rewrite applies.

    Attributes:
        where: The masked gradient of the ReLU's output r.
        gradient: The gradient of pool(r).
        reader: The node of the pooling's backward pass that reads `gradient`.
        pooled: pool(r), or the view of it that is saved.
    """

    where: fx.Node
    gradient: fx.Node
    reader: fx.Node
    pooled: fx.Node


def move_relu_mask_before_unpooling(graph: fx.Graph) -> None:
    """Apply the rewrite wherever a ReLU's output has max pooling as its only reader.

    Args:
        graph: The joint graph, which is edited.
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.where.self)):
        if (match := _find(node)) is not None:
            masked = inline(graph, match.reader, _masked, (match.pooled, match.gradient), match.where)
            match.reader.replace_input_with(match.gradient, masked)
            match.where.replace_all_uses_with(match.where.args[2])  # type: ignore[arg-type]
            graph.erase_node(match.where)


def _masked(pooled: Tensor, gradient: Tensor) -> Tensor:
    pooled = pooled if pooled.shape == gradient.shape else pooled.reshape(gradient.shape)
    return match_layout(torch.where(pooled <= 0, 0, gradient), MemoryLayout.of(gradient))


def _find(where: fx.Node) -> _Match | None:
    """The match that ends in a `where` node, if there is one."""
    mask, zero, unpooled = where.args
    if not (isinstance(mask, fx.Node) and mask.target is aten.le.Scalar and mask.args[1] == 0 and is_zero(zero)):
        return None
    scattered = _only_source(unpooled)
    if scattered is None or not _torch.is_backward(where) or not _same_dtype_and_shape(where, unpooled):
        return None
    indices, values = _indices_and_values(scattered)
    pool = _pooling_of(indices)
    if pool is None or _behind_reshapes(pool.args[0]) is not _behind_reshapes(mask.args[0]) or not _inverts(scattered, values, pool):
        return None
    pooled = next((u for u in pool.users if u.target is operator.getitem and u.args[1] == 0), None)
    return _match_gradient(where, scattered, values, pooled) if pooled is not None else None


def _indices_and_values(n: fx.Node) -> tuple[Any, Any]:
    """The indices at which an op puts values among zeros, and the values; None for an op that does not."""
    if n.target is aten.scatter_add.default and is_zero(n.args[0]):
        return n.args[2], n.args[3]
    return (n.args[7], n.args[0]) if n.target in _UNPOOLINGS else (None, None)


def _inverts(scattered: fx.Node, values: Any, pool: fx.Node) -> bool:
    """Whether values go back to where this pooling took them from: the indices of each image plane into that plane."""
    x, kernel = pool.args[:2]
    assert isinstance(x, fx.Node) and isinstance(kernel, (list, tuple))
    if scattered.target in _UNPOOLINGS:
        return _behind_reshapes(scattered.args[1]) is _behind_reshapes(x) and scattered.args[2] == kernel
    plane = math.prod(_torch.value(x).shape[-(3 if pool.target is aten.max_pool3d_with_indices.default else len(kernel)) :])
    into, rows = _torch.value(scattered), _torch.value(values)
    along_rows = into.dim() == rows.dim() == 2 and scattered.args[1] in (1, -1)
    one_plane_per_row = along_rows and _torch.known_equal(into.shape[1], plane) and _torch.known_equal(into.shape[0], rows.shape[0])
    return one_plane_per_row and _torch.numel(scattered) == _torch.numel(x)


def _same_dtype_and_shape(a: Any, b: Any) -> bool:
    return _torch.value(a).dtype == _torch.value(b).dtype and list(map(str, _torch.value(a).shape)) == list(map(str, _torch.value(b).shape))


def _match_gradient(where: fx.Node, reader: fx.Node, values: Any, pooled: fx.Node) -> _Match | None:
    """Find the gradient in the pooled tensor's own shape, behind reshapes and casts that nothing else reads."""
    shape = _sizes_above_one(pooled)
    while isinstance(values, fx.Node):
        if _sizes_above_one(values) == shape and _torch.value(values).dtype == _torch.value(pooled).dtype:
            return _Match(where, values, reader, last_view(pooled, forward_only=True))
        if values.target not in _RESHAPES_AND_CASTS or len(values.users) > 1:
            return None
        reader, values = values, values.args[0]
    return None


def _only_source(n: Any) -> fx.Node | None:
    """What a chain of reshapes and casts was made from, if nothing else reads any node on the way."""
    while isinstance(n, fx.Node) and len(n.users) == 1:
        if n.target not in _RESHAPES_AND_CASTS:
            return n
        n = n.args[0]
    return None


def _pooling_of(indices: Any) -> fx.Node | None:
    """The max pooling that found these indices."""
    pools, to_indices = _torch.max_pool_ops()
    while isinstance(indices, fx.Node):
        if indices.target in _RESHAPES or indices.target is to_indices:
            indices = indices.args[0]
        elif indices.target is operator.getitem and indices.args[1] == 1:
            pool = indices.args[0]
            return pool if isinstance(pool, fx.Node) and pool.target in pools else None
        else:
            return None
    return None


def _behind_reshapes(n: Any) -> Any:
    """What a node was made from by reshapes that change its sizes by axes of one entry only."""
    while isinstance(n, fx.Node) and n.target in _RESHAPES and _sizes_above_one(n) == _sizes_above_one(n.args[0]):
        n = n.args[0]
    return n


def _sizes_above_one(n: Any) -> list[str]:
    value = n.meta.get("val") if isinstance(n, fx.Node) else None
    return [str(s) for s in value.shape if not (isinstance(s, int) and s == 1)] if isinstance(value, Tensor) else []
