"""Run by test_cache.py in processes of its own: takes one training step for each case named, and prints gradients and cache counters as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.passes import joint_graph_pass


class Net(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = checkpoint(self.middle, h, use_reentrant=False) if self.checkpointed else self.middle(h)
        return self.third(h)

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(h))


CASES: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "half": {"ratio": 0.5},
    "first": {"rules": [{"layers": "first", "ratio": 0.25}]},
    "weights": {"method": "topk_weights"},
    "weight_gradient": {"grad_weight": {"method": "topk", "ratio": 0.25}},
    "plan_first": {"plan": {"method": "exact", "rules": [{"layers": "first", "method": "topk", "ratio": 0.125}]}},
    "plan_second": {"plan": {"method": "exact", "rules": [{"layers": "second", "method": "topk", "ratio": 0.125}]}},
    "half+checkpoint": {"ratio": 0.5},
    "plan_first+checkpoint": {"plan": {"method": "exact", "rules": [{"layers": "first", "method": "topk", "ratio": 0.125}]}},
}

ROWS: dict[str, dict[str, Any] | None] = {
    "rows_half": {"grad": {"axis": "rows", "ratio": 0.5}},
    "rows_topk": {"grad": {"axis": "rows", "method": "topk", "ratio": 0.5}},
    "rows_below": {"rules": [{"layers": "first", "grad": {"axis": "rows", "ratio": 0.25}}], "output": "exact", "grad": {"axis": "rows", "ratio": 0.5}},
    "rows_half+checkpoint": {"grad": {"axis": "rows", "ratio": 0.5}},
}
"""Graphs whose backward pass runs on some rows: AOTAutograd's cache does not hold them, Inductor's holds their pieces."""


def gradients(options: dict[str, Any] | None, checkpointed: bool, op_by_op: bool) -> list[float]:
    """The sum of the absolute gradients of each parameter after one training step, with or without Inductor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(checkpointed)
    x = torch.randn(32, 64)
    backend: Any = "aot_eager" if op_by_op else "inductor"
    if options is not None:
        backend = Backend({"policy": "always", "group": 1, **options}, inner_compile=run_as_is if op_by_op else None)
    compiled = torch.compile(model, backend=backend)
    torch.manual_seed(1)
    compiled(x).square().sum().backward()
    return [p.grad.double().abs().sum().item() for p in model.parameters() if p.grad is not None]


def run(case: str, op_by_op: bool = False) -> dict[str, Any]:
    """The gradients of a case and what torch's caches counted. Behind an @ in its name there may be a text that stands for another version of the package's
    code."""
    name, _, version = case.partition("@")
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(joint_graph_pass, "code_version", lambda: hashlib.sha256(version.encode()).hexdigest()) if version else nullcontext():
        grads = gradients((CASES | ROWS)[name], "checkpoint" in name, op_by_op)
    counters, graphs = (torch._dynamo.utils.counters[cache] for cache in ("aot_autograd", "inductor"))
    return {
        "grads": grads,
        "hits": counters["autograd_cache_hit"],
        "misses": counters["autograd_cache_miss"],
        "bypasses": counters["autograd_cache_bypass"],
        "graph_hits": graphs["fxgraph_cache_hit"],
        "graph_misses": graphs["fxgraph_cache_miss"],
    }


if __name__ == "__main__":
    print(json.dumps({case: run(case) for case in sys.argv[1].split(",")}))
