"""Run by test_cache.py in a process of its own: takes one training step for each case, and prints gradients and cache counters as JSON.

Arguments: the names of the cases, `--op-by-op` to run the graphs without Inductor, and a text that stands for another version of the package's code.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

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


def main(names: list[str], op_by_op: bool, code_version: str | None) -> None:
    if code_version is not None:
        joint_graph_pass.code_version = lambda: hashlib.sha256(code_version.encode()).hexdigest()  # type: ignore[assignment]
    out: dict[str, Any] = {}
    for name in names:
        torch._dynamo.utils.counters.clear()
        grads = gradients((CASES | ROWS)[name], "checkpoint" in name, op_by_op)
        counters = dict(torch._dynamo.utils.counters["aot_autograd"])
        graphs = dict(torch._dynamo.utils.counters["inductor"])
        out[name] = {
            "grads": grads,
            "hits": counters.get("autograd_cache_hit", 0),
            "misses": counters.get("autograd_cache_miss", 0),
            "bypasses": counters.get("autograd_cache_bypass", 0),
            "graph_hits": graphs.get("fxgraph_cache_hit", 0),
            "graph_misses": graphs.get("fxgraph_cache_miss", 0),
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1].split(","), "--op-by-op" in sys.argv, next((a for a in sys.argv[2:] if not a.startswith("--")), None))
