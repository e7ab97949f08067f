"""Two processes share a cache folder under different settings: unchanged code comes from the cache, and never the code of other settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cache_child import CASES, ROWS, run
from helpers.sampling import all_but

from approx_compile import ApproxConfig
from approx_compile.passes import joint_graph_pass
from approx_compile.passes.sites.site import Context

CHILD = Path(__file__).parents[1] / "helpers" / "cache_child.py"


def run_child(folder: Path, names: list[str]) -> tuple[dict[str, Any], str]:
    """Return the results of the cases by name, and what the child process wrote to stderr."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, str(CHILD), ",".join(names)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@dataclasses.dataclass
class Runs:
    """The results of some cases by name: with graphs run op by op, which uses no cache of code; of a first process; of a second one that shares its cache."""

    op_by_op: dict[str, Any]
    cold: dict[str, Any]
    warm: dict[str, Any]
    notices: str
    """What the second process wrote to stderr."""

    def of(self, cases: dict[str, Any]) -> list[str]:
        return [name for name in self.op_by_op if name in cases]


SOME = ["half", "first", "rows_below"]


@pytest.fixture(scope="module", params=all_but([SOME], [SOME, [*CASES, *ROWS]]), ids=["some", "all"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, names = tmp_path_factory.mktemp("shared"), request.param
    op_by_op = {name: run(name, op_by_op=True) for name in names}
    cold, _ = run_child(folder, names)
    return Runs(op_by_op, cold, *run_child(folder, [*reversed(names), "half@another version"]))


@pytest.mark.slow
def test_settings_differ(runs: Runs) -> None:
    """If the settings gave equal gradients, a stale cache hit could not be seen. Checkpointing alone changes no gradient."""
    for cases in (CASES, ROWS):
        plain = [n for n in runs.of(cases) if "checkpoint" not in n]
        assert plain and not any(same(runs.op_by_op[a], runs.op_by_op[b]) for a, b in itertools.combinations(plain, 2))
    assert all(result["hits"] == result["graph_hits"] == 0 for result in runs.op_by_op.values())


@pytest.mark.slow
def test_processes_that_share_a_cache(runs: Runs) -> None:
    """The first process fills the cache with all settings; the second compiles them in another order."""
    for name in runs.of(CASES):
        cold, warm = runs.cold[name], runs.warm[name]
        assert same(cold, runs.op_by_op[name]) and warm["grads"] == cold["grads"], name
        assert cold["hits"] == 0 and (warm["hits"], warm["misses"], warm["bypasses"]) == (1, 0, 0), name
    # after a hit the pass does not run; the user is told all the same
    assert "Net: FORWARD PASS SAMPLED in 3 of 3 layers" in runs.notices
    other = runs.warm["half@another version"]
    assert (other["hits"], other["misses"]) == (0, 1) and same(other, runs.op_by_op["half"])


@pytest.mark.slow
def test_rows_that_share_a_cache(runs: Runs) -> None:
    """Inductor's cache serves the stages of graphs on rows, in the process that filled it and in the next, and never the code of other settings."""
    for name in runs.of(ROWS):
        cold, warm = runs.cold[name], runs.warm[name]
        assert same(cold, runs.op_by_op[name]) and warm["grads"] == cold["grads"], name
        assert (warm["hits"], warm["graph_misses"]) == (0, 0) and warm["graph_hits"] >= 2, name
    assert "Net: forward exact. Backward on 25 % to 50 % of the samples" in runs.notices


def same(got: dict[str, Any], want: dict[str, Any]) -> bool:
    """Return whether the gradients are equal up to rounding. Those of different settings differ by far more, as the first test checks."""
    return bool(np.allclose(got["grads"], want["grads"], rtol=1e-4))


def test_every_key_is_in_the_cache_key() -> None:
    """Options that differ in one key, of every kind, give different keys."""
    options: list[dict[str, Any]] = [
        {},
        {"policy": "always"},
        {"ratio": 0.5},
        {"ratio": 0.25},
        {"rules": [{"layers": "first", "ratio": 0.25}]},
        {"rules": [{"layers": "second", "ratio": 0.25}]},
        {"rules": [{"layers": "second", "method": "exact"}]},
        {"policy": "always", "sampling": "backward"},
        {"policy": "always", "sampling": "blackbox"},
        {"method": "topk_weights"},
        {"policy": "always", "group": 4},
        {"grad_weight": {"method": "topk", "ratio": 0.25}},
        {"method": "bernoulli", "ratio": 0.25},
        {"grad": {"axis": "rows", "ratio": 0.25}},
        {"grad": {"axis": "rows", "ratio": 0.5}},
        {"grad": {"axis": "rows", "method": "topk", "ratio": 0.5}},
    ]
    keys = {joint_graph_pass.cache_key(ApproxConfig(**o), Context(), ()) for o in options}
    assert len(keys) == len(options)
