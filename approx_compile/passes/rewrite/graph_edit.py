"""The means of editing a joint graph: splice in pieces traced from readable torch code, replace outputs, move nodes, keep memory layouts.

What is edited is decided elsewhere; see `apply_plan`.
"""

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
from approx_compile.kernels.gather import Axis, take
from approx_compile.passes.fx_utils import CONV, users_of_output
from approx_compile.passes.sites.site import Product, Site

SELECTION_KEY = "approx_compile_choice"
"""Key in the meta of the nodes that hold a selection's indices and scale: `site.product.idx`, `site.product.scale`."""

BY_SAMPLE_KEY = "approx_compile_by_sample"
"""Key in the meta of the nodes that make a replacement from a gradient one sample at a time.

Scaling one sample's gradient scales its part of the result, although single nodes, such as the selection of the largest entries, are not linear.
"""


# --- memory layouts ---


class MemoryLayout(NamedTuple):
    """How a value lies in memory.

    Attributes:
        strides: The strides; symbolic ones as they were traced.
        contiguous: Whether torch calls the value contiguous.
    """

    strides: tuple[int, ...]
    contiguous: bool

    @staticmethod
    def of(x: Any) -> MemoryLayout:
        """Return the layout of a (fake) tensor."""
        return MemoryLayout(tuple(_torch.hint(s) for s in x.stride()), x.is_contiguous())


def match_layout(x: torch.Tensor, old: MemoryLayout) -> torch.Tensor:
    """Return `x` contiguous if the graph expects a contiguous value here and gathering changed the strides, else as it is.

    Args:
        x: The new value.
        old: The layout of the value that it replaces.
    """
    same = all(a == b for a, b, n in zip(MemoryLayout.of(x).strides, old.strides, x.shape, strict=True) if _torch.hint(n) > 1)
    return x if same else x.clone(memory_format=torch.contiguous_format) if old.contiguous else x


# --- selections and the operands they leave ---


class SampledOperands(NamedTuple):
    """The nodes of a sampled product that its coupled gradients read.

    Attributes:
        estimator: How the product is sampled.
        idx: The kept indices.
        scale: The weights of the kept entries, or None if they are all 1.
        operands: The product's operands, cut to the kept entries.
        narrow_gradients: Maps a full-size gradient whose dropped entries are zero to the node of its kept entries, where there is one.
        whole: The operands are not cut, because a custom kernel reads them whole.
    """

    estimator: Estimator
    idx: fx.Node
    scale: fx.Node | None
    operands: tuple[fx.Node, fx.Node]
    narrow_gradients: Mapping[fx.Node, fx.Node] = MappingProxyType({})
    whole: bool = False


def save_selection(node: fx.Node, name: str) -> None:
    """Name a node of a selection and save it for the backward pass, where a recomputed random selection might differ.

    Args:
        node: The node of the indices or of the scale.
        name: `site.product.idx` or `site.product.scale`.
    """
    _torch.must_save(node)
    node.meta[SELECTION_KEY] = name


def save_selection_of(site: Site, product: Product, idx: fx.Node, scale: fx.Node | None) -> None:
    """Name and save both nodes of a product's selection."""
    for node, name in ((idx, "idx"), (scale, "scale")):
        if node is not None:
            save_selection(node, f"{site.name}.{product.name}.{name}")


def take_kept(graph: fx.Graph, before: fx.Node, x: fx.Node, axis: Axis, sampled: SampledOperands) -> fx.Node:
    """Return the kept entries of `x` along an axis, without their scale; they are gathered unless a node of them exists.

    Args:
        graph: The joint graph, which is edited.
        before: Where the gather is inserted.
        x: The full-size value.
        axis: The axis of `x` that the selection counts along.
        sampled: The selection.
    """
    if x in sampled.narrow_gradients:
        return sampled.narrow_gradients[x]
    unit = sampled.estimator.unit
    new = inline(graph, before, lambda x, idx: take(x, axis, idx, None, unit), (x, sampled.idx))
    assert isinstance(new, fx.Node)
    return new


def with_current_operands(product: Product) -> Product:
    """Return a product with the operands that its node has now; edits of other sites may have replaced the nodes that it read when it was found."""
    args = product.node.args
    at = ((0, 2), (1, 0))[product.mask] if product.mask >= 0 else (0, 1) if product.node.target in CONV else (-2, -1)
    first, second = (args[i] for i in at)
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return dataclasses.replace(product, operands=(first, second))


