"""Run by test_cache.py in a process of its own: trains one step per case and prints gradients, cache counters and notices as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    "quarter": {"ratio": 0.25},
    "first": {"rules": [{"layers": "first", "ratio": 0.25}]},
    "second": {"rules": [{"layers": "second", "ratio": 0.25}]},
    "without_second": {"rules": [{"layers": "second", "method": "exact"}]},
    "backward": {"sampling": "backward"},
    "blackbox": {"sampling": "blackbox"},
    "weights": {"method": "topk_weights"},
    "group": {"group": 4},
    "weight_gradient": {"grad_weight": {"method": "topk", "ratio": 0.25}},
    "bernoulli": {"method": "bernoulli", "ratio": 0.25},
    "plan_first": {"plan": {"method": "exact", "rules": [{"layers": "first", "method": "topk", "ratio": 0.125}]}},
    "plan_second": {"plan": {"method": "exact", "rules": [{"layers": "second", "method": "topk", "ratio": 0.125}]}},
}

ROWS: dict[str, dict[str, Any] | None] = {
    "rows_half": {"grad": {"axis": "rows", "ratio": 0.5}},
    "rows_quarter": {"grad": {"axis": "rows", "ratio": 0.25}},
    "rows_topk": {"grad": {"axis": "rows", "method": "topk", "ratio": 0.5}},
    "rows_below": {"rules": [{"layers": "first", "grad": {"axis": "rows", "ratio": 0.25}}], "output": "exact", "grad": {"axis": "rows", "ratio": 0.5}},
}
"""Graphs whose backward pass runs on some rows: AOTAutograd's cache does not hold them, Inductor's holds their pieces."""


def gradients(options: dict[str, Any] | None, checkpointed: bool) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(checkpointed)
    x = torch.randn(32, 64)
    if options is None:
        f = torch.compile(model, backend="inductor")
    else:
        f = torch.compile(model, backend="approx", options={"policy": "always", "group": 1, **options})
    torch.manual_seed(1)
    f(x).square().sum().backward()
    return [round(p.grad.double().abs().sum().item(), 2) for p in model.parameters() if p.grad is not None]


def main(names: list[str], code_version: str | None) -> None:
    if code_version is not None:
        from approx_compile.passes import joint_graph_pass

        joint_graph_pass.code_version = lambda: hashlib.sha256(code_version.encode()).hexdigest()  # type: ignore[assignment]
    out: dict[str, Any] = {}
    for name in names:
        for checkpointed in (False, True):
            torch._dynamo.utils.counters.clear()
            grads = gradients((CASES | ROWS)[name], checkpointed)
            counters = dict(torch._dynamo.utils.counters["aot_autograd"])
            graphs = dict(torch._dynamo.utils.counters["inductor"])
            out[f"{name}{'+checkpoint' if checkpointed else ''}"] = {
                "grads": grads,
                "hits": counters.get("autograd_cache_hit", 0),
                "misses": counters.get("autograd_cache_miss", 0),
                "bypasses": counters.get("autograd_cache_bypass", 0),
                "graph_hits": graphs.get("fxgraph_cache_hit", 0),
                "graph_misses": graphs.get("fxgraph_cache_miss", 0),
            }
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2] if len(sys.argv) > 2 else None)
