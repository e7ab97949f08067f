"""AOTAutograd: backward tags, descriptors of inputs and outputs, notes on nodes, metadata and donated buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx


def has_backward(graph: fx.Graph) -> bool:
    return any(is_backward(n) for n in graph.nodes if n.op == "call_function")


def is_backward(n: fx.Node) -> bool:
    return n.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def keep_in_backward(node: fx.Node) -> None:
    """Forbid the partitioner to hoist a node of the backward pass that needs no tangent: it would draw a random number in both passes."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def must_save(node: fx.Node) -> None:
    """Forbid the partitioner to recompute a node in the backward pass."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


_PROVENANCE_KEYS = ("partitioner_tag", "seq_nr", "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "recompute", "ac_graph_id")


def copy_provenance(source: fx.Node, target: fx.Node) -> None:
    """Tag, layer, stack trace and checkpoint policy of an inserted node are those of the node it serves."""
    for key in _PROVENANCE_KEYS:
        if key in source.meta:
            target.meta[key] = source.meta[key]
        else:
            target.meta.pop(key, None)


def input_index(n: fx.Node) -> int | None:
    """Which of the backend's inputs a placeholder of the joint graph is; None for tangents and synthetic ones."""
    desc = n.meta.get("desc")
    index = getattr(desc, "idx", None)
    return index if isinstance(index, int) and type(desc).__name__ == "PlainAOTInput" else None


def is_graph_module_state(n: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the graph module itself (Dynamo without inlined modules)."""
    return type(n.meta.get("desc")).__name__ in ("ParamAOTInput", "BufferAOTInput")


def is_tangent(n: fx.Node) -> bool:
    """Whether a placeholder of a backward graph is the gradient of an output."""
    return n.op == "placeholder" and "tangents" in n.name


def outputs_by_description(output: fx.Node) -> dict[str, fx.Node]:
    """A graph's outputs by AOTAutograd's description of each."""
    described = output.meta.get("desc") or ()
    return {repr(d): n for d, n in zip(described, output.args[0], strict=False) if isinstance(n, fx.Node)}  # type: ignore[arg-type]


def tangent_output_description(n: fx.Node) -> str | None:
    """The description of the output that a backward graph's placeholder is the gradient of."""
    output = getattr(n.meta.get("desc"), "output", None)
    return repr(output) if output is not None else None


EXACT_MARK_KEY = "approx_compile"


def mark_exact(node: fx.Node, reason: str) -> None:
    """Leave a note on a node of Dynamo's graph that AOTAutograd carries into the joint graph."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), EXACT_MARK_KEY: reason}


def exact_mark(node: fx.Node) -> str | None:
    reason = (node.meta.get("custom") or {}).get(EXACT_MARK_KEY)
    return reason if isinstance(reason, str) else None


def _forward_metadata() -> Any:
    context = torch._guards.TracingContext.try_get()
    return getattr(context, "fw_metadata", None)


def donated_placeholders(gm: fx.GraphModule) -> set[str]:
    """The placeholders of a backward graph whose memory the compiled code may write to."""
    indices = getattr(_forward_metadata(), "bw_donated_idxs", None) or []
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return {placeholders[i] for i in indices}


def clear_donated_inputs() -> None:
    """Tell AOTAutograd that the backward graph being compiled writes to none of its inputs. What does it refuses to run where the user keeps the graph."""
    indices = getattr(_forward_metadata(), "bw_donated_idxs", None)
    if indices:
        indices.clear()  # several descriptions of the graph have the same list


@contextlib.contextmanager
def donate_inputs(indices: Sequence[int]) -> Iterator[None]:
    """Inside, a graph that is compiled may write to these of its inputs."""
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
    """Keep the compiled function from marking what it returns and saves (the user's inputs among that) as of dynamic size: nobody but us has asked for that."""
    meta = _forward_metadata()
    if meta is None:
        return
    meta.dynamic_outputs = False
    if hasattr(meta, "dynamic_saved_tensors_idxs"):
        meta.dynamic_saved_tensors_idxs = {}


def first_call_is_fake() -> bool:
    """Whether whoever compiles now will first call what comes out with fake tensors (DDPOptimizer does)."""
    return bool(getattr(torch._guards.TracingContext.try_get(), "fakify_first_call", False))


def activation_memory_budget() -> float:
    return float(torch._functorch.config.activation_memory_budget)


def compiled_backwards(output: torch.Tensor) -> Iterator[tuple[Any, fx.GraphModule]]:
    """What AOTAutograd calls for the backward pass of the compiled graph that made an output, and the graph that compiled autograd takes in its place."""
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        made_by = getattr(node, "_forward_cls", None)
        graph = getattr(getattr(made_by, "_lazy_backward_info", None), "bw_module", None)
        if isinstance(graph, fx.GraphModule):
            yield getattr(made_by, "compiled_bw", None), graph
        elif node is not None and made_by is None and len(node.next_functions) == 1:  # a view of what the graph gave
            todo.append(node.next_functions[0][0])
