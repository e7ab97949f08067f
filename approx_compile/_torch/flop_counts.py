"""FLOP counts of graphs, by torch's own formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile._torch.fake_tensors import disable_torch_modes
from approx_compile._torch.symbolic_shapes import hint


def flops(n: fx.Node) -> int:
    """Of one product or convolution, by torch's own formulas; 0 for anything else."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(getattr(n.target, "overloadpacket", None)) if n.op == "call_function" else None
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: _hinted(a.meta["val"]))
    return int(formula(*args, **kwargs, out_val=_hinted(n.meta["val"])))


def _hinted(value: Any) -> Any:
    """A tensor (or several) without memory, of the sizes that symbols stand for."""
    if isinstance(value, (tuple, list)):
        return tuple(_hinted(v) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device="meta")
    return hint(value) if isinstance(value, torch.SymInt) else value


def count_tensors(gm: fx.GraphModule) -> int:
    """How many tensors a Dynamo graph computes: with symbolic sizes it has more nodes, but as many of these."""
    return sum(isinstance(n.meta.get("example_value"), (torch.Tensor, tuple)) for n in gm.graph.nodes if n.op.startswith("call_"))


def count_dynamo_flops(gm: fx.GraphModule) -> dict[fx.Node, int] | None:
    """The FLOPs of every call of a Dynamo graph, counted while it runs on fake tensors of its own; None where what the backward pass has can't be told from
    them (custom functions and ops, RNNs), or where running it might leave a mode of torch changed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    if not all(_is_plain_call(n.target) for n in gm.graph.nodes if n.op == "call_function"):
        return None
    found: dict[fx.Node, int] = {}
    counter = FlopCounterMode(display=False)

    class Count(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            value = super().run_node(n)
            if n.op.startswith("call_"):
                found[n] = counter.get_total_flops() - before
            return value

    def unreal(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return hint(value) if isinstance(value, torch.SymInt) else value
        sizes, strides = ([hint(s) for s in given] for given in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    try:
        with disable_torch_modes(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [unreal(n.meta["example_value"]) for n in gm.graph.find_nodes(op="placeholder")]
            with counter:
                Count(gm).run(*inputs)
    except Exception:  # whatever it is, whoever compiles will say
        return None
    return found


_STATEFUL = ("functorch", "torch.amp", "torch.autograd")


def _is_plain_call(target: Any) -> bool:
    """A function of torch's that keeps no state; of the ops that take graphs only a checkpoint's."""
    name = getattr(target, "__name__", "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "checkpoint" in str(target)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).startswith(("aten", "prims"))
    module = getattr(target, "__module__", None) or ""
    return not any(s in module for s in _STATEFUL) and not name.startswith(("lstm", "gru", "rnn", "_vmap", "_grad", "_jvp"))
