"""AOTAutograd: which nodes belong to the backward pass, what the inputs and outputs of its graphs stand for, and which buffers compiled code may overwrite."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from approx_compile._torch.autograd_engine import function_of
from approx_compile._torch.fake_tensors import tree_leaves
from approx_compile.reasons import Reason


def has_backward(graph: fx.Graph) -> bool:
    """Return whether a joint graph has nodes of the backward pass."""
    return any(is_backward(n) for n in graph.nodes if n.op == "call_function")


def is_backward(n: fx.Node) -> bool:
    """Return whether a node of a joint graph belongs to the backward pass."""
    return n.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def keep_in_backward(node: fx.Node) -> None:
    """Forbid the partitioner to move a node of the backward pass to the forward pass.

    It could, where the node needs no tangent. A node that draws random numbers would then draw them in both passes.

    Args:
        node: The node.
    """
    node.meta["partitioner_tag"] = "must_be_in_backward"


def must_save(node: fx.Node) -> None:
    """Forbid the partitioner to recompute a node in the backward pass.

    Args:
        node: The node.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    if node.target is operator.getitem:  # of which the partitioner asks no more than whether the node that makes the tuple may run again
        assert isinstance(node.args[0], fx.Node)
        node.args[0].meta["recompute"] = CheckpointPolicy.MUST_SAVE


