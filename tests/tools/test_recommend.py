"""`recommend`: what is advised for a model and a run, and that every figure it cites is one of a stored row."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import mlp
from torch import nn
from typer.testing import CliRunner

import approx_compile
from approx_compile import ApproxConfig, ConfigError, recommend
from approx_compile.tools import evidence
from approx_compile.tools.cli import app
from approx_compile.tools.recommend import Facts, _advice

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cited", evidence.ALL, ids=lambda e: e.name)
def test_a_cited_figure_is_the_mean_of_stored_rows(cited: evidence.Evidence) -> None:
    stored = [json.loads(line) for line in (RESULTS / cited.file).read_text().splitlines()]
    group = [r for r in stored if r["work"] == cited.name and r["commit"] == cited.commit]
    runs, exact = ([r for r in group if r["setting"] == setting] for setting in (cited.setting, "exact"))
    assert len(runs) == len(exact) == cited.seeds
    for figure, rows, key in ((cited.score, runs, "final"), (cited.exact, exact, "final"), (cited.time, runs, "seconds_of_exact")):
        assert figure == pytest.approx(statistics.mean(r[key] for r in rows), abs=0.0051)


def facts(**changes: Any) -> Facts:
    known: dict[str, Any] = {"batch": 128, "layers": 4, "convolutions": False, "attention": False, "batch_norm": False, "rows": True, "why_not": ""}
    return Facts(**known | {"fine_tuning": False, "epochs": None, "device": "cpu", "threads": 2} | changes)


@pytest.mark.parametrize(
    ("changes", "options", "cites", "expects"),
    [
        ({}, {}, evidence.MLP.commit, "in less time"),
        ({"convolutions": True}, {}, "mnist-cnn", "in less time"),
        ({"epochs": 2}, {}, "fashion-mlp", "nearly all samples are needed"),
        ({"fine_tuning": True}, {}, "emnist-finetune-8", "accuracy of exact training"),
        ({"fine_tuning": True, "epochs": 3}, {}, "work emnist-finetune,", "accuracy of exact training"),
        ({"attention": True}, {}, "char-transformer", "language models"),
        ({"device": "cuda"}, {}, "fashion-mlp", "No training on cuda is stored"),
        ({"batch": 1, "rows": False}, None, "tables 2 to 4", "no samples to leave out"),
        ({"rows": False, "why_not": "BatchNorm couples", "batch_norm": True}, None, "cifar-wrn", "exact: BatchNorm couples"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and value else None,
)
def test_the_first_advice_follows_from_the_facts(changes: dict[str, Any], options: Any, cites: str, expects: str) -> None:
    first, *others = _advice(facts(**changes))
    assert (first.options, cites in first.evidence, expects in first.expect) == (options, True, True)
    for advice in (first, *others):
        assert advice.evidence and advice.check
        ApproxConfig.of(advice.options)
    assert not changes.get("batch_norm") or not others


def test_a_model_is_looked_at(tmp_path: Path) -> None:
    found = recommend(mlp(784, 1024, 1024, 10), torch.randn(256, 784), epochs=10)
    assert (found.facts.batch, found.facts.layers, found.facts.rows, found.facts.batch_norm) == (256, 3, True, False)
    assert found.advice[0].options == {} and "Evidence: Fashion-MNIST" in " ".join(str(found).split())
    normed = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    found = recommend(normed, torch.randn(16, 3, 8, 8))
    assert found.facts.batch_norm and found.facts.convolutions
    assert "recommend" in approx_compile.__all__


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"epochs": 2.5}])
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got .* an integer of at least 1"):
        recommend(mlp(8, 8, 8), torch.randn(4, 8), **wrong)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(4, 8)\n"
    )
    result = CliRunner().invoke(app, ["recommend", f"{file}:make", "--batch", "1", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["facts"]["batch"] == 1 and said["advice"][0]["options"] is None
