"""A model to tune, and all of its state that tuning must not change."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOTHING = 1e-9
"""A gradient error that every sampled site exceeds. With it nothing is timed, so nothing is compiled."""


class SharedLayerNet(nn.Module):
    """Convolutions with BatchNorm and dropout, a layer called twice, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.twice, self.drop, self.head = nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.relu(self.bn(self.conv(torch.relu(self.stem(x))))).mean((2, 3))
        return self.head(self.drop(torch.relu(self.twice(torch.relu(self.twice(h))))))


def net_and_batch() -> tuple[SharedLayerNet, Tensor, Tensor]:
    return SharedLayerNet(), torch.randn(16, 3, 8, 8), torch.randint(10, (16,))


class ModelState:
    """Everything of a model and of the random generators that must not change, bit for bit, and whether it has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
        self.objects = dict(model.state_dict(keep_vars=True))
        self.grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
        self.attributes = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
        self.states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def unchanged(self) -> bool:
        now = self.model.state_dict(keep_vars=True)
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        numpy_state = np.random.get_state()
        return (
            all(now[k] is v for k, v in self.objects.items())
            and all(torch.equal(now[k], v) for k, v in self.tensors.items())
            and grads.keys() == self.grads.keys()
            and all(grads[n] is g and torch.equal(g, content) for n, (g, content) in self.grads.items())
            and self.attributes == [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in self.model.modules()]
            and torch.equal(torch.get_rng_state(), self.states[0])
            and random.getstate() == self.states[1]
            and all(np.array_equal(a, b) for a, b in zip(numpy_state, self.states[2], strict=True))
        )


def trained(model: nn.Module, x: Tensor, y: Tensor) -> ModelState:
    """Return the state of a model that has gradients (all but one) and running statistics."""
    F.cross_entropy(model(x), y).backward()
    model.get_parameter("head.bias").grad = None
    return ModelState(model)


def after(calls: int, act: Callable[[], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss that draws random numbers of all kinds, and calls `act` at its n-th call."""
    counter = itertools.count(1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(())
        if next(counter) == calls:
            act()
        return F.cross_entropy(output, target)

    return loss
