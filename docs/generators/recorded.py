"""Outputs of real runs, which `python docs/record.py` has stored in docs/recorded: made from what was found then, in the words of the present code."""

from __future__ import annotations

import json
import os
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import approx_compile
from approx_compile.backend.runtime.decisions import Decisions
from approx_compile.config import ApproxConfig
from approx_compile.rows.controller import RowControl, TokenControl
from approx_compile.rows.tokens.token_variance import TokenBudget
from approx_compile.tools.accuracy import AccuracyComparison, Run
from approx_compile.tools.doctor import Check, Examination
from approx_compile.tools.report.report_data import AdaptiveShares
from approx_compile.utils import counted
from generators.outputs import ENVIRONMENT, as_block
from generators.stored import ROOT

RECORDED = ROOT / "docs" / "recorded"


def stored(name: str) -> dict[str, Any]:
    """What was recorded under a name."""
    return dict(json.loads((RECORDED / f"{name}.json").read_text()))


def digits_model() -> nn.Sequential:
    """The perceptron of the tutorial, for scikit-learn's digits."""
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Block(nn.Module):
    """A transformer block: attention and an MLP, each behind a LayerNorm and with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class PixelTransformer(nn.Module):
    """A transformer for scikit-learn's digits, which reads each of the 64 pixels as a token and classifies by the first one."""

    def __init__(self, width: int = 192, blocks: int = 2) -> None:
        super().__init__()
        self.pixel, self.position = nn.Linear(1, width), nn.Parameter(torch.randn(64, width) / 8)
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(blocks))), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.pixel(images.unsqueeze(-1)) + self.position)[:, 0])


def with_caption(text: object, run: dict[str, Any]) -> str:
    """A block, and where and when it was recorded."""
    return f"{as_block(text)}\n\n*Recorded on {run['date']}: {run['device']}, {counted(run['threads'], 'thread')}, torch {run['torch']}.*"


def trained_report(name: str = "training", model: nn.Module | None = None, batch: int = 256) -> approx_compile.Report:
    """The report of a recorded training: of the perceptron, or of another model."""
    shares = stored(name)["adaptive"]
    shares["rows"] = {int(level): share for level, share in shares["rows"].items()}
    with patch.dict(os.environ, ENVIRONMENT):
        report = approx_compile.explain(digits_model() if model is None else model, torch.randn(batch, 64))
    report.adaptive = AdaptiveShares(**shares)
    return report


def explain_after_training() -> str:
    """The text of the perceptron's report."""
    with patch.dict(os.environ, ENVIRONMENT):
        return with_caption(trained_report(), stored("training"))


def explain_on_tokens() -> str:
    """The text of the transformer's report."""
    report = trained_report("tokens", PixelTransformer(), stored("tokens")["batch"])
    with patch.dict(os.environ, ENVIRONMENT):
        return with_caption(report, stored("tokens"))


def decisions_on_tokens() -> str:
    """The decisions about the trained transformer."""
    run, settings, cuts, budgets = stored("tokens"), ApproxConfig.of({}).adaptive, {}, {}
    for name, state in run["controls"].items():
        cuts[name] = TokenControl(settings, name.rpartition(".")[2])
        cuts[name].place = state["place"]
        cuts[name].load_state_dict(state)
    for name, state in run["budgets"].items():
        budgets[name] = TokenBudget(settings, name)
        budgets[name].load_state_dict(state)
    with patch.dict(os.environ, ENVIRONMENT):
        return with_caption(Decisions(dict(cuts), budgets=dict(budgets)), run)


def decisions_after_training() -> str:
    """The decisions about the trained perceptron."""
    run, cuts = stored("training"), {}
    for name, state in run["controls"].items():
        cuts[name] = RowControl(ApproxConfig.of({}).adaptive, name.rpartition(".")[2])
        cuts[name].place = state["place"]
        cuts[name].load_state_dict(state)
    with patch.dict(os.environ, ENVIRONMENT):
        return with_caption(Decisions(dict(cuts)), run)


def doctor() -> str:
    """What `approx-compile doctor` found."""
    run = stored("doctor")
    with patch.dict(os.environ, ENVIRONMENT):
        return with_caption(Examination(tuple(Check(**c) for c in run["checks"])), run)


def compare() -> str:
    """What `approx-compile compare` printed."""
    run = stored("compare")
    exact, approx = (tuple(Run(**r) for r in run[name]) for name in ("exact", "approx"))
    found = AccuracyComparison(tuple(run["seeds"]), exact, approx, run["margin"], run["lower_is_better"], run["threads"])
    with patch.dict(os.environ, ENVIRONMENT), patch.object(torch, "__version__", run["torch"]):
        return with_caption(found, run)


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        "output of explain after training": explain_after_training(),
        "output of decisions": decisions_after_training(),
        "output of explain on tokens": explain_on_tokens(),
        "output of decisions on tokens": decisions_on_tokens(),
        "output of doctor": doctor(),
        "output of compare": compare(),
    }
