"""An exact rewrite that comes before all decisions: a ReLU's backward pass behind max pooling moves in front of it.

    where(r <= 0, 0, unpool(g)) = unpool(where(pool(r) <= 0, 0, g)),    r a ReLU's output, g the gradient of pool(r)

A window's gradient goes to its largest entry, which is the pooled one: both have the same mask. So the mask of r, several times as large, need not be made
and saved (Inductor's C++ code stores one of bools some 20 times slower than floats), and that of pool(r) is read off what the layer above saves anyway.
No value changes.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import CASTS, VIEWS, is_zero
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, inline, match_layout

aten = torch.ops.aten
_SAME = {*VIEWS, aten.clone.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
_THROUGH = _SAME | CASTS
_BACKWARD = {aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default}


class _Masked(NamedTuple):
    """`where`: the masked gradient of a ReLU's output r; `gradient`: that of pool(r), which `reader` puts in its places; `pooled`: pool(r), or a view of it."""

    where: fx.Node
    gradient: fx.Node
    reader: fx.Node
    pooled: fx.Node


def move_relu_mask_before_unpooling(graph: fx.Graph) -> None:
    """Edit a joint graph as said above, wherever a ReLU's output goes to nothing but max pooling."""
    for node in list(graph.find_nodes(op="call_function", target=aten.where.self)):
        if (found := _find(node)) is not None:
            masked = inline(graph, found.reader, _masked, (found.pooled, found.gradient), found.where)
            found.reader.replace_input_with(found.gradient, masked)
            found.where.replace_all_uses_with(found.where.args[2])  # type: ignore[arg-type]
            graph.erase_node(found.where)


def _masked(pooled: Tensor, gradient: Tensor) -> Tensor:
    same = pooled if pooled.shape == gradient.shape else pooled.reshape(gradient.shape)
    return match_layout(torch.where(same <= 0, 0, gradient), MemoryLayout.of(gradient))


def _find(where: fx.Node) -> _Masked | None:
    mask, zero, unpooled = where.args
    if not (isinstance(mask, fx.Node) and mask.target is aten.le.Scalar and mask.args[1] == 0 and is_zero(zero)):
        return None
    scattered = _alone(unpooled)
    if scattered is None or not _torch.is_backward(where) or not _alike(where, unpooled):
        return None
    places, source = _scattered(scattered)
    pool = _pool_of(places)
    if pool is None or _plain(pool.args[0]) is not _plain(mask.args[0]) or not _undoes(scattered, source, pool):
        return None
    pooled = next((u for u in pool.users if u.target is operator.getitem and u.args[1] == 0), None)
    return _gradient(where, scattered, source, pooled) if pooled is not None else None


def _scattered(n: fx.Node) -> tuple[Any, Any]:
    """Places and values that an op puts among zeros; None for another op."""
    if n.target is aten.scatter_add.default and is_zero(n.args[0]):
        return n.args[2], n.args[3]
    return (n.args[7], n.args[0]) if n.target in _BACKWARD else (None, None)


def _undoes(scattered: fx.Node, source: Any, pool: fx.Node) -> bool:
    """Whether values go back where this pooling took them from: each plane's places into that plane."""
    x, kernel = pool.args[:2]
    assert isinstance(x, fx.Node) and isinstance(kernel, (list, tuple))
    if scattered.target in _BACKWARD:
        return _plain(scattered.args[1]) is _plain(x) and scattered.args[2] == kernel
    plane = math.prod(_torch.value(x).shape[-(3 if pool.target is aten.max_pool3d_with_indices.default else len(kernel)) :])
    into, rows = _torch.value(scattered), _torch.value(source)
    last = into.dim() == rows.dim() == 2 and scattered.args[1] in (1, -1)
    return last and _torch.known_equal(into.shape[1], plane) and _torch.known_equal(into.shape[0], rows.shape[0]) and _torch.numel(scattered) == _torch.numel(x)


def _alike(a: Any, b: Any) -> bool:
    return _torch.value(a).dtype == _torch.value(b).dtype and list(map(str, _torch.value(a).shape)) == list(map(str, _torch.value(b).shape))


def _gradient(where: fx.Node, reader: fx.Node, source: Any, pooled: fx.Node) -> _Masked | None:
    """The gradient of the pooled tensor in its own shape, behind the views and casts that only this backward pass reads."""
    shape = _sizes(pooled)
    while isinstance(source, fx.Node):
        if _sizes(source) == shape and _torch.value(source).dtype == _torch.value(pooled).dtype:
            return _Masked(where, source, reader, _as_read(pooled))
        if source.target not in _THROUGH or len(source.users) > 1:
            return None
        reader, source = source, source.args[0]
    return None


def _as_read(pooled: fx.Node) -> fx.Node:
    """The view of a pooled tensor that the layer above reads, and saves, if that is all that does."""
    while len(others := [u for u in pooled.users if not _torch.is_backward(u)]) == 1 and others[0].target in VIEWS:
        pooled = others[0]
    return pooled


def _alone(n: Any) -> fx.Node | None:
    """What an op behind views and casts makes, if nothing else reads it on the way."""
    while isinstance(n, fx.Node) and len(n.users) == 1:
        if n.target not in _THROUGH:
            return n
        n = n.args[0]
    return None


def _pool_of(places: Any) -> fx.Node | None:
    """The max pooling that found these places."""
    pools, to_places = _torch.max_pool_ops()
    while isinstance(places, fx.Node):
        if places.target in _SAME or places.target is to_places:
            places = places.args[0]
        elif places.target is operator.getitem and places.args[1] == 1:
            pool = places.args[0]
            return pool if isinstance(pool, fx.Node) and pool.target in pools else None
        else:
            return None
    return None


def _plain(n: Any) -> Any:
    """A tensor behind views that leave its sizes as they are, but for axes of one entry."""
    while isinstance(n, fx.Node) and n.target in _SAME and _sizes(n) == _sizes(n.args[0]):
        n = n.args[0]
    return n


def _sizes(n: Any) -> list[str]:
    value = n.meta.get("val") if isinstance(n, fx.Node) else None
    return [str(s) for s in value.shape if not (isinstance(s, int) and s == 1)] if isinstance(value, Tensor) else []
