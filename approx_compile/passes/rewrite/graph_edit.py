"""How a graph is edited: pieces traced from readable torch are spliced in, outputs of a node with several are replaced, fake values refreshed."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.estimators import Estimator
from approx_compile.passes.fx_utils import CONV, users_of_output
from approx_compile.passes.sites.site import Product

CHOICE = "approx_compile_choice"
"""Key in the meta of the nodes that hold a selection's indices and scale: `site.product.idx`, `site.product.scale`."""


BY_SAMPLE = "approx_compile_by_sample"
"""Key in the meta of the nodes that turn a gradient into a replacement sample by sample: scaling one sample's gradient scales its part of the result, though
single nodes (the choice of the largest entries) are not linear."""


class Sampled(NamedTuple):
    """The nodes a sampled output leaves for its coupled gradients. `narrow`: of a gradient whose dropped entries are zero, the kept ones alone, where there is
    a node of them. `whole`: the operands are not cut to the kept entries, a kernel of ours read them as they are."""

    how: Estimator
    idx: fx.Node
    scale: fx.Node | None
    operands: tuple[fx.Node, fx.Node]
    narrow: Mapping[fx.Node, fx.Node] = MappingProxyType({})
    whole: bool = False


def keep_choice(node: fx.Node, name: str) -> None:
    """Name a node of a selection; it is saved, for a choice that is made again in the backward pass might be another one."""
    _torch.must_save(node)
    node.meta[CHOICE] = name


class Layout(NamedTuple):
    """How a value lies in memory (strides that are symbols as traced)."""

    strides: tuple[int, ...]
    contiguous: bool

    @staticmethod
    def of(x: Any) -> Layout:
        return Layout(tuple(_torch.hint(s) for s in x.stride()), x.is_contiguous())


def like(x: torch.Tensor, old: Layout) -> torch.Tensor:
    """The strides that the graph expects, where gathering changed them."""
    same = all(a == b for a, b, n in zip(Layout.of(x).strides, old.strides, x.shape, strict=True) if _torch.hint(n) > 1)
    return x if same else x.clone(memory_format=torch.contiguous_format) if old.contiguous else x


def output_of(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    with graph.inserting_after(call):
        item = graph.call_function(operator.getitem, (call, index))
    _torch.copy_provenance(call, item)
    item.meta["val"] = _torch.value(call)[index]
    return item


def as_it_is(product: Product) -> Product:
    """A product with the operands that its node has by now: what it read may have been the result of another site, which another node gives since."""
    args = product.node.args
    at = ((0, 2), (1, 0))[product.mask] if product.mask >= 0 else (0, 1) if product.node.target in CONV else (-2, -1)
    first, second = (args[i] for i in at)
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return dataclasses.replace(product, operands=(first, second))


def replace_output(graph: fx.Graph, m: fx.Node, index: int, new: fx.Node) -> None:
    for user in list(users_of_output(m, index)):
        user.replace_all_uses_with(new)
        graph.erase_node(user)


def hoist(n: fx.Node, before: fx.Node) -> None:
    """Move a node, and what it is made of, in front of another."""
    if before < n:
        for i in n.all_input_nodes:
            hoist(i, before)
        before.prepend(n)


_pieces: weakref.WeakKeyDictionary[fx.Graph, dict[Any, fx.Graph]] = weakref.WeakKeyDictionary()
"""What has been traced for a graph."""


def _key(run: Callable[..., Any], values: Sequence[Any]) -> tuple[Any, ...] | None:
    """What decides how `run` is traced: its code, what it closes over, the layouts of its operands. None where these are not known by value."""
    if not isinstance(run, FunctionType) or run.__defaults__ or run.__kwdefaults__:
        return None
    closed = tuple(c.cell_contents for c in run.__closure__ or ())
    layouts = tuple(None if v is None else (tuple(v.shape), v.stride(), v.dtype, v.device) for v in values)
    if not _plain(closed) or any(not isinstance(s, int) for v in layouts if v is not None for s in (*v[0], *v[1])):
        return None
    return (run.__code__, repr(closed), layouts)  # as text, 1, 1.0 and True differ


def _plain(value: Any) -> bool:
    """Whether equal values are interchangeable and never change: numbers, names, tuples and frozen dataclasses of such."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return value.__dataclass_params__.frozen and all(_plain(getattr(value, f.name)) for f in dataclasses.fields(value))  # type: ignore[attr-defined]
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def inline(
    graph: fx.Graph, before: fx.Node, run: Callable[..., Any], args: Sequence[fx.Node | None], like: fx.Node | None = None, by_sample: bool = False
) -> Any:
    """Trace `run` on the fake values of `args`, splice it in before `before`, return its results as nodes.

    The new nodes take tag, layer and checkpoint policy from `like` (by default `before`, whose operands they are). What closes over plain values only is
    traced once in a graph for operands of the same sizes, strides and dtypes. `by_sample` says that the result scales with each sample's gradient.
    """
    values = [_torch.value(a) if a is not None else None for a in args]
    key = _key(run, values)
    traced = _pieces.setdefault(graph, {}).get(key)
    if traced is None:
        with _torch.fake_mode_of(*(a for a in args if a is not None)):
            traced = _torch.trace_to_aten(run, values)
        if key is not None:
            _pieces[graph][key] = traced
    new: dict[fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), args, strict=True))
    with graph.inserting_before(before):
        for n in traced.nodes:
            if n.op == "call_function":
                new[n] = graph.node_copy(n, lambda x: new[x])
                _torch.copy_provenance(like or before, new[n])
                if by_sample:
                    new[n].meta[BY_SAMPLE] = True
                if _torch.is_random(n) and _torch.is_backward(new[n]):
                    _torch.keep_in_backward(new[n])
    return fx.node.map_arg(traced.output_node().args[0], lambda n: new[n])
