"""Outputs of real runs, which `python docs/record.py` has stored in docs/recorded: made from what was found then, in the words of the present code."""

from __future__ import annotations

import json
import os
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import approx_compile
from approx_compile.backend.runtime.decisions import Decisions
from approx_compile.config import ApproxConfig
from approx_compile.rows.controller import RowControl
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


def with_caption(text: object, run: dict[str, Any]) -> str:
    """A block, and where and when it was recorded."""
    return f"{as_block(text)}\n\n*Recorded on {run['date']}: {run['device']}, {counted(run['threads'], 'thread')}, torch {run['torch']}.*"


def trained_report() -> approx_compile.Report:
    """The report of the trained perceptron."""
    shares = stored("training")["adaptive"]
    shares["rows"] = {int(level): share for level, share in shares["rows"].items()}
    with patch.dict(os.environ, ENVIRONMENT):
        report = approx_compile.explain(digits_model(), torch.randn(256, 64))
    report.adaptive = AdaptiveShares(**shares)
    return report


def explain_after_training() -> str:
    """The text of that report."""
    with patch.dict(os.environ, ENVIRONMENT):
        return with_caption(trained_report(), stored("training"))


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
        "output of doctor": doctor(),
        "output of compare": compare(),
    }
