"""A collator pads every batch to its longest sentence: lengths change from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from approx_compile import Backend, controls
from approx_compile.backend import run_as_is

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("one_thread", "small_work_counts")]


class Encoder(nn.Module):
    """A transformer block on sentences with padding, and a head on the mean of their words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(100, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.norm, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(ids)
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(-2))
        h = self.norm(h + self.down(F.gelu(self.up(h))))
        weights = mask.float().unsqueeze(-1)
        return self.head((h * weights).sum(1) / weights.sum(1))


def graphs_and_model(backend: Any) -> tuple[int, nn.Module]:
    """Train 200 steps on batches of 50 lengths. Returns how many graphs were compiled; a frame that ran eagerly would count as unimplemented."""
    torch._dynamo.reset()
    counters.clear()
    model = Encoder()
    f = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    g = torch.Generator().manual_seed(0)
    for step in range(200):
        length = 10 + (step * 7) % 50
        words = torch.randint(1, length + 1, (16, 1), generator=g)
        words[0] = length
        ids = torch.randint(0, 100, (16, length), generator=g)
        F.cross_entropy(f(ids, torch.arange(length) < words), torch.arange(16) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not counters["unimplemented"] and not counters["graph_break"]
    return counters["stats"]["unique_graphs"], model


@pytest.mark.slow
def test_fifty_lengths_in_two_hundred_steps() -> None:
    plain, _ = graphs_and_model("aot_eager")
    ours, model = graphs_and_model(Backend({"adaptive": {"tau": 10.0}}, inner_compile=run_as_is))
    assert ours <= plain + 2
    found = controls(model)
    assert len({name.rpartition(":")[2] for name in found}) == len(found)  # one control for each region, whatever the length
    for control in found.values():
        assert control.step == control.passes == 200 and control.ratio < 1
