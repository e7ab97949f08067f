"""What the cases that run on several ranks share: models, data of a rank, training, comparisons between ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from approx_compile import Backend
from approx_compile.backend import run_as_is
from helpers.models import mlp

WEIGHTS: dict[str, Any] = {"policy": "always", "method": "topk_weights", "ratio": 0.5}
"""Sampled at the same channels on every rank."""

Model = Callable[[], nn.Module]


def small() -> nn.Module:
    return mlp(64, 128, 128, 10)


def batch(rank: int, step: int = 0, rows: int = 32, inputs: int = 64) -> Tensor:
    """The data of one rank at one step."""
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1000 * step + rank))


def backend(options: dict[str, Any]) -> Backend:
    """The backend without Inductor."""
    return Backend(options, inner_compile=run_as_is)


def compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend=backend(options))


def loss_of(out: Tensor) -> Tensor:
    return (out.float() - 0.1).square().mean()


def global_gradients(model: nn.Module, options: dict[str, Any], data: list[Tensor], loss: Callable[[Tensor], Tensor] = loss_of) -> list[Tensor]:
    """The gradients of one process with the data of all ranks."""
    alone = copy.deepcopy(model)
    loss(compiled(alone, options)(torch.cat(data))).backward()
    return [p.grad for p in alone.parameters() if p.grad is not None]


def assert_close(got: list[Tensor], expected: list[Tensor], bound: float = 1e-5) -> None:
    """Compare whole gradients by their relative difference."""
    assert len(got) == len(expected) > 0
    difference = torch.cat([(a - b).double().flatten() for a, b in zip(got, expected, strict=True)]).norm()
    size = torch.cat([b.double().flatten() for b in expected]).norm()
    assert difference <= bound * size, float(difference / size)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_equal_on_ranks(model: nn.Module) -> None:
    """Compare parameters with those of rank 0, bit for bit."""
    for name, p in model.named_parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p.detach()), name


def train(ddp: Any, parameters: Any, rank: int, steps: int, rows: int = 32, inputs: int = 64, optimizer: Any = None, first: int = 0, data: Any = batch) -> Any:
    """Train for some steps with momentum and weight decay."""
    optimizer = optimizer or torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(first, first + steps):
        loss_of(ddp(data(rank, step, rows, inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def wrapped(model: nn.Module, options: dict[str, Any], order: str = "inner", **kwargs: Any) -> Any:
    """The model compiled and in DDP: `DDP(compile(m))` ("inner") or `compile(DDP(m))` ("outer")."""
    if order == "inner":
        return DDP(compiled(model, options), **kwargs)
    return compiled(DDP(model, **kwargs), options)