_PROVENANCE_KEYS = ("partitioner_tag", "seq_nr", "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "recompute", "ac_graph_id")


def copy_provenance(source: fx.Node, target: fx.Node) -> None:
    """Give an inserted node the tag, layer, stack trace and checkpoint policy of the node that it serves.

    Args:
        source: The node that is served.
        target: The inserted node.
    """
    for key in _PROVENANCE_KEYS:
        if key in source.meta:
            target.meta[key] = source.meta[key]
        else:
            target.meta.pop(key, None)


def input_index(n: fx.Node) -> int | None:
    """Return which input of the backend a placeholder of the joint graph is.

    Args:
        n: The placeholder.

    Returns:
        The input's position; None for tangents and for inputs that AOTAutograd has made.
    """
    desc = n.meta.get("desc")
    index = getattr(desc, "idx", None)
    return index if isinstance(index, int) and type(desc).__name__ == "PlainAOTInput" else None


def is_graph_module_state(n: fx.Node) -> bool:
    """Return whether a placeholder is a parameter or buffer of the graph module itself, as where Dynamo does not inline modules."""
    return type(n.meta.get("desc")).__name__ in ("ParamAOTInput", "BufferAOTInput")


def is_tangent(n: fx.Node) -> bool:
    """Return whether a node is a placeholder of a backward graph for the gradient of an output."""
    return n.op == "placeholder" and "tangents" in n.name


def outputs_by_description(output: fx.Node) -> dict[str, fx.Node]:
    """Map AOTAutograd's descriptions of a graph's outputs to the outputs.

    Args:
        output: The graph's output node.

    Returns:
        The outputs by the text of their descriptions.
    """
    described = output.meta.get("desc") or ()
    return {repr(d): n for d, n in zip(described, output.args[0], strict=False) if isinstance(n, fx.Node)}  # type: ignore[arg-type]


def gradient_outputs(graph: fx.Graph) -> dict[int, fx.Node]:
    """Map the inputs of the backend to the outputs of a joint or backward graph that are their gradients.

    Args:
        graph: The graph.

    Returns:
        The gradients by the position of the input; without those of inputs that AOTAutograd has made.
    """
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    described = zip(output.meta.get("desc") or (), tree_leaves(output.args[0]), strict=False)
    of = [(getattr(d, "grad_of", None), n) for d, n in described]
    return {d.idx: n for d, n in of if d is not None and type(d).__name__ == "PlainAOTInput" and isinstance(n, fx.Node)}


def tangent_output_description(n: fx.Node) -> str | None:
    """Return the description of the output whose gradient a placeholder of a backward graph is; None for other placeholders."""
    output = getattr(n.meta.get("desc"), "output", None)
    return repr(output) if output is not None else None


EXACT_MARK_KEY = "approx_compile"


def mark_exact(node: fx.Node, reason: Reason) -> None:
    """Mark a node of Dynamo's graph as one to be computed exactly. AOTAutograd carries the mark into the joint graph.

    Args:
        node: The node.
        reason: Why, for reports.
    """
    node.meta["custom"] = {**(node.meta.get("custom") or {}), EXACT_MARK_KEY: reason}


def exact_mark(node: fx.Node) -> Reason | None:
    """Return the reason with which `mark_exact` has marked a node, None without one."""
    reason = (node.meta.get("custom") or {}).get(EXACT_MARK_KEY)
    return reason if isinstance(reason, Reason) else None


def _forward_metadata() -> Any:
    """AOTAutograd's metadata of the graph being compiled, None outside of a compilation."""
    context = torch._guards.TracingContext.try_get()
    return getattr(context, "fw_metadata", None)


def donated_placeholders(gm: fx.GraphModule) -> set[str]:
    """Return the names of the placeholders of a backward graph whose memory the compiled code may overwrite."""
    indices = getattr(_forward_metadata(), "bw_donated_idxs", None) or []
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return {placeholders[i] for i in indices}


def clear_donated_inputs() -> None:
    """Tell AOTAutograd that the backward graph being compiled overwrites none of its inputs.

    A backward graph that does refuses to run with `retain_graph=True`.
    """
    indices = getattr(_forward_metadata(), "bw_donated_idxs", None)
    if indices:
        indices.clear()  # in place, as several objects hold the same list


@contextlib.contextmanager
def donate_inputs(indices: Sequence[int]) -> Iterator[None]:
    """Let a graph that is compiled inside the block overwrite some of its inputs.

    Args:
        indices: Positions of these inputs.

    Yields:
        Nothing.
    """
    meta = _forward_metadata()
    if meta is None:
        yield
        return
    before = meta.bw_donated_idxs
    meta.bw_donated_idxs = list(indices)
    try:
        yield
    finally:
        meta.bw_donated_idxs = before


def drop_dynamic_marks() -> None:
    """Keep the compiled function from marking the tensors that it returns and saves as tensors of dynamic size.

    The user's inputs may be among these tensors, and the user has not asked for symbolic sizes: this package has.
    """
    meta = _forward_metadata()
    if meta is None:
        return
    meta.dynamic_outputs = False
    if hasattr(meta, "dynamic_saved_tensors_idxs"):
        meta.dynamic_saved_tensors_idxs = {}


def first_call_is_fake() -> bool:
    """Return whether the first call of the compiled function will have fake tensors, as DDPOptimizer does it."""
    return bool(getattr(torch._guards.TracingContext.try_get(), "fakify_first_call", False))


def activation_memory_budget() -> float:
    """Return AOTAutograd's memory budget for activations: 1 recomputes nothing more than needed, 0 as much as possible."""
    return float(torch._functorch.config.activation_memory_budget)


def is_compiled(node: Any) -> bool:
    """Return whether a node of the autograd graph is the backward pass of a compiled graph."""
    return hasattr(function_of(node), "_lazy_backward_info")


def compiled_nodes(output: torch.Tensor) -> Iterator[Any]:
    """Find the backward nodes of the compiled graphs that have made a tensor.

    Args:
        output: An output of a compiled function, or a view of one.

    Yields:
        The nodes of the autograd graph.
    """
    pending: list[Any] = [output.grad_fn]
    while pending:
        node = pending.pop()
        if is_compiled(node):
            yield node
        elif node is not None and function_of(node) is None and len(node.next_functions) == 1:  # a view of an output of the graph
            pending.append(node.next_functions[0][0])


def backward_graph(node: Any) -> fx.GraphModule | None:
    """Return the graph of a compiled backward node, which compiled autograd would trace; None for another node, or where torch can't restore the graph.

    Args:
        node: A node of the autograd graph.
    """
    info: Any = getattr(function_of(node), "_lazy_backward_info", None)
    graph = getattr(info, "bw_module", None)
    if graph is None and hasattr(info, "bw_module_fn"):  # compiled code that comes from a cache
        with contextlib.suppress(Exception):
            graph = info.bw_module_fn()
    return graph if isinstance(graph, fx.GraphModule) else None


def compiled_backward(node: Any) -> Any:
    """Return what AOTAutograd calls for the backward pass of a compiled node; None before its compilation."""
    return getattr(function_of(node), "compiled_bw", None)