# --- single edits ---


def take_output(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    """Insert and return the `getitem` node for output `index` of a node with several outputs."""
    with graph.inserting_after(call):
        item = graph.call_function(operator.getitem, (call, index))
    _torch.copy_provenance(call, item)
    item.meta["val"] = _torch.value(call)[index]
    return item


def replace_output(graph: fx.Graph, m: fx.Node, index: int, new: fx.Node) -> None:
    """Give all readers of output `index` of a node with several outputs another node to read.

    Args:
        graph: The joint graph, which is edited.
        m: The node with several outputs.
        index: Which output to replace; its `getitem` nodes are erased.
        new: What is read instead.
    """
    for user in list(users_of_output(m, index)):
        user.replace_all_uses_with(new)
        graph.erase_node(user)


def move_before(n: fx.Node, before: fx.Node) -> None:
    """Move a node in front of another one, together with those of its inputs that come later."""
    if before < n:
        for i in n.all_input_nodes:
            move_before(i, before)
        before.prepend(n)


# --- splicing traced code ---

_traced_pieces: weakref.WeakKeyDictionary[fx.Graph, dict[Any, fx.Graph]] = weakref.WeakKeyDictionary()
"""Per joint graph: the pieces traced so far, by `_trace_key`."""


def _trace_key(run: Callable[..., Any], values: Sequence[Any]) -> tuple[Any, ...] | None:
    """Everything that decides what tracing `run` gives: its code, the values it closes over, the layouts of its operands.

    None if a value that `run` closes over may change, or if a size or stride is a symbol: such pieces are traced each time.
    """
    if not isinstance(run, FunctionType) or run.__defaults__ or run.__kwdefaults__:
        return None
    closed = tuple(c.cell_contents for c in run.__closure__ or ())
    layouts = tuple(None if v is None else (tuple(v.shape), v.stride(), v.dtype, v.device) for v in values)
    if not _is_constant(closed) or any(not isinstance(s, int) for v in layouts if v is not None for s in (*v[0], *v[1])):
        return None
    return (run.__code__, repr(closed), layouts)  # repr, because 1, 1.0 and True are equal as keys


def _is_constant(value: Any) -> bool:
    """Whether a value never changes and equal ones are interchangeable: numbers, strings, dtypes, and tuples and frozen dataclasses of such."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        frozen: bool = value.__dataclass_params__.frozen  # type: ignore[attr-defined]
        return frozen and all(_is_constant(getattr(value, f.name)) for f in dataclasses.fields(value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def inline(
    graph: fx.Graph, before: fx.Node, run: Callable[..., Any], args: Sequence[fx.Node | None], like: fx.Node | None = None, by_sample: bool = False
) -> Any:
    """Trace a function on the fake values of nodes and splice its ops into the graph.

    A function that closes over constants only is traced once per graph and operand layout.

    Args:
        graph: The joint graph, which is edited.
        before: The node before which the new nodes are inserted.
        run: The function; it gets one tensor per node of `args`, None for None.
        args: The nodes that `run` is applied to.
        like: The node whose backward tag, module stack and checkpoint policy the new nodes get; `before` if it is None.
        by_sample: Mark the new nodes as working on each sample by itself (see `BY_SAMPLE_KEY`).

    Returns:
        What `run` returns, with nodes in place of tensors.
    """
    values = [_torch.value(a) if a is not None else None for a in args]
    key = _trace_key(run, values)
    traced = _traced_pieces.setdefault(graph, {}).get(key)
    if traced is None:
        with _torch.fake_mode_of(*(a for a in args if a is not None)):
            traced = _torch.trace_to_aten(run, values)
        if key is not None:
            _traced_pieces[graph][key] = traced
    new: dict[fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), args, strict=True))
    with graph.inserting_before(before):
        for n in traced.nodes:
            if n.op == "call_function":
                new[n] = graph.node_copy(n, lambda x: new[x])
                _torch.copy_provenance(like or before, new[n])
                if by_sample:
                    new[n].meta[BY_SAMPLE_KEY] = True
                if _torch.is_random(n) and _torch.is_backward(new[n]):
                    _torch.keep_in_backward(new[n])
    return fx.node.map_arg(traced.output_node().args[0], lambda n: new[n])
