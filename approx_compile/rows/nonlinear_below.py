"""Find out whether the gradients that leave a graph pass through something below it that is not known to be linear in them.

Rows that are left out, or weighted, above a nonlinear function give a biased gradient below it. Within one graph `linearity` says where that is so. Below
the graph, on the way to the parameters, lie functions of eager code, hooks, and other compiled graphs. Torch's own backward functions are linear.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import op_name
from approx_compile.passes.rewrite.graph_edit import BY_SAMPLE_KEY
from approx_compile.reasons.rows import NONLINEAR_BELOW
from approx_compile.rows.linearity import is_linear
from approx_compile.utils import log_once

HOOKED = "approx_compile_hooked"
"""The key in the metadata of a backward node whose graph had an input with a hook on its gradient when it ran."""

INPUTS = "approx_compile_inputs"
"""The key of weak references to the inputs of a graph that were computed from others: a hook may be registered after the graph has run."""

_UNKNOWN = ("torch.nn.modules._functions.BackwardHookFunction", "torch.utils.checkpoint.CheckpointFunction", "torch._library.")
"""Functions of torch, by the begin of their names, that run code of the user's in their backward pass: module hooks, checkpoints, registered ops."""

_found: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()
"""What is not linear in the backward graph of a compiled function, by the class that torch makes of the function."""


def is_nonlinear_below(node: Any) -> bool:
    """Return whether the gradients that leave a backward node meet something that is not known to be linear in them. What it is is logged once.

    Args:
        node: The backward node of a compiled graph; None where it is not known, as within compiled autograd.
    """
    if node is None:
        return False
    what = "a hook on an input's gradient" if _is_hooked(node) else next((w for n in _torch.nodes_below(node) if (w := _not_linear(n))), None)
    if what is not None:
        log_once(f"approx: a backward pass keeps all rows: {NONLINEAR_BELOW(what=what)}")
    return what is not None


def note_hooks(inputs: Any, output: Any) -> None:
    """Note at the backward node of a compiled graph which of its inputs have a hook on their gradient, or may get one until the backward pass.

    A hook on a parameter sees the gradient that the user gets, so it is no reason. A tensor that the user's code no longer holds
    can't be asked.

    Args:
        inputs: The inputs of the compiled graph.
        output: Its output.
    """
    computed = [v for v in inputs if isinstance(v, Tensor) and not v.is_leaf]
    if not computed:
        return
    hooked = any(map(_torch.has_gradient_hook, computed))
    for value in _torch.tree_leaves(output):
        for node in _torch.compiled_nodes(value) if isinstance(value, Tensor) else ():
            node.metadata.update({HOOKED: True} if hooked else {INPUTS: [weakref.ref(v) for v in computed]})


def _is_hooked(node: Any) -> bool:
    return HOOKED in node.metadata or any((v := r()) is not None and _torch.has_gradient_hook(v) for r in node.metadata.get(INPUTS, ()))


def with_hooks_noted(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled graph so that `note_hooks` sees every call."""

    def call(*args: Any) -> Any:
        out = compiled(*args)
        note_hooks(args, out)
        return out

    return call


def first_nonlinear(node: Any) -> str | None:
    """Return the name of an op of a compiled graph's backward pass that is not known to be linear in the gradients it reads; None if all are.

    Args:
        node: The backward node of the compiled graph.
    """
    function = _torch.function_of(node)
    if function not in _found:
        gm = _torch.backward_graph(node)
        _found[function] = _nonlinear_op(gm.graph) if gm is not None else "a compiled graph that can't be read"
    return _found[function]


def _nonlinear_op(graph: fx.Graph) -> str | None:
    gradients: set[fx.Node] = set()
    for n in graph.nodes:
        if _torch.is_tangent(n):
            gradients.add(n)
        elif n.op == "call_function" and not isinstance(n.meta.get("val"), _torch.SYMBOLIC) and not gradients.isdisjoint(n.all_input_nodes):
            gradients.add(n)
            if BY_SAMPLE_KEY not in n.meta and not is_linear(n, gradients.intersection(n.all_input_nodes)):
                return op_name(n)
    return None


def _not_linear(node: Any) -> str | None:
    """What of a backward node is not known to be linear in the gradient; None if all is."""
    function = _torch.function_of(node)
    if function is None:
        return str(node.name()) if "CppNode" in node.name() else None
    if _torch.is_compiled(node):
        return "a hook on the gradient of a compiled graph's input" if _is_hooked(node) else first_nonlinear(node)
    name = f"{function.__module__}.{function.__qualname__}"
    return name if not name.startswith("torch.") or name.startswith(_UNKNOWN) else None
