"""Fake tensors: the values that graphs carry in place of data, the mode they belong to, and tracing with them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def value(n: Any) -> Any:
    """Return the value of a node: a fake tensor, a number or a symbolic size."""
    return n.meta["val"]


def fake_mode_of(*nodes: fx.Node) -> Any:
    """Return the fake mode under which the graph of some nodes was traced.

    Args:
        *nodes: Nodes of one graph.

    Returns:
        The mode.
    """
    from torch._guards import detect_fake_mode

    values = [t for n in nodes for t in torch.utils._pytree.tree_leaves((n.meta.get("val"), [m.meta.get("val") for m in n.all_input_nodes]))]
    mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    assert mode is not None, f"{nodes} have no fake values"
    return mode


def graph_fake_mode(graph: fx.Graph) -> Any:
    """Return the fake mode under which a graph was traced."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([v for m in graph.nodes if isinstance(v := m.meta.get("val"), torch.Tensor)])
    assert mode is not None
    return mode


def fake_scalar(n: fx.Node, dtype: torch.dtype) -> Any:
    """Make a fake tensor without dims on the CPU, in the fake mode of a node's graph.

    Args:
        n: A node of the graph.
        dtype: The tensor's dtype.

    Returns:
        The fake tensor.
    """
    with graph_fake_mode(n.graph):
        return torch.empty((), dtype=dtype, device="cpu")


def fake_like(value: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    """Make a tensor with a given layout, fake if another one is.

    Args:
        value: The other tensor, whose dtype and device the new one has.
        size: The new tensor's size.
        stride: Its strides.
        offset: Its storage offset.

    Returns:
        The tensor, uninitialised.
    """
    from torch._guards import detect_fake_mode

    with torch.no_grad(), detect_fake_mode([value]) or contextlib.nullcontext():
        if not offset:
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset
        return torch.empty(last + 1, dtype=value.dtype, device=value.device).as_strided(size, stride, offset)


def fake_contiguous(value: torch.Tensor) -> torch.Tensor:
    """Make a contiguous tensor of the same size, dtype and device as another one, fake if that is."""
    from torch._guards import detect_fake_mode

    with torch.no_grad(), detect_fake_mode([value]) or contextlib.nullcontext():
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def is_wrapper_subclass(value: Any) -> bool:
    """Return whether a value is a tensor subclass that wraps other tensors, such as DTensor."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def disable_torch_modes() -> contextlib.AbstractContextManager[Any]:
    """Switch off the dispatch modes that are active, such as fake tensors during tracing: tensors made inside the block are real."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def tree_leaves(tree: Any) -> list[Any]:
    """List the leaves of nested tuples, lists, dicts and registered classes."""
    return torch.utils._pytree.tree_leaves(tree)


@functools.cache
def inductor_decompositions() -> Any:
    """Return the table of decompositions that Inductor traces with."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def trace_to_aten(run: Callable[..., Any], values: Sequence[Any]) -> fx.Graph:
    """Trace a function on fake values to a graph of aten ops, decomposed as Inductor does it: Inductor asserts that some ops are gone.

    Args:
        run: The function.
        values: Its arguments, fake tensors and numbers. One value may be given twice: each is an input of its own.

    Returns:
        The graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    apart = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]  # make_fx takes one value that is given twice for one input
    return make_fx(run, decomposition_table=inductor_decompositions())(*apart).graph


def readable_code(graph: fx.Graph) -> str:
    """Return a graph as Python code with shapes in comments."""
    return graph.python_code("self", verbose=True, include_stride=False, include_device=False).src
