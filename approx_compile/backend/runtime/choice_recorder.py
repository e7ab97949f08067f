"""Tell those who send gradients which channels of them a backward pass has computed.

The indices that the forward pass chose are inputs of the compiled backward graph. `ChoiceRecorder` wraps that graph: before its gradients reach the
parameters, it passes the indices, as they lie on the device, to whoever listens for a parameter (`listen`). Nothing is added to the graph, and no step waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile import _torch
from approx_compile.passes.planning.plan import KeptChannels, Plan
from approx_compile.passes.planning.producer_narrowing import WEIGHTS_ONLY
from approx_compile.passes.rewrite.graph_edit import SELECTION_KEY


@dataclass(frozen=True)
class KeptAxis:
    """The channels of one dim of a gradient that a backward pass computes. In all others the gradient is zero.

    Attributes:
        dim: The dim.
        unit: Contiguous channels that one index stands for.
        size: All channels.
        kept: The channels computed.
        idx: The indices (kept / unit,) int64, sorted and distinct.
        site: The layer that chose them.
    """

    dim: int
    unit: int
    size: int
    kept: int
    idx: Tensor
    site: str


class Listener(Protocol):
    """Receives what is known of the gradients of some parameters."""

    def expect(self, parameter: Tensor, node: Any, gradient: Tensor, axes: Sequence[KeptAxis], token: Any) -> None:
        """Take up what is known of a gradient on its way to a parameter.

        Args:
            parameter: The parameter.
            node: The node of the autograd graph that accumulates its gradient.
            gradient: The gradient of the graph that has run.
            axes: The channels outside of which it is zero.
            token: Equal for two gradients only if their indices are equal.
        """
        ...

    def note(self, sites: Sequence[tuple[str, str]]) -> None:
        """Take up the layers whose choice depends on the data, each with its method."""
        ...


_listeners = WeakIdKeyDictionary()
"""The listener of every parameter that has one."""


def listen(parameter: Tensor, listener: Listener) -> None:
    """Have a listener told what backward passes compute of a parameter's gradient."""
    _listeners[parameter] = listener


class ChoiceRecorder:
    """An `inner_compile` that wraps another one and the backward graphs that it compiles."""

    def __init__(self, inner: Callable[..., Any], planned: Sequence[tuple[Plan, Any, Any]], example_inputs: Sequence[Any]) -> None:
        """Store what a compilation is known by.

        Args:
            inner: Compiles the graphs.
            planned: Filled by the joint-graph pass before `inner` is called: the plan of the graph comes first.
            example_inputs: The inputs of Dynamo's graph.
        """
        self.inner = inner
        self.planned = planned
        self.example_inputs = example_inputs

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **kwargs: Any) -> Any:
        """Compile a graph; wrap it if it is a backward graph that computes some channels only."""
        if not is_backward or len(self.planned) != 1:  # a graph inside the graph has inputs of its own
            return self.inner(gm, example_inputs, is_backward=is_backward, **kwargs)
        plan = self.planned[0][0]
        chosen = {n.meta[SELECTION_KEY]: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if SELECTION_KEY in n.meta}
        results = _torch.tree_leaves(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])
        gradients = {i: results.index(n) for i, n in _torch.gradient_outputs(gm.graph).items()}
        compiled = self.inner(gm, example_inputs, is_backward=True, **kwargs)
        tensors = [i for i, v in enumerate(self.example_inputs) if isinstance(v, Tensor)]
        by_input: dict[int, list[tuple[KeptChannels, int]]] = {}
        for kept in plan.kept:
            place = chosen.get(f"{kept.site}.output.idx")
            if place is not None and kept.input in gradients and kept.input in tensors:
                by_input.setdefault(kept.input, []).append((kept, place))
        # a dim with two choices: either alone is true
        records = [(tensors.index(i), gradients[i], list({k.dim: (k, place) for k, place in found}.values())) for i, found in by_input.items()]
        by_data = _choices_by_data(plan)
        return _recorded(compiled, records, len(tensors), by_data) if records or by_data else compiled


def _choices_by_data(plan: Plan) -> list[tuple[str, str]]:
    outputs = [(s.name, s.products[0]) for s in plan.sites]
    return [(name, p.method) for name, p in outputs if p.decision == "sampled" and p.method != WEIGHTS_ONLY]


def _recorded(
    compiled: Any, records: Sequence[tuple[int, int, Sequence[tuple[KeptChannels, int]]]], tensors: int, by_data: Sequence[tuple[str, str]]
) -> Callable[[list[Any]], Any]:
    """Wrap a compiled backward graph so that listeners are told of its gradients.

    Args:
        compiled: The compiled graph.
        records: For each parameter its position among the tensors that the forward pass got, that of its gradient among the results, and its channels, each
            with the position of the indices among the arguments.
        tensors: How many tensors the forward pass gets.
        by_data: The layers whose choice depends on the data, each with its method.
    """
    graph = object()

    def call(args: list[Any]) -> Any:
        node = _torch.current_backward_node() if _listeners else None
        below = node.next_functions if node is not None else ()
        if len(below) != tensors:  # AOTAutograd has changed the inputs, or compiled autograd runs the graph
            return compiled(args)
        indices = {place: args[place] for _, _, found in records for _, place in found}
        results = compiled(args)
        leaves = [getattr(n, "variable", None) for n, _ in below]
        versions = sum(v._version for v in leaves if v is not None)
        for v in leaves if by_data else ():
            if v is not None and (listener := _listeners.get(v)) is not None:
                listener.note(by_data)
                break
        for place, result, found in records:
            parameter, gradient = leaves[place], results[result]
            if parameter is None or (listener := _listeners.get(parameter)) is None or not isinstance(gradient, Tensor):
                continue
            if gradient.shape == parameter.shape and all(parameter.shape[k.dim] == k.size for k, _ in found):
                axes = [KeptAxis(k.dim, k.unit, k.size, k.kept, indices[at], k.site) for k, at in found]
                listener.expect(parameter, below[place][0], gradient, axes, (id(graph), versions))
        return results

    call.__dict__.update(getattr(compiled, "__dict__", {}))
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def may_be_sent() -> bool:
    """Return whether gradients may be exchanged with other processes, so that it is worth recording which channels they have."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
