"""Settings that run the backward pass on rows, and a model that is trained with them."""

from __future__ import annotations

from typing import Any

from torch import nn


def rows(method: str = "bernoulli", ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    """Settings under which every backward pass runs on a share of its rows."""
    return {"policy": "always", "grad": {"axis": "rows", "ratio": ratio, "method": method, **more}}


def generator() -> nn.Module:
    """Three linear layers with GELU and LayerNorm between them."""
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
