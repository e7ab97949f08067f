"""Decide from Dynamo's graph whether a model's backward pass runs on tokens or on samples, where the settings leave that open.

Tokens add less variance than samples for the same share of the work: in the fine-tuning of a small BERT, with the same `tau`, 0.45 of the tokens of every
region are needed where 0.97 of the samples are, and 0.3 where it is 0.58 (`benchmarks.accuracy.minilm`). But attention, convolutions and all else that mixes
tokens then runs on the whole batch. So tokens are preferred where most of the work is in linear layers that see several tokens of every sample.
"""

from __future__ import annotations

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.rows.early_decline import gradient_flops_of_calls

LEAST_SHARE = 0.65
"""The least share of the gradients' FLOPs in linear layers that see several tokens of every sample. With the shares above the two are equally fast at 0.65."""

LEAST_COVERED = 0.6
"""The least share of the gradients' FLOPs in regions of the joint graph. Less is in them than Dynamo's graph shows where an op between layers is unknown."""

_PRODUCTS = {"linear", "addmm", "matmul", "mm"}
_VIEWS = {"view", "reshape", "flatten"}
"""Functions and methods of tensors by their names."""


def prefers_tokens(gm: fx.GraphModule) -> bool:
    """Return whether tokens are preferred to samples for a graph.

    Args:
        gm: Dynamo's graph of the whole frame.
    """
    flops = gradient_flops_of_calls(gm)
    if flops is None:
        return False
    on_tokens = sum(f for n, f in flops.items() if f and _sees_tokens(n))
    return on_tokens >= LEAST_SHARE * sum(flops.values()) > 0


def _sees_tokens(n: fx.Node) -> bool:
    """Whether a node is a product with a weight whose other operand has several leading dims, such as samples and positions, or is that with these merged."""
    operands = [(a, v) for a in n.all_input_nodes if isinstance(v := a.meta.get("example_value"), torch.Tensor)]
    if getattr(n.target, "__name__", str(n.target)) not in _PRODUCTS or not any(isinstance(v, torch.nn.Parameter) and v.dim() == 2 for _, v in operands):
        return False
    others = [_unmerged(a) for a, v in operands if not isinstance(v, torch.nn.Parameter)]
    return any(sum(_torch.hint(size) > 1 for size in v.shape[:-1]) > 1 for v in others)


def _unmerged(n: fx.Node) -> torch.Tensor:
    """The value of a node, before views that merged its leading dims."""
    value: torch.Tensor = n.meta["example_value"]
    while getattr(n.target, "__name__", n.target) in _VIEWS and n.all_input_nodes:
        n = n.all_input_nodes[0]
        before = n.meta.get("example_value")
        if not isinstance(before, torch.Tensor) or not before.dim() or not value.dim() or not _torch.known_equal(before.shape[-1], value.shape[-1]):
            break
        value = before
    return value
