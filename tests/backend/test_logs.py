"""What the logger `approx_compile` gets. Programs whose root logger is at INFO see it, too, so INFO must not grow with layers or steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from helpers.tokens import Block
from torch import nn

from approx_compile import Backend, controls
from approx_compile.backend import run_as_is


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Everything that the package logs, in a list that grows."""
    logger, got, handler = logging.getLogger("approx_compile"), [], logging.Handler()
    level, handler.emit = logger.level, got.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield got
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_work_counts")
def test_info_has_one_line_for_each_graph(records: list[logging.LogRecord]) -> None:
    """Beside it comes the notice for the model, a warning. The changes of shares and the measurements of 60 steps on tokens are DEBUG."""
    model = nn.Sequential(Block(8), nn.Linear(8, 5))
    f = torch.compile(model, backend=Backend({"adaptive": {"probe": 8}}, inner_compile=run_as_is))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(60):
        x, y = torch.randn(8, 16, 8), torch.randint(5, (8, 16))
        y[:, 8:] = -100  # padding: a loss on half of the tokens
        nn.functional.cross_entropy(f(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = sum(len(c.changes) - 1 for c in controls(model).values())
    shown, debug = [[r.getMessage() for r in records if (r.levelno >= logging.INFO) is loud] for loud in (True, False)]
    assert len(shown) == 2, shown
    assert shown[0] == "a graph of Sequential: 7 of 7 layers approximated" and shown[1].startswith("approx: Sequential: forward exact. Backward starts on")
    assert changes >= 5 and sum(" from step " in text for text in debug) >= changes, debug
    assert sum("of the gradient's own variance" in text for text in debug) >= 5
