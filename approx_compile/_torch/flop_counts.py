"""FLOP counts of graphs, by torch's own formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile._torch.fake_tensors import disable_torch_modes
from approx_compile._torch.symbolic_shapes import hint


def flops(n: fx.Node) -> int:
    """Count the FLOPs of a node with torch's formulas.

    Args:
        n: A node of a joint graph.

    Returns:
        The FLOPs of a product or convolution, 0 for anything else. Symbolic sizes count with their hints.
    """
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(getattr(n.target, "overloadpacket", None)) if n.op == "call_function" else None
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: _hinted(a.meta["val"]))
    return int(formula(*args, **kwargs, out_val=_hinted(n.meta["val"])))


def _hinted(value: Any) -> Any:
    """Replace a tensor (or several) by one on the meta device whose symbolic sizes have their hints' values."""
    if isinstance(value, (tuple, list)):
        return tuple(_hinted(v) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device="meta")
    return hint(value) if isinstance(value, torch.SymInt) else value


def count_tensors(gm: fx.GraphModule) -> int:
    """Count the tensors that a Dynamo graph computes. The count does not depend on symbolic sizes, which add nodes for the sizes themselves."""
    return sum(isinstance(n.meta.get("example_value"), (torch.Tensor, tuple)) for n in gm.graph.nodes if n.op.startswith("call_"))


def count_dynamo_flops(gm: fx.GraphModule) -> dict[fx.Node, int] | None:
    """Count the FLOPs of every call in a Dynamo graph by running the graph on fake tensors.

    Args:
        gm: The graph.

    Returns:
        FLOPs by node. None if the graph does not show what the backward pass computes (custom functions and ops, RNNs), if running it might leave a mode of
        torch changed, or if it fails.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    if not all(_is_plain_call(n.target) for n in gm.graph.nodes if n.op == "call_function"):
        return None
    flops_of: dict[fx.Node, int] = {}
    counter = FlopCounterMode(display=False)

    class Count(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            value = super().run_node(n)
            if n.op.startswith("call_"):
                flops_of[n] = counter.get_total_flops() - before
            return value

    def as_fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return hint(value) if isinstance(value, torch.SymInt) else value
        sizes, strides = ([hint(s) for s in given] for given in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    try:
        with disable_torch_modes(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [as_fake(n.meta["example_value"]) for n in gm.graph.find_nodes(op="placeholder")]
            with counter:
                Count(gm).run(*inputs)
    except Exception:  # the compilation itself will report the error
        return None
    return flops_of


_STATEFUL = ("functorch", "torch.amp", "torch.autograd")


def _is_plain_call(target: Any) -> bool:
    """Whether a target is a function of torch that keeps no state. Of the ops that take graphs only checkpoints count."""
    name = getattr(target, "__name__", "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "checkpoint" in str(target)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).startswith(("aten", "prims"))
    module = getattr(target, "__module__", None) or ""
    return not any(s in module for s in _STATEFUL) and not name.startswith(("lstm", "gru", "rnn", "_vmap", "_grad", "_jvp"))
