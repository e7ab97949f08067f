"""compare: runs in turn in fresh processes, exact ones with the switch set; the decision rule; bad functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from approx_compile.tools import accuracy
from approx_compile.tools.accuracy import AccuracyComparison, Interval, Run, RunFailed, compare_accuracy
from approx_compile.tools.accuracy_child import result_of
from approx_compile.tools.cli import app

TRAINING = """
import os
import torch

def run(seed):
    print("training", seed)
    exact = os.environ.get("APPROX_COMPILE_DISABLE") == "1"
    with open("order", "a") as f:
        f.write(f"{'exact' if exact else 'approx'} {seed} {torch.get_num_threads()}\\n")
    return {"accuracy": 0.9 + 0.01 * seed, "seconds": 2.0 if exact else 1.0 + 0.1 * seed}

def fails(seed):
    raise RuntimeError("no data")
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_runs_alternate_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAINING)
    done = CliRunner().invoke(app, ["compare", "train.py:run", "--seeds", "2", "--threads", "1", "--json", "out.json"])
    assert done.exit_code == 0, done.output
    assert Path("order").read_text().splitlines() == ["exact 0 1", "approx 0 1", "exact 1 1", "approx 1 1"]
    found = json.loads(Path("out.json").read_text())
    assert [r["value"] for r in found["exact"]] == [r["value"] for r in found["approx"]] == [0.9, 0.91]
    assert (found["decision"], found["difference"]["mean"], found["time"]["mean"]) == ("as accurate", 0.0, pytest.approx((0.5 * 0.55) ** 0.5))
    assert "0.905 ± 0.0071" in done.stdout and "1 thread," in done.stdout and "written: out.json" in done.stdout


@pytest.mark.slow
def test_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAINING)
    with pytest.raises(RunFailed, match=r"seed 0, exact: the process ended with code 1"):
        compare_accuracy("train.py:fails")


def comparison(exact: list[float], approx: list[float], margin: float, seconds: float = 0.5, lower_is_better: bool = False) -> AccuracyComparison:
    runs = [tuple(Run(v, s + 0.01 * i) for i, v in enumerate(values)) for values, s in ((exact, 1.0), (approx, seconds))]
    return AccuracyComparison(tuple(range(len(exact))), *runs, margin, lower_is_better, 1)


def test_the_interval_is_students() -> None:
    found = Interval.of([1.0, 2.0, 3.0])
    half = 4.302652729911275 / 3**0.5  # the 97.5 % point with 2 degrees of freedom, standard deviation 1
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half))


def test_the_interval_of_the_time_is_that_of_a_ratio() -> None:
    runs = [(Run(98.5, 1.0), Run(98.5, 1.0)), (Run(98.5, 0.25), Run(98.5, 1.0))]
    time = AccuracyComparison((0, 1), *runs, 0.2, False, 1).time
    assert time.mean == pytest.approx(0.5) and 0 < time.low < 0.25
    assert time.low * time.high == pytest.approx(time.mean**2)


@pytest.mark.parametrize(
    ("approx", "margin", "decision", "words"),
    [
        ([98.49, 98.51, 98.52], 0.2, "as accurate", "Use it: approx is as accurate within the margin"),
        ([97.49, 97.51, 97.52], 0.2, "less accurate", "Do not use it as it is"),
        ([98.2, 98.6, 98.4], 0.2, "undecided", "Undecided: 3 seeds do not tell"),
        ([98.5, 98.5, 98.5], 0.2, "as accurate", "Use it"),
    ],
)
def test_the_decision(approx: list[float], margin: float, decision: str, words: str) -> None:
    found = comparison([98.5, 98.5, 98.5], approx, margin)
    assert found.decision == decision and found.verdict.startswith(words)
    worse = comparison([1.5, 1.5, 1.5], [100 - a for a in approx], margin, lower_is_better=True)  # a loss: 100 - accuracy
    assert worse.decision == decision


def test_the_seeds_that_would_decide() -> None:
    found = comparison([98.5, 98.5, 98.5], [98.2, 98.6, 98.4], 0.2)
    assert found.seeds_needed is not None and f"run about {found.seeds_needed} seeds" in found.verdict and found.seeds_needed > 3
    hopeless = comparison([98.5, 98.5, 98.5], [98.2, 98.6, 98.1], 0.2)
    assert hopeless.seeds_needed is None and "choose a larger one" in hopeless.verdict


def test_as_accurate_but_not_faster() -> None:
    found = comparison([98.5, 98.5, 98.5], [98.49, 98.51, 98.52], 0.2, seconds=1.0)
    assert "is not measurably faster" in found.verdict


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (0.5, {"value": 0.5, "seconds": 3.0}),
        ({"accuracy": 0.5}, {"value": 0.5, "seconds": 3.0}),
        ({"accuracy": 0.5, "seconds": 2}, {"value": 0.5, "seconds": 2.0}),
    ],
)
def test_what_a_function_may_return(returned: object, found: dict[str, float]) -> None:
    assert result_of(returned, 3.0) == found


@pytest.mark.parametrize("returned", [None, {"loss": 1.0}, float("nan"), {"accuracy": 1.0, "seconds": 0}])
def test_what_it_may_not_return(returned: object) -> None:
    assert "expected" in result_of(returned, 3.0)["error"]


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, code, said in (
        (["x.py:run", "--seeds", "1"], 2, ""),
        (["x.py:run", "--margin", "-1"], 2, "--margin: got -1; a number above 0 is expected"),
        (["x.py:run", "--json", str(tmp_path / "no" / "x.json")], 2, "there is no folder"),
    ):
        done = CliRunner().invoke(app, ["compare", *words])
        assert done.exit_code == code and said in done.stderr
    with pytest.raises(ValueError, match="at least 2 are expected"):
        compare_accuracy("x.py:run", seeds=1)
    monkeypatch.setenv("APPROX_COMPILE_DISABLE", "1")
    assert CliRunner().invoke(app, ["compare", "x.py:run"]).exit_code == 1
    assert accuracy.MARGIN == 0.005
