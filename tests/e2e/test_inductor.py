"""Features that are tested op by op elsewhere, several at once in Inductor's own code, on models as small as can be, against eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.compile import HALF
from helpers.models import TransformerBlock
from helpers.oracles import ChosenRows, grads, relative, spread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import approx_compile
from approx_compile.rows import controller
from approx_compile.rows.ownership import budgets, controls

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "small_work_counts")]


class Sentences(nn.Module):
    """A transformer block under a checkpoint, then the largest value of every channel over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = TransformerBlock(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.block, x, use_reentrant=False)  # type: ignore[assignment]
        return self.head(torch.relu(h).amax(1))  # type: ignore[no-any-return]


SIZES = [(32, 6), (32, 7), (40, 5), (32, 9), (32, 6), (24, 6), (32, 5), (32, 7)]
"""Samples and tokens of every step. The first and the fifth have the same data."""


def given(step: int) -> tuple[Tensor, Tensor]:
    """The data of a step, and the gradient of the output, which is much larger for some samples."""
    g = torch.Generator().manual_seed(step % 4)
    samples, tokens = SIZES[step]
    x = torch.randn(samples, tokens, 8, generator=g, requires_grad=True)
    return x, torch.randn(samples, 3, generator=g) * torch.rand(samples, 1, generator=g) ** 6


def test_a_transformer_block_under_a_checkpoint_with_changing_lengths_and_adaptive_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of eager on the rows that were chosen, a step that measures the variance has the bits of one that does not, and a run that goes on
    from a stored state repeats the one that was not interrupted, for any number of samples and tokens by the same code."""
    monkeypatch.setattr(controller, "MOMENTUM", 0.0)  # the share follows the last observation alone, so rows are left out from the second step on
    chosen, model = ChosenRows(monkeypatch), Sentences()

    def start(model: nn.Module) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, backend="approx", options={"policy": "adaptive", "adaptive": {"tau": 3.0, "probe": 4}}, dynamic=True)

    def step(i: int, f: Any, model: nn.Module) -> list[Tensor]:
        x, tangent = given(i)
        f(x).backward(tangent)
        return grads(model, x)

    def eager(i: int, mask: Tensor | None) -> list[Tensor]:
        x, tangent = given(i)
        model(x).backward(tangent if mask is None else tangent * spread(mask, tangent))
        return grads(model, x)

    def off(got: list[Tensor], want: list[Tensor]) -> float:
        return max(relative(a, b) for a, b in zip(got, want, strict=True) if b.norm() > 1e-4)

    f = start(model)
    first = step(0, f, model)
    assert off(first, eager(0, None)) < 1e-5
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in (1, 2):
            got, want = step(i, f, model), eager(i, chosen.mask(SIZES[i][0]))
            assert off(got, want) < 1e-5 < 0.02 < off(got, eager(i, None))
        state, stream = copy.deepcopy(approx_compile.state_dict(f)), torch.get_rng_state()
        uninterrupted = [step(i, f, model) for i in range(3, 8)]
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted[1], first, strict=True))
    assert [n for b in budgets(f).values() for n, _ in b.measurements] == [5]

    twin = copy.deepcopy(model)
    g = start(twin)
    approx_compile.load_state_dict(g, state)
    torch.set_rng_state(stream)
    for i, want in enumerate(uninterrupted, 3):
        assert all(torch.equal(a, b) for a, b in zip(step(i, g, twin), want, strict=True)), i
    assert [c.state_dict() for c in controls(g).values()] == [c.state_dict() for c in controls(f).values()]


def test_convolutions_alone_on_rows_with_images_of_dynamic_size(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).to(memory_format=torch.channels_last)
    f = torch.compile(model, backend="approx", options=HALF, dynamic=True)
    for samples, height, width in ((32, 8, 10), (40, 6, 9)):
        x = torch.randn(samples, 3, height, width).contiguous(memory_format=torch.channels_last)
        out = f(x)
        tangent = torch.randn_like(out)
        out.backward(tangent)
        got, mask = grads(model), chosen.mask(samples)
        assert int((mask > 0).sum()) == samples // 2
        model(x).backward(tangent * spread(mask, tangent))
        assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
