"""Decide from Dynamo's graph whether running on rows can be worth it at all, before the model is traced again with a symbol for the batch.

This saves the time of that second trace and of its joint graph. The decision is only a bound: a graph that passes here may still be declined by
`RowCompiler.ask`, but a graph that does not pass would be declined there for certain.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx

from approx_compile import _torch, machine
from approx_compile.config import ApproxConfig
from approx_compile.config.resolve import RowSettings, row_settings
from approx_compile.passes.planning.plan import RowCut
from approx_compile.reasons import Reason, join
from approx_compile.reasons.rows import CROSS_SAMPLE, FEW_FLOPS_ON_ROWS
from approx_compile.rows import row_cost
from approx_compile.rows.row_compiler import LEAST_SHARE
from approx_compile.rows.source_place import source_place
from approx_compile.rows.stages import most_between

_counted: weakref.WeakKeyDictionary[fx.GraphModule, dict[str, int] | None] = weakref.WeakKeyDictionary()
"""The FLOPs of the gradients of the calls in Dynamo's graphs, by the calls' names, which are counted once."""

_MARGIN = 0.8
"""Factor on the least share that a graph must reach here. It allows for errors in counting the gradients of products: one that is counted here may not be
computed, or the other way round."""


def early_rejection(gm: fx.GraphModule, config: ApproxConfig, rows: int) -> tuple[Reason, tuple[RowCut, ...]] | None:
    """Return why running on rows cannot be worth it, if that is certain.

    Args:
        gm: Dynamo's graph.
        config: The user's configuration.
        rows: The batch's size.

    Returns:
        The reason, and the cuts that were asked for, for the report; None if rows may be worth it.
    """
    asked = _row_settings(config)
    if config.policy == "always" or (counted := _gradient_flops(gm, config)) is None:
        return None
    total, on_rows = counted
    device = next((v.device.type for n in gm.graph.find_nodes(op="placeholder") if isinstance(v := n.meta.get("example_value"), torch.Tensor)), "cpu")
    reason: Reason | None = None
    if total and on_rows < _MARGIN * LEAST_SHARE * total:
        mixing = CROSS_SAMPLE().at(source_place(next(n for n in reversed(gm.graph.nodes) if _is_batch_norm(n))))
        reason = join((FEW_FLOPS_ON_ROWS(share=on_rows / total), mixing), ": ") if on_rows else mixing
    reason = reason or row_cost.too_little_work(on_rows, device, machine.stored(device))
    if reason is None:
        return None
    return reason, tuple(_cut(s, rows, reason, total, i) for i, s in enumerate(dict.fromkeys(asked), 1))


def flops_elsewhere(part: fx.GraphModule, whole: fx.GraphModule, config: ApproxConfig) -> int:
    """Estimate the FLOPs of a model's backward pass that may run on rows outside one of the parts that it is compiled as.

    Args:
        part: Dynamo's graph of the part.
        whole: Dynamo's graph of the model.
        config: The user's configuration.

    Returns:
        The FLOPs; 0 where they cannot be counted.
    """
    here, all_parts = _gradient_flops(part, config), _gradient_flops(whole, config)
    return max(0, all_parts[1] - here[1]) if here is not None and all_parts is not None else 0


def _row_settings(config: ApproxConfig) -> list[RowSettings]:
    return [s for keys in config.each_alone() if (s := row_settings(keys)) is not None]


def _gradient_flops(gm: fx.GraphModule, config: ApproxConfig) -> tuple[int, int] | None:
    """The FLOPs of the gradients of a graph's products, and those of them that may run on rows; None if they cannot be counted."""
    gradients = gradient_flops_of_calls(gm)
    if gradients is None:
        return None
    mixing = [] if any(s.approximate_batch_norm for s in _row_settings(config)) else [n for n in gm.graph.nodes if _is_batch_norm(n)]
    _, most = most_between([*gm.graph.nodes], mixing, lambda n: gradients.get(n, 0))
    return sum(gradients.values()), most


def gradient_flops_of_calls(gm: fx.GraphModule) -> dict[fx.Node, int] | None:
    """Estimate the FLOPs of the gradients of every call in a Dynamo graph that has some; None if they cannot be counted."""
    if gm not in _counted:
        flops = _torch.count_dynamo_flops(gm)
        _counted[gm] = {n.name: round(f * _gradients(n)) for n, f in flops.items() if f} if flops is not None else None
    counted = _counted[gm]
    return {n: counted[n.name] for n in gm.graph.nodes if n.name in counted} if counted is not None else None


def _cut(asked: RowSettings, rows: int, reason: Reason, flops: int, level: int) -> RowCut:
    return RowCut(asked.method, asked.ratio, rows, "exact", reason, flops, 0, (), level)


def _gradients(n: fx.Node) -> float:
    """The FLOPs of a product's gradients relative to its own: one for each operand that needs a gradient. Attention has five products for two (2.5)."""
    if "attention" in str(n.target):
        return 2.5
    operands = [v for a in n.all_input_nodes if isinstance(v := a.meta.get("example_value"), torch.Tensor) and v.dim() > 1]
    return 2 if len(operands) != 2 else sum(v.requires_grad for v in operands)


def _is_batch_norm(n: fx.Node) -> bool:
    """Whether a node is a BatchNorm that uses the statistics of the batch."""
    if n.op != "call_function" or n.target not in (torch.nn.functional.batch_norm, torch.batch_norm):
        return False
    training: Any = n.kwargs.get("training", n.args[5] if len(n.args) > 5 else False)
    return training is True
