"""Frameworks that take a compiled model, or the name of a backend, as they are: skorch, ignite, timm's and torchtitan's flags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import mlp
from torch import nn

import approx_compile
from approx_compile import Backend, controls
from approx_compile.backend import run_as_is

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("one_thread", "small_work_counts")]


def backend() -> Backend:
    return Backend({"adaptive": {"tau": 10.0}}, inner_compile=run_as_is)


@pytest.mark.slow
def test_skorch() -> None:
    skorch = pytest.importorskip("skorch")
    x, y = np.random.default_rng(0).normal(size=(128, 20)).astype(np.float32), np.arange(128) % 2
    net = skorch.NeuralNetClassifier(
        mlp(20, 64, 2), criterion=nn.CrossEntropyLoss, max_epochs=3, batch_size=32, train_split=None, verbose=0, compile=True, compile__backend=backend()
    )
    net.fit(x, y)
    (control,) = controls(net.module_).values()
    assert control.step == 12 and approx_compile.metrics(net.module_)["approx/step"] == 12 and net.predict(x).shape == (128,)


@pytest.mark.slow
def test_ignite() -> None:
    engine = pytest.importorskip("ignite.engine")
    model = mlp(20, 64, 2)
    compiled = torch.compile(model, backend=backend())
    trainer = engine.create_supervised_trainer(compiled, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss())
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda e: e.state.metrics.update(approx_compile.metrics(compiled)))
    trainer.run([(torch.randn(32, 20), torch.randint(0, 2, (32,))) for _ in range(4)], max_epochs=2)
    assert trainer.state.metrics["approx/step"] == 8


def blocks() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    return nn.ModuleDict({str(i): Block() for i in range(2)})


@pytest.mark.slow
@pytest.mark.parametrize("registered", [True, False])
def test_blocks_compiled_as_torchtitan_does(registered: bool) -> None:
    """Each block with the backend and `fullgraph=True`: as a new child, or in place. The state names the blocks as the bare model does."""
    layers: Any = blocks()
    for name, block in layers.named_children():
        if registered:
            layers.register_module(name, torch.compile(block, backend=backend(), fullgraph=True))
        else:
            block.compile(backend=backend(), fullgraph=True)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
    for _ in range(3):
        h = torch.randn(32, 16)
        for layer in layers.values():
            h = layer(h)
        h.square().mean().backward()
        optimizer.step()
    saved = approx_compile.state_dict(layers)
    assert saved["clocks"][0]["step"] == 3 and all(n.startswith(("0.up", "1.up")) for n in saved["controls"])
    approx_compile.load_state_dict(blocks(), saved)
