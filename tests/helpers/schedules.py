"""A model under settings that change with the steps, and what each of its forward passes sampled."""

from __future__ import annotations

import torch

from approx_compile import Backend
from helpers.compile import Choices
from helpers.models import mlp

EVERY_OTHER = {"policy": "always", "method": "exact", "rules": [{"layers": "linear[1]", "steps": "1::2", "method": "topk", "ratio": 0.25}]}


class Watched:
    """A compiled model, its optimizer, and which choices each forward pass made."""

    def __init__(self, options, model=None, **kwargs):
        self.choices = Choices()
        self.model = model if model is not None else mlp(20, 64, 64, 4)
        self.f = torch.compile(self.model, backend=Backend(options, inner_compile=self.choices), **kwargs)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def kept(self, x=None):
        """How many entries each site kept in one forward and backward pass."""
        self.choices.clear()
        self.f(torch.randn(32, 20) if x is None else x).sum().backward()
        return {name.split(".")[0]: len(idx) for name, idx in self.choices.items() if name.endswith("output.idx")}

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
